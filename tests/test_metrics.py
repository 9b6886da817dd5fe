from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from resq_deploy.metrics import (
    accuracy,
    agreement,
    classify,
    packed,
    right,
    sqnr_db,
    top1,
    unpacked,
)

logits = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 8), st.just(10)), elements=st.floats(-100, 100, width=32)
)


@given(logits)
def test_a_run_equal_to_the_golden_one_is_masked(golden: NDArray[np.float32]) -> None:
    labels = np.zeros(len(golden), np.int64)
    outcome = classify(golden, golden.copy(), labels)
    assert outcome.masked == outcome.images == len(golden)
    assert outcome.sdc1 == outcome.sdc5 == outcome.critical == outcome.due == 0
    assert outcome.correct == int((golden.argmax(1) == 0).sum())


@given(logits, st.data())
def test_outcomes_are_nested(golden: NDArray[np.float32], data: st.DataObject) -> None:
    faulty = data.draw(
        hnp.arrays(np.float32, golden.shape, elements=st.floats(-100, 100, width=32))
    )
    labels = data.draw(hnp.arrays(np.int64, len(golden), elements=st.integers(0, 9)))
    outcome = classify(golden, faulty, labels)
    assert outcome.sdc5 <= outcome.sdc1 <= outcome.images - outcome.masked
    assert outcome.critical <= outcome.sdc1


def test_each_outcome_by_hand() -> None:
    golden = np.tile(np.arange(10, dtype=np.float32), (4, 1))  # top-1 is 9
    faulty = golden.copy()
    faulty[1, 8] = 50  # SDC-1
    faulty[2, 3:9] = 50  # SDC-5: six are ahead of 9
    faulty[3, 0] = np.nan  # DUE
    outcome = classify(golden, faulty, np.array([9, 9, 9, 9]))
    assert (outcome.masked, outcome.sdc1, outcome.sdc5, outcome.critical, outcome.due) == (
        1,
        3,
        1,
        3,
        1,
    )
    assert outcome.correct == 1


@given(logits, st.data())
def test_the_images_that_changed_lead_from_golden_to_faulty(
    golden: NDArray[np.float32], data: st.DataObject
) -> None:
    faulty = data.draw(
        hnp.arrays(np.float32, golden.shape, elements=st.floats(-100, 100, width=32))
    )
    labels = data.draw(hnp.arrays(np.int64, len(golden), elements=st.integers(0, 9)))
    outcome = classify(golden, faulty, labels)
    changed = unpacked(outcome.changed, len(golden))
    assert (right(golden, labels) ^ changed).tolist() == (top1(faulty) == labels).tolist()
    assert (right(golden, labels) ^ changed).sum() == outcome.correct


def test_an_image_of_several_versions_changes_with_the_first_that_falls() -> None:
    labels = np.tile(np.array([1, 1, 0]), 2)  # two versions of three images
    golden = np.array([[0, 1], [0, 1], [0, 1]] * 2, np.float32)
    faulty = golden.copy()
    faulty[4] = [1, 0]  # the second version of image 1
    outcome = classify(golden, faulty, labels, versions=2)
    assert unpacked(outcome.changed, 3).tolist() == [False, True, False]
    assert right(faulty, labels, 2).tolist() == [True, False, False]


@given(hnp.arrays(np.bool_, st.integers(0, 300)))
def test_flags_are_packed_in_few_bytes(flags: NDArray[np.bool_]) -> None:
    content = packed(flags)
    assert unpacked(content, flags.size).tolist() == flags.tolist()
    assert (
        len(content) == -(-(int(np.flatnonzero(flags)[-1]) + 1) // 8)
        if flags.any()
        else not content
    )


def test_more_bytes_than_flags_are_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes for 8 flags"):
        unpacked(b"\x00\x01", 8)


def test_negative_zero_is_not_bit_identical() -> None:
    golden = np.zeros((1, 10), np.float32)
    assert classify(golden, -golden, np.array([0])).masked == 0


def test_top1_of_a_nan_row_is_none_of_the_classes() -> None:
    rows = np.array([[1, 2], [np.nan, 2]], np.float32)
    assert top1(rows).tolist() == [1, -1]
    assert accuracy(rows, np.array([1, 1])) == 0.5
    assert agreement(rows, rows[:, ::-1].copy()) == 0.5


def test_sqnr_is_in_decibels() -> None:
    signal = np.ones(1000)
    assert sqnr_db(signal, signal * 1.1) == pytest.approx(20.0)
    assert sqnr_db(signal, signal) == 200.0
    assert math.isfinite(sqnr_db(np.zeros(3), np.ones(3)))
