"""An engine is added to a bundle that exists: nothing else changes, no torch is needed, refusals are one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from resq_deploy.bundle import INT8, MANIFEST, Bundle
from resq_deploy.console import BAD_INPUT, OK, run
from resq_deploy.errors import BackendError, BundleError, IntegrityError
from resq_deploy.export import on_device
from resq_deploy.export.cli import export
from resq_deploy.export.on_device import add_engines
from resq_deploy.memory import fault_space
from resq_deploy.runtime.plan import PlanMap
from resq_deploy.signing import SIGNATURE, generate_key, sign_bundle
from tests.bundles import write_bundle
from tests.export.engines import int8_network

RTX: dict[str, Any] = {"targets": ("onnx", "tensorrt-rtx"), "sm": ("86",), "batch": (1, 2, 4)}
NEW = {"engines/tensorrt-rtx.plan", "engines/tensorrt-rtx.weights.json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "m.resq").path


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A bundle alone in a folder; it has an engine `host`."""
    return Path(shutil.copytree(made, tmp_path / "m.resq"))


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def check_added(path: Path, before: dict[str, bytes]) -> None:
    """The bundle is whole, has an engine more, and is otherwise what it was."""
    after = contents(path)
    assert after.keys() - before.keys() == NEW
    assert {n for n in before if before[n] != after[n]} == {MANIFEST}
    old, new = json.loads(before[MANIFEST]), json.loads(after[MANIFEST])
    entry = new["engines"].pop("tensorrt-rtx")
    assert entry["built_for"]["sm"] == ["SM86"]
    assert entry["built_for"]["batch"] == [1, 2, 4]
    assert {new["files"].pop(name)["size"] for name in NEW} == {len(after[n]) for n in NEW}
    assert new == old
    opened = Bundle.open(path)
    found = PlanMap.load(opened.file("engines/tensorrt-rtx.weights.json"))
    found.check(after["engines/tensorrt-rtx.plan"])
    for memory in fault_space(opened.int8).select(kinds=["weights"]).memories:
        value, located = found.read(after["engines/tensorrt-rtx.plan"], memory.name)
        assert located.all()
        assert np.array_equal(value, memory.value)


def test_in_place(bundle: Path) -> None:
    before = contents(bundle)
    add_engines(bundle, **RTX)
    check_added(bundle, before)
    assert [p.name for p in bundle.parent.iterdir()] == ["m.resq"]


def test_another_bundle(bundle: Path) -> None:
    before = contents(bundle)
    other = bundle.with_name("other.resq")
    add_engines(bundle, other, **RTX)
    assert contents(bundle) == before
    check_added(other, before)
    with pytest.raises(BundleError, match=r"other\.resq exists already"):
        add_engines(bundle, other, **RTX)


def test_a_real_network(bundle: Path) -> None:
    """resnet8 as the exporter writes it, in the place of the small one."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    int8_network("resnet8", bundle / INT8)
    import hashlib

    content = (bundle / INT8).read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest["files"][INT8] = entry
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    before = contents(bundle)
    before[MANIFEST] = json.dumps(Bundle.open(bundle).manifest.model_dump(mode="json")).encode()
    added = add_engines(bundle, **RTX)
    assert added.manifest.engines["tensorrt-rtx"].coverage == 1.0
    check_added(bundle, before)


def test_a_plan_is_replaced_only_by_force(bundle: Path) -> None:
    add_engines(bundle, **RTX)
    before = contents(bundle)
    with pytest.raises(BundleError, match=r"has a tensorrt-rtx plan already \(replace it with --f"):
        add_engines(bundle, **RTX)
    assert contents(bundle) == before
    again = add_engines(bundle, **{**RTX, "sm": ("89",)}, force=True)
    assert again.manifest.engines["tensorrt-rtx"].built_for["sm"] == ["SM89"]
    assert contents(bundle).keys() == before.keys()
    assert contents(bundle)["engines/host.plan"] == before["engines/host.plan"]
    Bundle.open(bundle)


def test_a_link_to_a_bundle_stays_a_link(bundle: Path) -> None:
    link = bundle.with_name("link.resq")
    link.symlink_to(bundle)
    before = contents(bundle)
    add_engines(link, **RTX)
    assert link.is_symlink()
    check_added(bundle, before)


@pytest.mark.parametrize("how", ["in place", "another"])
def test_a_signature_does_not_survive_and_that_is_said(
    bundle: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_key(bundle.with_name("key"))
    sign_bundle(bundle, bundle.with_name("key"))
    output = bundle if how == "in place" else bundle.with_name("other.resq")
    add_engines(bundle, output, **RTX)
    assert not (output / SIGNATURE).exists()
    assert (bundle / SIGNATURE).exists() == (how == "another")
    assert "m.resq was signed" in (told := " ".join(capsys.readouterr().err.split()))
    assert f"resq sign {output} --key" in told
    sign_bundle(output, bundle.with_name("key"))
    Bundle.open(output, key=bundle.with_name("key.pub"))


def test_what_is_not_the_bundles_is_not_lost(bundle: Path) -> None:
    (bundle / "engines" / "notes.txt").write_text("mine")
    before = contents(bundle)
    with pytest.raises(BundleError, match=r"notes\.txt is not in the bundle's manifest"):
        add_engines(bundle, **RTX)
    assert contents(bundle) == before
    other = add_engines(bundle, bundle.with_name("other.resq"), **RTX)
    assert not (other.path / "engines" / "notes.txt").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, BackendError("no GPU")])
def test_a_build_that_fails_leaves_the_bundle_as_it_was(
    bundle: Path, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(on_device, "add_requested", fail)
    before = contents(bundle)
    with pytest.raises((KeyboardInterrupt, BackendError)):
        add_engines(bundle, **RTX)
    assert contents(bundle) == before
    assert [p.name for p in bundle.parent.iterdir()] == ["m.resq"]


def test_a_bundle_that_is_not_whole_is_refused(bundle: Path) -> None:
    (bundle / INT8).write_bytes(b"other")
    with pytest.raises(IntegrityError, match="not the file that the manifest names"):
        add_engines(bundle, **RTX)


def test_a_file_that_changes_while_it_is_copied(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_device, "sha256_of", lambda path: "0" * 64)
    with pytest.raises(IntegrityError, match="changed while it was copied"):
        add_engines(bundle, **RTX)
    assert [p.name for p in bundle.parent.iterdir()] == ["m.resq"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "is a bundle already, and no engine is asked for"),
        ("--target onnx", "is a bundle already, and no engine is asked for"),
        ("--target tensorrt-rtx --calib digits --opset 20", "--calib, --opset can no longer be"),
        ("--target tensorrt-rtx --no-adjust", "--adjust can no longer be chosen"),
        ("--target tensorrt-rtx --attack none", "--attack can no longer be chosen"),
        ("--target tensorrt-rtx --seed 3", "--seed can no longer be chosen"),
        ("--target tensorrt-rtx --sm 90", "does not know SM 90"),
        ("--target tensorrt-rtx --timing-cache t.cache", "TensorRT-RTX has no timing cache"),
        ("--sm 86", "--sm is for engines"),
    ],
)
def test_refusals_are_one_line(
    bundle: Path, flags: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle)
    assert run(export, [str(bundle), *flags.split()]) == BAD_INPUT
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert contents(bundle) == before


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(export, [str(tmp_path), "--target", "tensorrt-rtx"]) == BAD_INPUT
    assert "is not a bundle" in capsys.readouterr().err


def test_the_command_without_torch(bundle: Path) -> None:
    """As on a device: a process in which torch cannot be imported."""
    other = bundle.with_name("other.resq")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from resq_deploy.export.cli import main\n"
        f"main([{str(bundle)!r}, '--target', 'tensorrt-rtx', '--sm', '86', '--batch', '1:2:4',"
        f" '--workspace', '1G', '--optimization-level', '2', '-o', {str(other)!r}, '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == OK, done.stderr
    told = json.loads(done.stdout)["engines"]["tensorrt-rtx"]
    assert told["built_for"]["workspace"] == 2**30
    assert told["built_for"]["optimization_level"] == 2
    assert told["unlocated"] == {}
    assert "tensorrt-rtx.plan: " in done.stderr
    Bundle.open(other)


def test_a_plan_that_can_be_refitted_wants_a_gpu(bundle: Path) -> None:
    """In a process of its own: what a failed build of TensorRT-RTX leaves behind changes the next one."""
    code = (
        "from resq_deploy.export.cli import main\n"
        f"main([{str(bundle)!r}, '--target', 'tensorrt-rtx', '--sm', '86', '--refit'])"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == BAD_INPUT
    assert "needs an NVIDIA GPU to build a plan that can be refitted" in done.stderr


def test_the_help_shows_how() -> None:
    shown = CliRunner().invoke(export, ["--help"]).output
    assert "resq-export model.resq --target tensorrt" in shown


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("512M", 2**29), ("2GiB", 2**31), ("3 kb", None), ("x", None)]
)
def test_sizes(bundle: Path, text: str, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(*_: Any, options: Any, **__: Any) -> None:
        seen.append(options.workspace)
        raise BackendError("stop here")

    monkeypatch.setattr(on_device, "add_engines", stop)
    assert run(export, [str(bundle), "--target", "tensorrt", "--workspace", text]) == BAD_INPUT
    assert seen == ([] if size is None else [size])
