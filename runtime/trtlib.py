"""TensorRT and TensorRT-RTX as one library: the module, a log that is kept, and what its messages mean.

Both have one Python API. Whatever goes wrong inside them is told in log lines written for their
developers, while the call returns None; `refusal` turns those lines into one a user can act on.
"""

from __future__ import annotations

import importlib
import re
import weakref
from typing import Any

from resq_deploy.errors import BackendError, ExecutionError, MissingExtra

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}

_NO_GPU = re.compile(
    r"cudaError(_t)? ?\(?(35|100|999)\b|CUDA initialization failure|CUDA_ERROR_NO_DEVICE"
    r"|no CUDA-capable device|driver version is insufficient",
    re.I,
)
_OF_PLANS = (  # of a plan that was altered by faults, these are what came of them
    (
        re.compile(
            r"magicTag|Version tag does not match|stdVersionRead|expecting library version|VERSION_MISMATCH"
        ),
        "the plan was written by another version of {title} than the one installed ({version})",
        "build it again with this version: resq-export --target {backend}; plans are tied to a version",
    ),
    (
        re.compile(
            r"incompatible device|different models? of devices|compute capabilit|UNSUPPORTED_CC",
            re.I,
        ),
        "the plan was built for another GPU: {detail}",
        "build it for this one: resq-export --target {backend}",
    ),
    (
        re.compile(
            r"header\.size == blobSize|Unexpected end|size mismatch|plan file.*corrupt|MALFORMED_ENGINE",
            re.I,
        ),
        "the plan is cut short or altered: its size is not what its header says",
        "copy the whole bundle again, or export the model again",
    ),
)
_OF_MACHINES = (
    (
        re.compile(r"out ?of ?memory|OutOfMemory|INSUFFICIENT_GPU_MEMORY", re.I),
        "{title} ran out of GPU memory",
        "use a smaller batch, or stop what else uses the GPU",
    ),
    (
        re.compile(r"OLD_CUDA_(DRIVER|RUNTIME)"),
        "the plan needs a newer NVIDIA driver than the one installed",
        "update the driver, or build the plan again here: resq-export --target {backend}",
    ),
    (
        re.compile(r"engine_?host_?code|host code", re.I),
        "the plan is version compatible: it brings host code, which runs once the plan is loaded",
        "where you trust it: --allow-host-code, or open_runner(..., allow_host_code=True)",
    ),
)


def library(backend: str) -> Any:
    """The Python module of a backend. Raises MissingExtra where it is not installed."""
    try:
        return importlib.import_module(LIBRARIES[backend])
    except ModuleNotFoundError as error:
        raise MissingExtra(TITLES[backend], backend) from error
    except ImportError as error:
        raise BackendError(
            f"{TITLES[backend]} is installed but does not load: {error}",
            f"pip install --force-reinstall 'resq-deploy[{backend}]'",
        ) from error


class Log:
    """Keeps what the library says from now on. `logger` is the object to hand to it.

    While any builder or runtime lives, the library ignores every other logger than the first, so all
    share one per process, and each Log hears it.
    """

    def __init__(self, module: Any) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self.logger = _logger(module)
        self.logger.heard_by.add(self)

    def clear(self) -> None:
        """Forget what was said so far."""
        self.lines.clear()
        self.warnings.clear()


_LOGGERS: dict[Any, Any] = {}  # ILogger class of a library -> its one logger


def _logger(module: Any) -> Any:
    base, severity = module.ILogger, module.ILogger.Severity
    if base in _LOGGERS:
        return _LOGGERS[base]

    class Logger(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.heard_by: weakref.WeakSet[Log] = weakref.WeakSet()

        def log(self, level: Any, message: str) -> None:
            for log in list(self.heard_by):
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    log.lines.append(message)
                elif level == severity.WARNING:
                    log.warnings.append(message)

    return _LOGGERS.setdefault(base, Logger())


def refusal(backend: str, version: str, doing: str, lines: list[str]) -> BackendError:
    """The error that the library's log lines amount to; `doing`: what was asked of it, such as "load the plan".

    An ExecutionError where what it was given may be the reason; another BackendError where the machine is.
    """
    title = TITLES[backend]
    told = [line for line in lines if not line.startswith("[checkMacros")] or lines
    text = " ".join(told)
    for kind, rules in ((ExecutionError, _OF_PLANS), (BackendError, _OF_MACHINES)):
        for pattern, message, hint in rules:
            if pattern.search(text):
                detail = next((plain(line) for line in told if pattern.search(line)), "")
                given = {"title": title, "version": version, "backend": backend, "detail": detail}
                return kind(message.format(**given), hint.format(**given))
    if _NO_GPU.search(" ".join(lines)):
        return no_gpu(backend, doing)
    detail = plain(told[0]) if told else "it gives no reason"
    return ExecutionError(f"{title} {version} could not {doing}: {detail}")


def diagnosis(module: Any, runtime: Any, plan: bytes | bytearray) -> list[str]:
    """Names of what the library finds wrong with a plan, such as UNSUPPORTED_CC. Older libraries cannot be asked."""
    kinds = getattr(module, "EngineInvalidityDiagnostics", None)
    if kinds is None or not hasattr(runtime, "get_engine_validity"):
        return []
    _, found = runtime.get_engine_validity(plan)
    return [name for name, kind in kinds.__members__.items() if int(kind) & int(found)]


def no_gpu(backend: str, doing: str) -> BackendError:
    """The error for a machine without an NVIDIA GPU, or without a driver recent enough."""
    hint = "run it where nvidia-smi shows a GPU (in Docker: --gpus all), or use --backend ort"
    if doing.startswith("build"):
        hint = "build there, or use --target tensorrt-rtx, which builds on any machine"
    return BackendError(
        f"{TITLES[backend]} needs an NVIDIA GPU with its driver to {doing}; none was found", hint
    )


def plain(message: str) -> str:
    """A log line without source positions, function names and wrappers."""
    text = message.strip().split("\n")[0]
    text = re.sub(r"\s*In (\w|::|<|>|~|\(\))+ at \S+?:\d+\)?.*$", "", text)
    text = re.sub(r"^\S*IBuilder::\w+: |^\S*IRuntime::\w+: |^I\w+::\w+: ", "", text)
    text = re.sub(
        r"Error Code \d+: (Myelin|API Usage Error|Internal Error|Serialization) ?", "", text
    )
    text = re.sub(r"\[\w+\.\w+:\d+: \w+\] ?", "", text)
    return text.strip(" ()").rstrip(".")
