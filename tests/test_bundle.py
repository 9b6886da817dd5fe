from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

from resq_deploy.bundle import (
    Bundle,
    BundleWriter,
    as_pixels,
    check_free,
    compact,
    is_inside,
    read_npz,
    write_npz,
)
from resq_deploy.errors import BundleError, IntegrityError

ZERO = "0" * 64


def graph(name: str) -> bytes:
    """The least that is an ONNX file."""
    content: bytes = onnx.ModelProto(ir_version=8, producer_name=name).SerializeToString()
    return content


def manifest() -> dict[str, Any]:
    """The least that a manifest can say."""
    return {
        "name": "tiny",
        "arch": "tiny",
        "input": {"name": "input", "shape": (1, 4, 4), "mean": (0.5,), "std": (0.5,)},
        "classes": ("a", "b"),
        "quantization": {"weights": {}, "activations": {}},
        "adjustment": {"applied": False},
        "metrics": {
            "samples": 3,
            "fp32_accuracy": 1,
            "int8_accuracy": 1,
            "agreement": 1,
            "sqnr_db": {},
        },
        "attacks": {
            "pgd": {
                "attack": "pgd",
                "norm": "linf",
                "eps": 0.1,
                "crafted_through": "fp32",
                "model_sha256": ZERO,
                "samples": 2,
            }
        },
        "provenance": {
            "versions": {},
            "command": (),
            "seed": 0,
            "model_sha256": ZERO,
            "calibration": {},
        },
    }


def write(path: Path, *, force: bool = False) -> Bundle:
    images = np.linspace(0, 1, 48, dtype=np.float32).reshape(3, 1, 4, 4)
    with BundleWriter(path, force=force) as writer:
        (writer.dir / "model.int8.onnx").write_bytes(graph("int8"))
        (writer.dir / "model.fp32.onnx").write_bytes(graph("fp32"))
        writer.save_npz("eval.npz", x=images, y=np.array([0, 1, 0]))
        writer.save_npz("attacks/pgd.npz", x=images[:2], y=np.array([0, 1]), index=np.array([0, 2]))
        return writer.finish(manifest())


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = write(tmp_path / "m.resq")
    bundle = Bundle.open(tmp_path / "m.resq")
    assert bundle.manifest == written.manifest
    assert bundle.int8.read_bytes() == graph("int8")
    sample = bundle.eval_sample()
    assert sample.images.shape == (3, 1, 4, 4)
    assert sample.labels.tolist() == [0, 1, 0]
    attacked, spec = bundle.attack_sample("pgd")
    assert spec.eps == 0.1
    assert attacked.indices.tolist() == [0, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["m.resq"]


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.resq"), write(tmp_path / "deep" / "er" / "two.resq")
    assert one.manifest.files == two.manifest.files


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with BundleWriter(tmp_path / "m.resq") as writer:
            (writer.dir / "half").write_text("written")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def noise(writer: BundleWriter) -> None:
    writer.save_npz("eval.npz", x=np.random.default_rng(0).random((64, 1, 32, 32)))


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to write beyond so many bytes of a file, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match=r"cannot write .*m\.resq: File too large \(free some"),
        files_up_to(20_000),
        BundleWriter(tmp_path / "m.resq") as writer,
    ):
        noise(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_disk_that_is_full_at_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    before = write(tmp_path / "m.resq") if force else None

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BundleError, match="No space left") as told:
        write(tmp_path / "m.resq", force=force)
    assert "\n" not in str(told.value)
    assert [p.name for p in tmp_path.iterdir()] == (["m.resq"] if force else [])
    if before is not None:
        assert Bundle.open(tmp_path / "m.resq").manifest == before.manifest


def test_a_bundle_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write(tmp_path / "m.resq")
    rename, calls = os.rename, list[str]()

    def second_fails(source: Any, target: Any) -> None:
        calls.append(str(target))
        if len(calls) == 2:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(BundleError, match="Permission denied"):
        write(tmp_path / "m.resq", force=True)
    assert len(calls) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["m.resq"]
    assert Bundle.open(tmp_path / "m.resq").manifest == before.manifest


def test_other_errors_of_the_system_are_not_ours_to_explain(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), BundleWriter(tmp_path / "m.resq"):
        (tmp_path / "nowhere").read_bytes()
    with (
        pytest.raises(BundleError, match="No such file"),
        BundleWriter(tmp_path / "m.resq") as writer,
    ):
        (writer.dir / "no" / "folder").write_bytes(b"")


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot write"):
        check_free(tmp_path / ("a" * 300))
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path / ("a" * 300))


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "m.resq"
    write(path)
    with pytest.raises(BundleError, match="--force"):
        write(path)
    (path / "stale").write_text("from before")
    write(path, force=True)
    assert not (path / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m.resq"]


def test_force_replaces_bundles_only(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("dear")
    with pytest.raises(BundleError, match="not a bundle"):
        check_free(tmp_path / "home", force=True)


@pytest.mark.parametrize("name", ["model.int8.onnx", "eval.npz", "attacks/pgd.npz"])
def test_a_changed_byte_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "m.resq").path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=name):
        Bundle.open(tmp_path / "m.resq")


@pytest.mark.parametrize("name", ["model.int8.onnx", "eval.npz", "attacks/pgd.npz"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    (write(tmp_path / "m.resq").path / name).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        Bundle.open(tmp_path / "m.resq")


def test_a_link_is_no_file_of_a_bundle(tmp_path: Path) -> None:
    path = write(tmp_path / "m.resq").path / "model.int8.onnx"
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError):
        Bundle.open(tmp_path / "m.resq")


def _edit(path: Path, **changes: Any) -> None:
    raw = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(raw | changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"surprise": 1}, "surprise"),
        ({"classes": []}, "classes"),
        ({"files": {"../../etc/passwd": {"sha256": ZERO, "size": 0}}}, "no file"),
        ({"files": {}}, "does not list"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / "m.resq").path
    _edit(path, **change)
    with pytest.raises(BundleError, match=said):
        Bundle.open(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "m.resq").path
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(path)


def test_something_else_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(tmp_path)


def test_a_folder_that_cannot_be_written_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "access", lambda *_: False
    )  # root may write anywhere, so chmod would not do
    with pytest.raises(BundleError, match="cannot be written"):
        check_free(tmp_path / "m.resq")


def test_a_file_in_the_way_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        check_free(tmp_path / "file" / "m.resq")


@pytest.mark.parametrize("name", ["a", "a/b.npz", "engines/x.plan"])
def test_names_inside(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/a", "a/../b", "../a", "a//b", "a\\b", "C:/a", "a/./b", "a\0"]
)
def test_names_that_could_leave(name: str) -> None:
    assert not is_inside(name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=4, max_dims=4, max_side=4)))
def test_eight_bit_pixels_are_stored_as_such(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    images = as_pixels(pixels)
    stored = compact(images)
    assert stored.dtype == np.uint8
    write_npz(tmp_path / "x.npz", {"x": stored})
    assert np.array_equal(as_pixels(read_npz(tmp_path / "x.npz")["x"]), images)


def test_other_pixels_stay_float() -> None:
    assert compact(np.full((1, 1, 1, 1), 0.1234, np.float32)).dtype == np.float32


def test_pickles_and_false_sizes_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", x=np.array([{}], dtype=object))
    with pytest.raises(BundleError):
        read_npz(tmp_path / "p.npz")
    write_npz(tmp_path / "x.npz", {"x": np.zeros((2, 3), np.float32)})
    raw = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "y.npz").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BundleError):
        read_npz(tmp_path / "y.npz")
