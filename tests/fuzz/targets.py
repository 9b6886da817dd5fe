"""What is fuzzed: each reader of outside data, as a function of bytes that may only raise ResqError."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resq_deploy.bundle import Bundle
from resq_deploy.errors import BackendError, ResqError
from resq_deploy.fault_lists import read_fault_list
from resq_deploy.faults import FaultSpace, Memory
from resq_deploy.manifest import parse_manifest
from resq_deploy.memory import fault_space
from resq_deploy.npz import read_npz
from resq_deploy.onnx_file import read_onnx
from resq_deploy.report import read_report
from resq_deploy.requirements import parse
from resq_deploy.runtime import faulty
from resq_deploy.runtime.plan import PlanMap
from resq_deploy.runtime.trt import find_engine
from resq_deploy.runtime.trtlib import TITLES
from resq_deploy.signing import check_signature, generate_key
from tests.bundles import write_bundle
from tests.report import example

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = frozenset(
    {
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.symlink",
        "os.link",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "subprocess.Popen",
        "socket.connect",
        "pickle.find_class",
        "shutil.rmtree",
    }
)


class Escape(BaseException):
    """A reader wrote, ran or fetched something. No `except Exception` hides it."""


@dataclass(frozen=True)
class Target:
    """One reader, and files that it reads without complaint to start from."""

    name: str
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def targets(folder: Path) -> dict[str, Target]:
    """All targets, working in a folder of their own."""
    bundle = write_bundle(folder / "net.resq", faulty=True)
    private, public = generate_key(folder / "key")
    root = bundle.path

    def content(name: str) -> bytes:
        return (root / name).read_bytes()

    found = [
        Target("manifest", _manifest(bundle), _manifests(content("manifest.json"))),
        Target("fault-list", _on_file(folder / "list", _fault_list), _LISTS),
        Target("npz", _npz(bundle, folder / "x.npz"), (b"\0" + content("eval.npz"), *_NPYS)),
        Target("onnx", _on_file(folder / "x.onnx", _onnx), (content("model.int8.onnx"),)),
        Target(
            "plan-map",
            _on_file(folder / "x.json", _plan_map(content("engines/host.plan"))),
            (content("engines/host.weights.json"),),
        ),
        Target(
            "report",
            _on_file(folder / "report.json", _report),
            tuple(
                example.report(campaigns=example.report().campaigns[part])
                .model_dump_json()
                .encode()
                for part in (slice(0, 0), slice(0, 1), slice(11, 13))
            ),
        ),
        Target("requirement", _requirement, (b"low(accuracy@ber=1e-4) >= 85%",)),
        Target("signature", _signature(folder, public), (b"\0" * 64, private.read_bytes())),
    ]
    return {target.name: target for target in found}


class Guard:
    """Inside `with guard:` any write outside `folder` is an Escape, and so is all that starts, fetches or unpickles.

    One hook stays in the process for good (Python cannot remove it), and does nothing outside the block.
    """

    def __init__(self, folder: Path) -> None:
        self._allowed = str(folder.resolve()) + os.sep
        self._on = False
        sys.addaudithook(self._watch)

    def __enter__(self) -> None:
        self._bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        self._on = True

    def __exit__(self, *_: object) -> None:
        self._on = False
        sys.dont_write_bytecode = self._bytecode

    def _watch(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in _FORBIDDEN:
            raise Escape(f"{event} {args}")
        if event == "open" and isinstance(args[2], int) and args[2] & _WRITING:
            path = "" if isinstance(args[0], int) else os.path.realpath(os.fsdecode(args[0]))
            if path and not path.startswith(self._allowed):
                raise Escape(f"open for writing: {path}")


def _manifest(bundle: Bundle) -> Callable[[bytes], None]:
    """A manifest, the files that it names, and the faults that its attacks were crafted against."""
    space = fault_space(bundle.int8)

    def run(data: bytes) -> None:
        found = Bundle(bundle.path, parse_manifest(data, bundle.path / "manifest.json"))
        found.verify()
        for backend in TITLES:
            with contextlib.suppress(
                BackendError
            ):  # no such plan, or several: the attacks are still read
                find_engine(found.manifest.engines, backend, None)
        for name in faulty.sets(found):
            faulty.stored(found, name)
            attack = found.manifest.attacks[name]
            faulty.figure_name(attack)
            if attack.faulty is not None:
                list(faulty.draw(attack.faulty, space))

    return run


def _manifests(plain: bytes) -> tuple[bytes, ...]:
    """As it is; and as one whose engine has weights that were not located."""
    known = json.loads(plain)
    name = next(iter(known["quantization"]["weights"]))
    known["engines"]["host"] |= {"coverage": 0.5, "unlocated": {name: "its bytes are elsewhere"}}
    return plain, json.dumps(known).encode()


def _on_file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return run


def _space() -> FaultSpace:
    return FaultSpace([Memory("w", "layer", "weights", np.zeros(16, np.int8))])


def _fault_list(path: Path) -> None:
    found = read_fault_list(path)
    found.check(_space())
    for trial in range(len(found.trials)):
        found.trial(_space(), 0, trial)


def _npz(bundle: Bundle, path: Path) -> Callable[[bytes], None]:
    """First byte even: the rest is a whole npz. Odd: the rest is one array, in a zip whose checksums are right."""
    from resq_deploy.samples import sample_of

    def run(data: bytes) -> None:
        body = data[1:]
        if data[:1] and data[0] & 1:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("x.npy", body)
                archive.writestr("y.npy", _NPY)
            body = buffer.getvalue()
        path.write_bytes(body)
        sample_of(path, read_npz(path), bundle.manifest)

    return run


def _onnx(path: Path) -> None:
    fault_space(read_onnx(path))


def _plan_map(plan: bytes) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        found = PlanMap.load(path)
        _ = found.coverage, found.shared
        if found.size != len(plan):
            return
        for name, placement in found.tensors.items():
            found.read(plan, name)
            found.offset(name, np.arange(min(int(np.prod(placement.shape)), 64)))

    return read


def _report(path: Path) -> None:
    from resq_deploy.report.files import faces

    faces(read_report(path))


def _requirement(data: bytes) -> None:
    parse(data.decode("utf-8", "replace"))


def _signature(folder: Path, public: Path) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        (folder / "manifest.sig").write_bytes(data)
        (folder / "odd.pub").write_bytes(data)
        for key in (public, folder / "odd.pub"):
            try:
                check_signature(b"{}", folder / "manifest.sig", key)
            except ResqError:
                continue
            raise AssertionError("a forged signature fits")

    return run


_LISTS = (
    b'{"tensor": "w", "element": 3, "bit": 7}\n{"tensor": "w", "element": 4, "bit": 0}\n',
    b'{"tensor": "w", "element": 3, "bit": 7, "trial": 0}\n'
    b'{"tensor": "w", "element": 3, "bit": 6, "trial": 0}\n',
)


def _npy_bytes(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


_NPY = _npy_bytes(np.array([0, 1], dtype=np.int64))
_NPYS = (
    b"\1" + _npy_bytes(np.zeros((2, 3, 8, 8), np.float32)),
    b"\1" + _npy_bytes(np.zeros((2, 3, 8, 8), np.uint8)),
)
