"""A bundle that travels with the engine that opens it, to machines that do not have it on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resq_deploy.bundle import Bundle, is_inside
from resq_deploy.runtime.trials import EngineFactory, TrialEngine


@dataclass(frozen=True, slots=True)
class Shipped:
    """An engine factory whose bundle travels with it, for machines that do not have it on disk."""

    factory: Any
    files: dict[str, bytes]
    sha: str

    def __call__(self, threads: int) -> TrialEngine:
        """Unpack the bundle, once for each machine, and open the engine."""
        engine: TrialEngine = replace(self.factory, bundle=str(self._unpack()))(threads)
        return engine

    def _unpack(self) -> Path:
        user = os.getuid() if hasattr(os, "getuid") else 0
        base = Path(tempfile.gettempdir()) / f"resq-deploy-{user}"
        target = base / self.sha
        if not target.is_dir():
            base.mkdir(mode=0o700, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=base) as folder:
                for name, content in self.files.items():
                    path = Path(folder) / "bundle" / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                try:
                    os.rename(Path(folder) / "bundle", target)
                except OSError:  # another worker of this machine was first
                    if not target.is_dir():
                        raise
        Bundle.open(target)
        return target


def ship(factory: EngineFactory) -> EngineFactory:
    """A factory that can be opened on a machine without our disk: with its bundle, if it has one."""
    path: Any = getattr(factory, "bundle", None)
    if not isinstance(path, str):
        return factory
    root = Path(path)
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    files = {name: (root / name).read_bytes() for name in names if is_inside(name)}
    sha = hashlib.sha256()
    for name, content in files.items():
        sha.update(f"{name}\0{len(content)}\0".encode())
        sha.update(content)
    return Shipped(factory, files, sha.hexdigest())
