"""What an engine can be asked for, checked before any long work begins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resq_deploy.errors import BackendError
from resq_deploy.runtime.trtlib import TITLES, library

Batch = tuple[int, int, int]

BATCH: Batch = (1, 8, 64)  # of an engine that nobody asked another one for
_MOST_BYTES = 2**63 - 1  # what the libraries' interface takes
_CLASSIC_ONLY = ("timing_cache", "version_compatible", "hardware_compatible")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a builder works; the defaults are the library's.

    `workspace`: bytes of GPU memory a layer may use while it runs. `optimization_level`: 0 (fast to build) to 5.
    `refit`: weights can be replaced later (TensorRT-RTX needs a GPU to build so). For TensorRT only:
    `timing_cache`, a file that is read and updated; `version_compatible`, the plan runs on later versions of the
    same major (it then brings host code, see docs/gpu.md); `hardware_compatible`, on Ampere and later.
    """

    workspace: int | None = None
    timing_cache: str | os.PathLike[str] | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    refit: bool = False
    optimization_level: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not the library's defaults."""
        return {key: value for key, value in asdict(self).items() if value not in (None, False)}

    def without_classic(self) -> EngineOptions:
        """The options that TensorRT-RTX has too."""
        return EngineOptions(**{k: v for k, v in self.given.items() if k not in _CLASSIC_ONLY})


@dataclass(frozen=True, slots=True)
class Request:
    """One engine to build. Raises BackendError for what the backend does not have."""

    backend: str
    batch: Batch
    sm: tuple[str, ...]
    options: EngineOptions

    def __post_init__(self) -> None:
        if self.backend not in TITLES:
            raise BackendError(f"unknown engine {self.backend!r}", f"one of: {', '.join(TITLES)}")
        _check_numbers(self.batch, self.options)
        if self.backend == "tensorrt" and self.sm:
            raise BackendError(
                "TensorRT builds for the GPU it runs on; --sm is for TensorRT-RTX",
                "--target tensorrt-rtx, or leave --sm out",
            )
        if self.backend == "tensorrt-rtx":
            for name in _CLASSIC_ONLY:
                if getattr(self.options, name):
                    raise BackendError(
                        f"TensorRT-RTX has no {name.replace('_', ' ')}", "--target tensorrt"
                    )

    def capabilities(self, module: Any) -> tuple[str, ...]:
        """Names of ComputeCapability: 86, "8.6", "sm_86", "SM86" -> "SM86". Raises BackendError for unknown ones."""
        if not self.sm:
            return ()
        known = sorted(
            (n for n in module.ComputeCapability.__members__ if n.startswith("SM")),
            key=lambda name: int(name[2:]),
        )
        names = []
        for given in self.sm:
            digits = given.lower().removeprefix("sm").lstrip("_").replace(".", "")
            if f"SM{digits}" not in known:
                numbers = ", ".join(name[2:] for name in known)
                raise BackendError(
                    f"TensorRT-RTX {module.__version__} does not know SM {given}",
                    f"it knows {numbers}",
                )
            names.append(f"SM{digits}")
        return tuple(dict.fromkeys(names))


def requests(
    targets: Sequence[str], batch: Batch, sm: Sequence[str | int], options: EngineOptions
) -> tuple[Request, ...]:
    """One request for each engine among `targets` (`onnx` is none), in their order, each once.

    `sm` goes to TensorRT-RTX, and options that only TensorRT has to TensorRT, where both are asked for.
    Raises BackendError for a target that does not exist or has no such option, for options of engines where none
    is asked for, and MissingExtra where a library is not installed.
    """
    engines = [name for name in dict.fromkeys(targets) if name != "onnx"]
    for name in engines:
        if name not in TITLES:
            known = ", ".join(("onnx", *TITLES))
            raise BackendError(f"unknown target {name!r}", f"one of: {known}")
    asked = [*(["sm"] if sm else []), *options.given, *(["batch"] if batch != BATCH else [])]
    if asked and not engines:
        flag = asked[0].replace("_", "-")
        raise BackendError(f"--{flag} is for engines", "name one: --target tensorrt-rtx")
    made = [_request(name, engines, batch, tuple(str(s) for s in sm), options) for name in engines]
    for request in made:
        request.capabilities(library(request.backend))
    return tuple(made)


def _request(
    name: str, engines: Sequence[str], batch: Batch, sm: tuple[str, ...], options: EngineOptions
) -> Request:
    if len(engines) == 1:
        return Request(name, batch, sm, options)
    if name == "tensorrt":
        return Request(name, batch, (), options)
    return Request(name, batch, sm, options.without_classic())


def read_cache(path: Path) -> bytes:
    """A timing cache; empty where there is none yet. Raises BackendError."""
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise BackendError(
            f"cannot read the timing cache {path}: {error.strerror}", "name a file"
        ) from error


def _check_numbers(batch: Batch, options: EngineOptions) -> None:
    low, best, high = batch
    if not 1 <= low <= best <= high:
        raise BackendError(
            f"a batch of {low}:{best}:{high}", "smallest:best:largest, such as 1:8:32"
        )
    level, workspace = options.optimization_level, options.workspace
    if level is not None and not 0 <= level <= 5:
        raise BackendError(f"optimization level {level}", "0 to 5")
    if workspace is not None and not 1 <= workspace <= _MOST_BYTES:
        raise BackendError(f"a workspace of {workspace} bytes", "a positive size, such as 2G")
