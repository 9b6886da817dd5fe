"""Inputs that were crafted against faulty memory: replayed with the same faults, and refused where anything differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resq_deploy import console
from resq_deploy.bundle import MANIFEST, Bundle, read_npz, sha256_of, write_npz
from resq_deploy.errors import AttackError, BundleError, EngineLost, ExecutionError
from resq_deploy.fault_models import parse
from resq_deploy.faults import Flips
from resq_deploy.metrics import top1
from resq_deploy.runtime import attacks, contents, faulty
from resq_deploy.runtime.cli import command
from resq_deploy.runtime.double import NumpyRunner
from resq_deploy.runtime.runner import open_runner
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.validate import validate_bundle
from tests.bundles import write_bundle

NAME = "noise@ber=1e-2"
FIGURE = "robust@noise,eps=255/255,aware@ber=1e-2"
FEW = Settings(ber=(1e-2,), faults=(), trials=2, joint=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "net.resq", faulty=True)


def test_the_faults_are_those_of_the_campaign_trial_by_trial(bundle: Bundle) -> None:
    with open_runner(bundle) as runner:
        part = runner.space.select(("weights",))
        memory = bundle.manifest.attacks[NAME].faulty
        assert memory is not None
        drawn = [flips.digest() for flips in faulty.draw(memory, runner.space)]
    assert drawn == [parse("ber:0.01").trial(part, 0, i).flips.digest() for i in range(2)]


def test_shares_are_what_the_faulty_artifact_answers(bundle: Bundle) -> None:
    clean, moved, spec = faulty.stored(bundle, NAME)
    assert moved.shape == (2, 12, *clean.images.shape[1:])
    with open_runner(bundle) as runner:
        found = faulty.evaluate(runner, bundle, NAME)
        again, kept = faulty.replay(runner, bundle, NAME)
        assert spec.faulty is not None
        right, aware, unaware = [], [], []
        stood = np.zeros(12, np.int64)
        for flips, known in zip(faulty.draw(spec.faulty, runner.space), moved, strict=True):
            with runner.faults(flips):
                answers = [top1(runner(x)) == clean.labels for x in (clean.images, known, moved[0])]
            right.append(answers[0].mean())
            aware.append((answers[0] & answers[1]).mean())
            stood += answers[0] & answers[1]
            unaware.append((answers[0] & answers[2]).mean())
    assert found == again
    assert kept is not None
    assert (kept.counts.tolist(), kept.trials) == (stood.tolist(), 2)
    assert kept.trial_shares.tolist() == aware
    assert kept.variance == pytest.approx(np.var(aware, ddof=1) / 2)
    assert found.unaware is not None
    assert [found.clean.mean, found.aware.mean, found.unaware.mean] == pytest.approx(
        [np.mean(right), np.mean(aware), np.mean(unaware)]
    )
    assert found.flips > 0
    assert (found.trials, found.images, found.fault) == (2, 12, "ber=1e-2")


def test_joint_brings_the_figure_and_only_joint(bundle: Bundle, tmp_path: Path) -> None:
    report = validate_bundle(
        bundle, FEW, output=tmp_path / "r", workers=1, require=[f"{FIGURE} <= 1"]
    )
    assert report.met
    assert report.figures[FIGURE] == report.joint[0].aware
    assert "knows" in (tmp_path / "r" / "report.html").read_text() or report.joint
    alone = validate_bundle(bundle, replace(FEW, joint=False), workers=1)
    assert FIGURE not in alone.figures
    assert any("--joint runs them" in line for line in alone.not_covered)
    assert [a.name for a in alone.attacks] == ["noise"]


def test_a_requirement_on_it_needs_joint(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--ber", "1e-2", "--faults", "", "--trials", "2", "--workers", "1", "--quiet"]
    wanted = ["--require", f"{FIGURE} >= 0", "-o", str(tmp_path / "r")]
    assert console.run(command, [str(bundle.path), *few, *wanted]) == 2
    assert "no figure" in capsys.readouterr().err
    assert console.run(command, [str(bundle.path), *few, *wanted, "--joint"]) == 0


def test_it_is_no_attack_by_itself(bundle: Bundle) -> None:
    with pytest.raises(AttackError, match="--joint"):
        attacks.check_names(bundle, [NAME])
    assert faulty.sets(bundle) == (NAME,)
    assert faulty.sets(bundle, ["noise"]) == (NAME,)
    assert faulty.sets(bundle, ["pgd"]) == ()


def _spoilt(path: Path, arrays: dict[str, Any], memory: dict[str, Any]) -> Bundle:
    """A bundle whose set was changed, with hashes that fit: what a careless or malicious writer can make."""
    bundle = write_bundle(path, faulty=True)
    file = path / "attacks" / f"{NAME}.npz"
    write_npz(file, read_npz(file) | arrays)
    manifest = json.loads((path / MANIFEST).read_text())
    entry = {"sha256": sha256_of(file), "size": file.stat().st_size}
    manifest["files"][f"attacks/{NAME}.npz"] = entry
    manifest["attacks"][NAME]["faulty"] |= memory
    manifest["attacks"][NAME]["eps"] = 0.05 if "x" in arrays else 1.0
    (path / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("arrays", "memory", "said"),
    [
        ({"x": np.ones((24, 3, 32, 32), np.float32)}, {}, "exceed linf"),
        ({"index": np.r_[np.arange(12), np.arange(11, -1, -1)]}, {}, "held-out|same images"),
        ({}, {"trials": 1, "flips": ["0" * 16]}, "not the fault"),
        ({}, {"trials": 5, "flips": ["0" * 16] * 5}, "same images in each of its 5 trials"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, arrays: dict[str, Any], memory: dict[str, Any], said: str
) -> None:
    shape = read_npz(write_bundle(tmp_path / "a.resq").path / "eval.npz")["x"].shape[1:]
    arrays = {k: np.ones((24, *shape), np.float32) if k == "x" else v for k, v in arrays.items()}
    bundle = _spoilt(tmp_path / "b.resq", arrays, memory)
    with open_runner(bundle) as runner, pytest.raises(AttackError, match=said):
        faulty.evaluate(runner, bundle, NAME)
    if "not the fault" not in said:
        with pytest.raises(AttackError, match=said):
            contents.verify_bundle(bundle.path)


def test_a_digest_for_each_trial(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="digest"):
        _spoilt(tmp_path / "b.resq", {}, {"trials": 3})


class Half(NumpyRunner):
    """Reaches only the even elements of each tensor."""

    def unreachable(self, flips: Flips) -> int:
        return sum(
            int(np.bitwise_count(p.masks[p.elements % 2 == 1]).sum()) for p in flips.values()
        )


def test_what_is_out_of_reach_is_counted() -> None:
    half = Half()
    sample, space = half.sample(8), half.space.select(("weights",))
    faults = [parse("ber:0.05").trial(space, 0, i).flips for i in range(3)]
    found = faulty.measure(half, sample, None, [sample.images] * 3, faults)
    drawn = [f for flips in faults for f in flips.faults()]
    odd = sum(f.element % 2 for f in drawn)
    assert (found.flips, found.unreachable) == (len(drawn) - odd, odd)
    assert odd > 0


class Fails(NumpyRunner):
    """Breaks off every run while the sign bit of a weight is flipped; `lost`: and ever after."""

    def __init__(self, lost: bool = False) -> None:
        super().__init__()
        self.lost, self.broken, self.flipped = lost, False, False

    @contextmanager
    def _inject(self, flips: Flips) -> Iterator[None]:
        self.flipped = any(f.bit == 7 for f in flips.faults())
        with super()._inject(flips):
            yield
        self.flipped = False

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self.broken = self.broken or self.flipped
        if self.flipped or (self.lost and self.broken):
            self.flipped = False
            raise ExecutionError("the device gave up")
        return super().__call__(images)


def test_a_run_that_is_broken_off_answers_nothing() -> None:
    runner = Fails()
    sample, space = runner.sample(8), runner.space.select(("weights",))
    one = [space.select(bits=(bit,)).flips(np.arange(1)) for bit in (0, 7, 0)]
    found = faulty.measure(runner, sample, None, [sample.images] * 3, one)
    assert found.failed == 1
    assert [t.clean for t in found.trials][1] == 0
    assert found.trials[0].clean > 0
    with pytest.raises(EngineLost):
        faulty.measure(Fails(lost=True), sample, None, [sample.images] * 3, one)
