"""Attacks that know which bits flipped."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from resq_deploy.budget import check_budget
from resq_deploy.bundle import Sample
from resq_deploy.errors import AttackError, ResqError
from resq_deploy.export.craft import zero_gradients
from resq_deploy.export.joint import FaultyAttack, attack_faulty, stored
from resq_deploy.export.twin import Twin
from resq_deploy.fault_models import parse, trial_rng
from resq_deploy.faults import Flips
from resq_deploy.metrics import top1
from resq_deploy.runtime.ort import OrtRunner
from tests.runtime.graphs import NETS, images, quantize


@pytest.fixture(scope="module")
def deployed() -> tuple[Twin, OrtRunner, Sample]:
    plain = NETS["resnet"](0)
    x = images(plain, 24)
    model = quantize(plain, x)
    runner = OrtRunner(model, threads=1)
    labels: NDArray[np.int64] = top1(runner(x))
    return Twin(model), runner, Sample(x, labels, np.arange(len(x)))


def test_who_knows_the_faults_breaks_at_least_as_much(
    deployed: tuple[Twin, OrtRunner, Sample],
) -> None:
    twin, runner, sample = deployed
    model = parse("ber:0.02")
    trials = [model.sample(runner.space, trial_rng(0, i)) for i in range(4)]
    found = attack_faulty(twin, runner, sample, "pgd", 4 / 255, [*trials, Flips({})], steps=5)
    assert len(found.trials) == 5
    assert all(max(t.unaware, t.aware) <= t.clean <= t.images == 24 for t in found.trials)
    assert found.trials[-1].clean == 24
    assert abs(found.trials[-1].aware - found.trials[-1].unaware) == 0
    assert found.aware.mean <= found.unaware.mean
    assert found.unaware.mean < found.clean.mean
    assert found.aware.low <= found.aware.mean <= found.aware.high
    assert np.array_equal(top1(runner(sample.images)), sample.labels)


def test_bad_requests_are_refused(deployed: tuple[Twin, OrtRunner, Sample]) -> None:
    twin, runner, sample = deployed
    with pytest.raises(AttackError, match="unknown attack"):
        attack_faulty(twin, runner, sample, "pgdd", 0.1, [])


def test_images_without_a_gradient_are_counted(deployed: tuple[Twin, OrtRunner, Sample]) -> None:
    twin, _, sample = deployed
    assert zero_gradients(twin, sample, batch=10) == 0
    scale = twin.parameters_by_initializer
    name = next(n for n in scale if n.endswith("scale") and "w_" not in n)
    before = scale[name].clone()
    try:
        scale[name].fill_(1e-12)
        assert zero_gradients(twin, sample) == 1
    finally:
        scale[name].copy_(before)


def test_a_stored_set_says_what_made_it(deployed: tuple[Twin, OrtRunner, Sample]) -> None:
    twin, runner, sample = deployed
    asked = FaultyAttack.parse("1e-2")
    moved, account = stored(twin, runner, sample.take(6), asked, 4 / 255, trials=3, seed=5)
    assert (asked.name, asked.attack) == ("pgd@ber=1e-2", "pgd")
    assert np.array_equal(moved.indices, np.tile(np.arange(6), 3))
    check_budget(np.tile(sample.images[:6], (3, 1, 1, 1)), moved.images, 4 / 255)
    model, part = parse("ber:0.01"), runner.space.select(("weights",))
    digests = tuple(model.trial(part, 5, i).flips.digest()[:16] for i in range(3))
    assert account["faulty"]["flips"] == digests
    assert account["samples"] == 18
    assert 0 <= account["transfer"]["int8"] <= 1


@pytest.mark.parametrize(
    ("text", "name"),
    [("1e-3", "pgd@ber=1e-3"), ("apgd@0.01", "apgd@ber=1e-2"), ("pgd@ber=1e-4", "pgd@ber=1e-4")],
)
def test_requests_are_read(text: str, name: str) -> None:
    assert FaultyAttack.parse(text).name == name


@pytest.mark.parametrize("text", ["", "2", "pgd@", "pgd@x", "square@1e-3", "pgdd@1e-3", "nan"])
def test_requests_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ResqError):
        FaultyAttack.parse(text)
