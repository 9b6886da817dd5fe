"""Attacks that know which bits flipped."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from resq_deploy.bundle import Sample
from resq_deploy.errors import AttackError
from resq_deploy.export.craft import zero_gradients
from resq_deploy.export.joint import attack_faulty
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
