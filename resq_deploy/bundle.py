"""Bundle: the directory that is deployed and validated. Written atomically, read only after its hashes match."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from resq_deploy.errors import BundleError, IntegrityError
from resq_deploy.manifest import Attack, FileEntry, Manifest, parse_manifest
from resq_deploy.npz import read_npz, write_npz
from resq_deploy.onnx_file import read_onnx
from resq_deploy.samples import Sample, as_pixels, compact, sample_of
from resq_deploy.signing import SIGNATURE, check_signature

__all__ = [
    "EVAL",
    "FP32",
    "INT8",
    "MANIFEST",
    "Bundle",
    "BundleWriter",
    "Sample",
    "as_pixels",
    "check_free",
    "compact",
    "is_inside",
    "read_npz",
    "sha256_of",
    "write_npz",
]

MANIFEST = "manifest.json"
INT8 = "model.int8.onnx"
FP32 = "model.fp32.onnx"
EVAL = "eval.npz"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_MANIFEST_LIMIT = 32 * 2**20  # bytes read before anything is parsed


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    sha = hashlib.sha256()
    while block := file.read(2**20):
        sha.update(block)
    return sha.hexdigest()


class Bundle:
    """A bundle on disk. `Bundle.open` verifies every file's size and sha256 before anything else reads it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: bool = True,
        key: str | os.PathLike[str] | None = None,
    ) -> Bundle:
        """Open a bundle.

        `key`: a public Ed25519 key (PEM); the signature over the manifest is then checked before anything is parsed.
        Raises BundleError (not a bundle, unknown schema) or IntegrityError (missing or changed file, wrong signature).
        """
        root = Path(path)
        if not _is_folder(root):
            raise BundleError(
                f"{root} is not a bundle", "a bundle is the directory that resq-export writes"
            )
        content = _manifest_bytes(root / MANIFEST)
        if key is not None:
            check_signature(content, root / SIGNATURE, key)
        bundle = cls(root, parse_manifest(content, root / MANIFEST))
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Compare every file with the manifest, and refuse graphs that reach outside it.

        Raises IntegrityError at the first missing or changed file.
        """
        for name, entry in self.manifest.files.items():
            path = self.file(name)
            if not _is_the_file(path, entry):
                raise IntegrityError(
                    f"{path} is not the file that the manifest names", "export the model again"
                )
            if name.endswith(".onnx"):
                read_onnx(path)
        listed = {*self.manifest.files, MANIFEST}
        for name in ("model.int8.onnx", EVAL):
            if name not in listed:
                raise IntegrityError(
                    f"{self.path / MANIFEST} does not list {name}", "export the model again"
                )

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists. Raises IntegrityError when it is not listed, missing, or a link."""
        if name not in self.manifest.files or not is_inside(name):
            raise IntegrityError(f"{self.path} has no file {name!r}", "export the model again")
        path = self.path / name
        if not _is_plain_file(self.path, name):
            raise IntegrityError(
                f"{path} is missing, or is a link",
                "copy the whole bundle, or export the model again",
            )
        return path

    @property
    def int8(self) -> Path:
        """The deployed graph, model.int8.onnx."""
        return self.file(INT8)

    @property
    def fp32(self) -> Path:
        """The FP32 graph that it came from, model.fp32.onnx."""
        return self.file(FP32)

    def eval_sample(self) -> Sample:
        """The held-out sample that travels with the bundle."""
        arrays = read_npz(self.file(EVAL))
        return sample_of(self.path / EVAL, arrays, self.manifest)

    def attack_sample(self, name: str) -> tuple[Sample, Attack]:
        """A stored set of adversarial inputs and what made it. Raises BundleError when it is not this bundle's."""
        spec = self.manifest.attacks.get(name)
        if spec is None:
            known = ", ".join(self.manifest.attacks) or "none"
            raise BundleError(f"{self.path} has no stored attack {name!r}", f"stored: {known}")
        path = self.file(f"attacks/{name}.npz")
        return sample_of(path, read_npz(path), self.manifest), spec


class BundleWriter:
    """Writes a bundle into a folder beside its final place, and moves it there in one step.

    with BundleWriter(path) as writer:
        ... files under writer.dir ...
        writer.finish(manifest)

    Left without `finish` (an error, Ctrl-C) nothing stays behind, and a bundle that was to be replaced
    stays. Raises BundleError where `path` exists (unless `force`) or cannot be written, also when the
    disk is full in the midst of it.
    """

    def __init__(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        self.path = Path(path)
        self.force = force
        check_free(self.path, force=force)

    def __enter__(self) -> BundleWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.dir = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
            self.dir.chmod(0o755)
        except OSError as error:
            raise BundleError(
                f"cannot write {self.path}: {error.strerror}", "choose another -o"
            ) from error
        return self

    def save_npz(self, name: str, **arrays: NDArray[Any]) -> None:
        """Write arrays to `name` in the bundle; the same arrays give the same bytes."""
        write_npz(self.dir / name, arrays)

    def finish(self, manifest: Mapping[str, Any]) -> Bundle:
        """Hash all files, write the manifest (everything but `files` is given) and put the bundle in its place."""
        names = sorted(
            p.relative_to(self.dir).as_posix() for p in self.dir.rglob("*") if p.is_file()
        )
        files = {
            n: FileEntry(sha256=sha256_of(self.dir / n), size=(self.dir / n).stat().st_size)
            for n in names
        }
        checked = Manifest.model_validate({**manifest, "files": files})
        (self.dir / MANIFEST).write_text(checked.model_dump_json(indent=1) + "\n", encoding="utf-8")
        _replace(self.dir, self.path, force=self.force)
        return Bundle(self.path, checked)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.dir, ignore_errors=True)
        if isinstance(error, OSError) and self._is_ours(error):
            raise BundleError(
                f"cannot write {self.path}: {error.strerror or error}",
                "free some space, or choose another -o",
            ) from error

    def _is_ours(self, error: OSError) -> bool:
        """Whether it was a file of this bundle that could not be written: a full disk does not say which."""
        named = (
            Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
        )
        return error.errno in _NO_ROOM or (named is not None and self.dir in named.parents)


def check_free(path: Path, *, force: bool = False) -> None:
    """Raise BundleError unless an output can be made at `path`; asked before any long work."""
    try:
        _check_free(path, force=force)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise BundleError(f"cannot write {path}: {error.strerror}", "choose another -o") from error


def _check_free(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise BundleError(
            f"{path} exists already", "choose another -o, or overwrite it with --force"
        )
    if path.exists() and not (path.is_dir() and (path / MANIFEST).exists()):
        raise BundleError(
            f"{path} is not a bundle, so --force does not replace it", "choose another -o"
        )
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BundleError(f"{parent} cannot be written to", "choose another -o")


def is_inside(name: str) -> bool:
    """Whether a file name of a manifest stays inside the bundle: relative, plain, no `..`."""
    pure = PurePosixPath(name)
    plain = name == pure.as_posix() and "\\" not in name and "\0" not in name and ":" not in name
    return plain and not pure.is_absolute() and pure.parts != () and ".." not in pure.parts


def _is_plain_file(root: Path, name: str) -> bool:
    """Whether this is a file, reached through no link: a link could lead outside the bundle."""
    try:
        steps = [
            root.joinpath(*PurePosixPath(name).parts[: i + 1]) for i in range(name.count("/") + 1)
        ]
        return not any(step.is_symlink() for step in steps) and steps[-1].is_file()
    except (OSError, ValueError):
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False


def _is_the_file(path: Path, entry: FileEntry) -> bool:
    try:
        return path.stat().st_size == entry.size and sha256_of(path) == entry.sha256
    except OSError:
        return False


def _manifest_bytes(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path.parent} is not a bundle: it has no {MANIFEST}")
    try:
        with path.open("rb") as file:
            content = file.read(_MANIFEST_LIMIT + 1)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > _MANIFEST_LIMIT:
        raise BundleError(f"{path} is too large to be a manifest")
    return content


def _replace(source: Path, target: Path, *, force: bool) -> None:
    try:
        if force and target.exists():
            old = source.with_name(source.name + ".old")
            os.rename(target, old)
            try:
                os.rename(source, target)
            except OSError:
                os.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(source, target)
    except OSError as error:
        raise BundleError(
            f"cannot write {target}: {error.strerror}", "choose another -o"
        ) from error
