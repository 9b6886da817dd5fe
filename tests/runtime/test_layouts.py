"""Layouts: a tag's order is numpy's, and positions, elements, pack and unpack agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from resq_deploy.runtime.layouts import Layout, candidates

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def numbered(shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Each element is its own flat index, plus 1 so that filling (0) stands out."""
    return np.arange(1, int(np.prod(shape)) + 1, dtype=np.int32).reshape(shape)


@given(SHAPES, st.data())
def test_positions_elements_pack_and_unpack_agree(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    layout = data.draw(st.sampled_from(candidates(shape)))
    array = numbered(shape)
    copy = layout.pack(array)
    elements = np.arange(array.size)
    positions = layout.positions(elements)
    assert copy.size == layout.size
    assert np.array_equal(copy[positions], array.reshape(-1))
    assert np.count_nonzero(copy) == array.size
    assert np.array_equal(layout.elements(np.arange(layout.size)), copy - 1)
    assert np.array_equal(layout.unpack(copy), array)


def test_likely_layouts_come_first_and_none_twice() -> None:
    tags = [layout.tag for layout in candidates((64, 6, 3, 3))]
    assert tags[:2] == ["acdb", "abcd"]
    assert {"acdB4b", "aBcd4b"} <= set(tags)
    assert len(tags) == len(set(tags))
    assert "acdB4b" not in [layout.tag for layout in candidates((64, 32, 3, 3))]


def test_krsc() -> None:
    array = numbered((4, 3, 2, 5))
    expected = array.transpose(0, 2, 3, 1).reshape(-1)
    assert np.array_equal(Layout("acdb", array.shape).pack(array), expected)


def test_krsc_with_channels_filled_up_to_4() -> None:
    array = numbered((2, 3, 2, 2))
    expected = np.pad(array.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(-1)
    assert np.array_equal(Layout("acdB4b", array.shape).pack(array), expected)


def test_nc_32_hw_32() -> None:
    k, c, h, w = 2, 70, 3, 3
    array = numbered((k, c, h, w))
    layout = Layout("aBcd32b", array.shape)
    copy = layout.pack(array).reshape(k, 3, h, w, 32)
    for channel in (0, 31, 32, 69):
        block, lane = divmod(channel, 32)
        assert np.array_equal(copy[:, block, :, :, lane], array[:, channel])
    assert not copy[:, 2, :, :, 6:].any()


def test_blocks_of_two_axes() -> None:
    array = numbered((16, 8))
    copy = Layout("AB4b8a", array.shape).pack(array).reshape(2, 2, 4, 8)
    assert copy[1, 0, 3, 5] == array[8 + 5, 3]


@pytest.mark.parametrize(
    "tag", ["", "ab", "abcc", "abce", "acdB", "acdb4b", "acdB0b", "acdB4c", "a c d b", "abcdefg"]
)
def test_a_tag_that_does_not_fit_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        Layout(tag, (2, 3, 4, 5))


@pytest.mark.parametrize("shape", [(), (0, 3), (1,) * 7])
def test_a_shape_without_elements_or_with_too_many_axes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        Layout("ab", shape)
    assert candidates(shape) == ()
