"""Attacks on a Runner: replay, black boxes, worst case, doubts, both threats at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resq_deploy.budget import Budget, Norm
from resq_deploy.bundle import MANIFEST, Bundle, Sample, sha256_of, write_npz
from resq_deploy.errors import AttackError, BundleError, MissingExtra
from resq_deploy.manifest import Attack
from resq_deploy.runtime import attacks, blackbox, sanity
from resq_deploy.runtime import square as square_module
from resq_deploy.runtime.attacks import Attacked
from resq_deploy.runtime.double import NumpyRunner
from resq_deploy.runtime.runner import open_runner
from tests.bundles import write_bundle


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attacks") / "net.resq"
    write_bundle(path)
    return path


@pytest.fixture
def runner() -> NumpyRunner:
    return NumpyRunner(shape=(1, 8, 8))


def spec(name: str = "pgd", **changes: Any) -> Attack:
    fields: dict[str, Any] = {
        "attack": name,
        "norm": "linf",
        "eps": 0.1,
        "crafted_through": "twin",
        "model_sha256": "0" * 64,
        "samples": 4,
    }
    return Attack(**{**fields, **changes})


def attacked(
    name: str,
    right: list[int],
    right_attacked: list[int],
    clean: Sample | None = None,
    **changes: Any,
) -> Attacked:
    count = len(right)
    images = np.full((count, 1, 2, 2), 0.5, np.float32)
    clean = clean or Sample(images, np.zeros(count, np.int64), np.arange(count))
    moved = clean.images + np.float32(0.1) * (1 + len(name))
    before, after = (np.array(v, dtype=bool) for v in (right, right_attacked))
    return Attacked(name, spec(name, **changes), clean, moved, before, after)


def test_a_stored_attack_is_replayed(saved: Path) -> None:
    bundle = Bundle.open(saved)
    with open_runner(bundle, threads=1) as runner:
        (found,) = attacks.evaluate(runner, bundle)
        logits = runner(1 - bundle.eval_sample().images)
    assert found.name == "noise"
    assert found.figure_name == "robust@noise,eps=255/255"
    right = logits.argmax(1) == bundle.eval_sample().labels
    assert np.array_equal(found.right_attacked, right)
    report = attacks.result(found)
    assert report.robust.mean == pytest.approx(found.robust.mean())
    assert report.success.n == found.right.sum()


def change(path: Path, target: Path, edit: Callable[[dict[str, Any], Path], None]) -> Bundle:
    """A copy of a bundle whose manifest and files were edited together, hashes included."""
    shutil.copytree(path, target)
    manifest = json.loads((target / MANIFEST).read_bytes())
    edit(manifest, target)
    for name, entry in manifest["files"].items():
        file = target / name
        entry |= {"sha256": sha256_of(file), "size": file.stat().st_size}
    (target / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(target)


def other_model(manifest: dict[str, Any], folder: Path) -> None:
    manifest["attacks"]["noise"]["model_sha256"] = "f" * 64


def smaller_budget(manifest: dict[str, Any], folder: Path) -> None:
    manifest["attacks"]["noise"]["eps"] = 8 / 255


def other_images(manifest: dict[str, Any], folder: Path) -> None:
    x = np.zeros((2, *manifest["input"]["shape"]), np.float32)
    arrays = {"x": x, "y": np.zeros(2, np.int64), "index": np.array([500, 501])}
    write_npz(folder / "attacks" / "noise.npz", arrays)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (other_model, "made for another model"),
        (smaller_budget, "adversarial inputs exceed linf 8/255"),
        (other_images, "not on images of its held-out sample"),
    ],
)
def test_attack_files_that_do_not_belong_are_refused(
    saved: Path, tmp_path: Path, edit: Callable[[dict[str, Any], Path], None], message: str
) -> None:
    bundle = change(saved, tmp_path / "changed.resq", edit)
    with pytest.raises(AttackError, match=message) as found:
        attacks.stored(bundle, "noise")
    assert "\n" not in str(found.value)
    assert "'noise'" in str(found.value)


def test_names_are_checked_before_anything_runs(saved: Path) -> None:
    bundle = Bundle.open(saved)
    attacks.check_names(bundle, ["noise", "square", "hopskipjump"])
    with pytest.raises(AttackError, match="pgd needs gradients, and is not stored") as found:
        attacks.check_names(bundle, ["pgd"])
    assert "stored: noise" in found.value.hint
    with pytest.raises(AttackError, match="unknown attack 'nosie'"):
        attacks.check_names(bundle, ["nosie"])
    with pytest.raises(BundleError, match="no stored attack"):
        attacks.stored(bundle, "pgd")


def test_a_black_box_takes_the_images_of_the_replayed_attacks(saved: Path) -> None:
    bundle = Bundle.open(saved)
    with open_runner(bundle, threads=1) as runner:
        stored, fresh = attacks.evaluate(runner, bundle, ["noise", "square"], queries=5, seed=3)
        again = attacks.evaluate(runner, bundle, ["square"], queries=5, seed=3, eps=1.0)[0]
    assert np.array_equal(fresh.clean.indices, stored.clean.indices)
    assert fresh.spec.eps == 1.0
    assert fresh.spec.crafted_through == "artifact"
    assert fresh.spec.parameters["queries"] == 5
    assert np.array_equal(fresh.images, again.images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["square", "hopskipjump"])
def test_black_boxes_keep_the_budget_and_repeat(runner: NumpyRunner, name: str, norm: Norm) -> None:
    sample = runner.sample(24, right=0.8)
    budget = Budget(norm, 0.15 if norm == "linf" else 1.0)
    counted = blackbox.Counted(runner)
    queries = 60 if name == "square" else 400
    state = str(np.random.get_state())  # noqa: NPY002
    made = blackbox.attack(counted, sample, name, budget, queries=queries, seed=5)
    assert str(np.random.get_state()) == state  # noqa: NPY002
    assert budget.distance(sample.images, made).max() <= budget.eps + 1e-6
    assert made.min() >= 0
    assert made.max() <= 1
    right = runner(sample.images).argmax(1) == sample.labels
    assert np.array_equal(made[~right], sample.images[~right])
    left = (runner(made).argmax(1) == sample.labels)[right]
    assert left.mean() < 0.9
    assert counted.images <= len(sample) * queries * 2
    assert np.array_equal(
        made, blackbox.attack(runner, sample, name, budget, queries=queries, seed=5)
    )
    other = blackbox.attack(runner, sample, name, budget, queries=queries, seed=6)
    assert not np.array_equal(made, other)


def test_more_queries_break_more(runner: NumpyRunner) -> None:
    sample = runner.sample(60, right=1.0)
    left = []
    for queries in (2, 20, 200):
        made = blackbox.attack(runner, sample, "square", Budget("linf", 0.08), queries=queries)
        left.append(int((runner(made).argmax(1) == sample.labels).sum()))
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize("side", [3, 5, 7])
def test_a_step_of_square_keeps_the_length_and_can_be_undone(side: int) -> None:
    """In L2 a step moves the change about: never more than eps, and what is spent is what was counted."""
    rng = np.random.default_rng(side)
    clean = rng.random((6, 3, 12, 12), dtype=np.float32)
    best = square_module._bumps(clean, 0.7, rng)
    spent = np.square(best - clean).sum(axis=(1, 2, 3))
    for number in range(30):
        before, lengths = best.copy(), spent.copy()
        undo = square_module._move_mass(best, clean, spent, 0.7, side, rng)
        assert np.square(best - clean).sum(axis=(1, 2, 3)) == pytest.approx(spent, abs=1e-5)
        assert (spent <= 0.7**2 + 1e-5).all()
        assert not np.array_equal(best, before)
        rows = np.arange(6) % 2 == number % 2
        undo(rows)
        assert np.array_equal(best[rows], before[rows])
        assert np.array_equal(spent[rows], lengths[rows])


def test_square_spends_its_queries_on_standing_images_only(runner: NumpyRunner) -> None:
    sample = runner.sample(30, right=1.0)
    counted = blackbox.Counted(runner)
    made = blackbox.attack(counted, sample, "square", Budget("linf", 0.3), queries=50)
    standing = int((runner(made).argmax(1) == sample.labels).sum())
    assert counted.images < len(sample) * 51
    assert counted.images >= len(sample) * 2 + standing * 49


def test_bad_requests_are_refused(runner: NumpyRunner) -> None:
    sample = runner.sample(4)
    with pytest.raises(AttackError, match="pgd is no black-box attack"):
        blackbox.attack(runner, sample, "pgd", Budget("linf", 0.1))
    with pytest.raises(AttackError, match="1 queries"):
        blackbox.attack(runner, sample, "square", Budget("linf", 0.1), queries=1)


def test_a_missing_toolbox_names_its_extra(
    runner: NumpyRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "art.attacks", None)
    with pytest.raises(MissingExtra, match=r"resq-deploy\[attacks\]"):
        blackbox.attack(runner, runner.sample(4, right=1.0), "hopskipjump", Budget("l2", 1.0))


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder
real = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in ("torch", "torchvision") else real(name, path, target)
PathFinder.find_spec = find_spec
from resq_deploy.bundle import Bundle
from resq_deploy.runtime import attacks
from resq_deploy.runtime.runner import open_runner
bundle = Bundle.open(sys.argv[1])
with open_runner(bundle, threads=1) as runner:
    found = attacks.evaluate(runner, bundle, ["noise", "square", "hopskipjump"], queries=30)
print([a.name for a in found])
"""


def test_a_device_without_torch_replays_and_attacks(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(saved)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['noise', 'square', 'hopskipjump']"


def test_the_worst_case_is_taken_image_by_image() -> None:
    one = attacked("pgd", [1, 1, 1, 0], [1, 0, 1, 1])
    two = attacked("square", [1, 1, 1, 0], [0, 1, 1, 1], clean=one.clean, eps=0.2)
    worst = attacks.worst_case([one, two])
    assert worst.robust.tolist() == [False, False, True, False]
    assert worst.spec.eps == 0.2
    assert worst.spec.parameters == {"over": ["pgd", "square"]}
    assert np.array_equal(worst.images[0], two.images[0])
    assert np.array_equal(worst.images[1], one.images[1])
    assert worst.figure_name == "robust@worst,eps=51/255"
    assert attacks.result(worst).success.mean == pytest.approx(2 / 3)


def test_the_worst_case_needs_the_same_images_and_norm() -> None:
    one = attacked("pgd", [1, 1], [1, 0])
    for other in (
        attacked("pgd", [1, 1, 1], [1, 0, 1]),
        attacked("square", [1, 1], [1, 0], clean=one.clean, norm="l2"),
    ):
        with pytest.raises(AttackError, match="same images in the same norm"):
            attacks.worst_case([one, other])
    with pytest.raises(AttackError, match="no attacks"):
        attacks.worst_case([])


def test_nothing_right_before_leaves_success_open() -> None:
    found = attacks.result(attacked("pgd", [0, 0], [0, 1]))
    assert (found.success.low, found.success.high, found.success.n) == (0.0, 1.0, 0)
    assert found.robust.mean == 0


def test_doubts_about_gradients(saved: Path) -> None:
    bundle = Bundle.open(saved)
    fgsm = attacked("fgsm", [1, 1, 1, 1], [0, 1, 0, 1])
    pgd = attacked("pgd", [1] * 4, [1, 1, 1, 0], clean=fgsm.clean, transfer={"zero_gradients": 0.5})
    box = attacked("square", [1] * 4, [0, 1, 1, 1], clean=fgsm.clean, crafted_through="artifact")
    far = attacked("square", [1] * 4, [0, 0, 0, 0], clean=fgsm.clean, eps=0.5)
    with open_runner(bundle, threads=1) as runner:
        checked = sanity.check(runner, bundle, [fgsm, pgd, box, far])
        assert sanity.check(runner, bundle, []) == []
    texts = checked[1].warnings
    assert len(texts) == 3
    assert "50.0% of the images have no gradient" in texts[0]
    assert "the weaker fgsm 2" in texts[1]
    assert "square breaks 1 images that stand against pgd" in texts[2]
    assert checked[0].warnings == ()
    assert checked[2].warnings == ()
