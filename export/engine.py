"""INT8 ONNX -> plan: one code path for TensorRT (10 and 11) and TensorRT-RTX.

Strongly typed, so that precision is what the Q/DQ nodes say. The plan is written as the library
gives it: `trtexec --loadEngine` takes it.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resq_deploy.console import Reporter
from resq_deploy.errors import BackendError
from resq_deploy.export.engine_options import Batch, EngineOptions, Request, read_cache
from resq_deploy.export.engine_progress import progress
from resq_deploy.manifest import Engine
from resq_deploy.memory import fault_space
from resq_deploy.runtime.plan import PlanMap, locate
from resq_deploy.runtime.trtlib import TITLES, Log, library, no_gpu, plain, refusal


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """A plan that was built, and what for.

    `built_for`: JSON types only: `sm` (TensorRT-RTX) or `gpu` and `compute_capability` (TensorRT), `batch`
    (min, opt, max), options that differ from the default.
    """

    backend: str
    version: str
    built_for: dict[str, Any]
    path: Path
    size: int
    warnings: tuple[str, ...] = ()


def build_engine(
    onnx_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    backend: str = "tensorrt-rtx",
    batch: Batch = (1, 8, 32),
    sm: Sequence[str | int] = (),
    workspace: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    refit: bool = False,
    optimization_level: int | None = None,
    reporter: Reporter | None = None,
) -> EngineInfo:
    """Build a plan from an explicit-QDQ ONNX file and write it.

    `batch`: smallest, best and largest batch of the optimization profile; an input with a fixed batch keeps it.
    `sm`: compute capabilities for TensorRT-RTX (86, "8.9", "SM120"; none: the library's default set).
    `workspace` in bytes. For TensorRT only: `timing_cache`, a file that is read and updated;
    `version_compatible`, `hardware_compatible` (Ampere and later). `refit`: weights can be replaced later, by
    `TrtRunner.open(..., injection="refit")` (TensorRT-RTX needs a GPU for it). `optimization_level` 0 to 5.

    Raises MissingExtra (library not installed) or BackendError: no GPU where one is needed, an unknown
    SM, a node the parser refuses, an option the backend does not have, a file that cannot be written.
    """
    options = EngineOptions(
        workspace, timing_cache, version_compatible, hardware_compatible, refit, optimization_level
    )
    request = Request(backend, batch, tuple(str(s) for s in sm), options)
    module = library(backend)
    builder = _Builder(module, request, Log(module), reporter or Reporter())
    plan = builder.build(Path(onnx_path))
    _write(Path(out_path), plan)
    return EngineInfo(
        backend, module.__version__, builder.built_for(), Path(out_path), len(plan),
        tuple(dict.fromkeys(plain(line) for line in builder.log.warnings)),
    )  # fmt: skip


def add_engine(
    folder: str | os.PathLike[str],
    onnx_path: str | os.PathLike[str],
    *,
    backend: str = "tensorrt-rtx",
    name: str | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> tuple[str, Engine]:
    """Build a plan and its weight map into a bundle: engines/NAME.plan and engines/NAME.weights.json.

    `name`: default, the backend's. `options` and errors are those of `build_engine`. Returns the name and the
    manifest's entry. Weights that were not located are named in a warning: no fault reaches them in this plan.
    """
    say = reporter or Reporter()
    engines = Path(folder) / "engines"
    engines.mkdir(parents=True, exist_ok=True)
    chosen = name or backend
    path = engines / f"{chosen}.plan"
    info = build_engine(onnx_path, path, backend=backend, reporter=say, **options)
    found = map_engine(path, onnx_path)
    found.save(engines / f"{chosen}.weights.json")
    say.log(
        f"{path.name}: {info.size / 2**20:.1f} MiB, {found.coverage:.2%} of the weights located"
    )
    unlocated = {tensor: missing.reason for tensor, missing in found.unlocated.items()}
    for tensor, reason in unlocated.items():
        say.warn(f"{path.name}: {tensor} was not located, {reason}; no fault reaches it there")
    return chosen, Engine(
        backend="tensorrt" if backend == "tensorrt" else "tensorrt-rtx",
        version=info.version,
        built_for=info.built_for,
        coverage=found.coverage,
        unlocated=unlocated,
    )


def add_requested(
    folder: str | os.PathLike[str],
    onnx_path: str | os.PathLike[str],
    wanted: Sequence[Request],
    reporter: Reporter | None = None,
) -> dict[str, Engine]:
    """`add_engine` for each request, named after its backend: the manifest's new entries."""
    return dict(
        add_engine(
            folder,
            onnx_path,
            backend=request.backend,
            batch=request.batch,
            sm=request.sm,
            reporter=reporter,
            **request.options.given,
        )
        for request in wanted
    )


def map_engine(plan: str | os.PathLike[str], onnx_path: str | os.PathLike[str]) -> PlanMap:
    """The map of the INT8 weights of an ONNX file in a plan that was built from it."""
    weights = {m.name: m.value for m in fault_space(onnx_path).memories if m.kind == "weights"}
    return locate(Path(plan).read_bytes(), weights)


class _Builder:
    """One build: network, configuration, plan. The library's objects live as long as this."""

    def __init__(self, module: Any, request: Request, log: Log, reporter: Reporter) -> None:
        self.trt, self.log, self.reporter = module, log, reporter
        self.backend, self.options = request.backend, request.options
        self.sm = request.capabilities(module)
        try:
            self.builder = module.Builder(log.logger)
        except TypeError as error:  # pybind11: the factory gave a null pointer
            raise no_gpu(request.backend, "build an engine") from error
        self.batch = request.batch

    def build(self, onnx_path: Path) -> bytes:
        network = self._parse(onnx_path)
        config = self.builder.create_builder_config()
        self._configure(config)
        self._profile(network, config)
        with progress(self.trt, config, self.reporter) as monitor:
            plan = self.builder.build_serialized_network(network, config)
        if monitor.cancelled:
            raise KeyboardInterrupt
        if plan is None:
            raise self._refused(config)
        self._keep_timings(config)
        return bytes(plan)

    def built_for(self) -> dict[str, Any]:
        """What the manifest says of the plan."""
        target = (
            {"sm": list(self.sm) or "default"} if self.backend == "tensorrt-rtx" else _this_gpu()
        )
        machine = f"{platform.system().lower()}-{platform.machine()}"
        chosen = {k: v for k, v in self.options.given.items() if k != "timing_cache"}
        return {**target, "batch": list(self.batch), "platform": machine, **chosen}

    def _parse(self, path: Path) -> Any:
        """The network of an ONNX file, with whatever the parser needs alive."""
        if not path.is_file():
            raise BackendError(f"{path} does not exist", "give an INT8 ONNX file")
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = self.builder.create_network(0 if flag is None else 1 << int(flag))
        self._parser = self.trt.OnnxParser(network, self.log.logger)
        if not self._parser.parse_from_file(os.fspath(path)):
            errors = [self._parser.get_error(i) for i in range(self._parser.num_errors)]
            raise parser_error(self.backend, path, errors)
        return network

    def _configure(self, config: Any) -> None:
        o, trt = self.options, self.trt
        if self.sm:
            config.num_compute_capabilities = len(self.sm)
            for index, name in enumerate(self.sm):
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
        if o.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, o.workspace)
        if o.optimization_level is not None:
            config.builder_optimization_level = o.optimization_level
        if o.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if o.refit:
            config.set_flag(trt.BuilderFlag.REFIT)
        if o.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if o.timing_cache is not None:
            cache = config.create_timing_cache(read_cache(Path(o.timing_cache)))
            if cache is None or not config.set_timing_cache(cache, False):
                raise BackendError(
                    f"{o.timing_cache} is no timing cache of {TITLES[self.backend]} {trt.__version__} on this GPU",
                    "delete it, or name another file",
                )

    def _profile(self, network: Any, config: Any) -> None:
        profile = self.builder.create_optimization_profile()
        dynamic = False
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            shape = tuple(tensor.shape)
            if any(length < 0 for length in shape[1:]):
                raise BackendError(
                    f"input {tensor.name!r} has the shape {shape}; only the batch may vary",
                    "export the model with a fixed image size",
                )
            if shape[0] < 0:
                dynamic = True
                profile.set_shape(tensor.name, *((count, *shape[1:]) for count in self.batch))
            else:
                self.batch = (shape[0],) * 3
        if dynamic:
            config.add_optimization_profile(profile)

    def _refused(self, config: Any) -> BackendError:
        error = refusal(self.backend, self.trt.__version__, "build the engine", self.log.lines)
        if self.options.refit and self.backend == "tensorrt-rtx" and "CUDA" in error.message:
            return BackendError(
                "TensorRT-RTX needs an NVIDIA GPU to build a plan that can be refitted",
                "build it where nvidia-smi shows a GPU, or leave --refit out",
            )
        if "is not supported" in error.message and "Turing" in error.message:
            return BackendError(error.message, "leave SM 75 out, or use --high-precision fp16")
        return error

    def _keep_timings(self, config: Any) -> None:
        if self.options.timing_cache is not None:
            _write(Path(self.options.timing_cache), bytes(config.get_timing_cache().serialize()))


def parser_error(backend: str, path: Path, errors: Sequence[Any]) -> BackendError:
    """One line for what TensorRT's ONNX parser says, naming the node."""
    if not errors:
        return BackendError(f"{TITLES[backend]} cannot read {path.name}", "is it an ONNX file?")
    first = errors[0]
    node = first.node_name() or (f"number {first.node()}" if first.node() >= 0 else "")
    reason = plain(str(first.desc()).removeprefix(f"Invalid Node - {first.node_name()}\n"))
    code = str(first.code()).rpartition(".")[2].split(":")[0]
    if first.node() < 0:
        return BackendError(
            f"{TITLES[backend]} cannot read {path.name}: {reason}", "is it an ONNX file?"
        )
    if code.startswith("UNSUPPORTED") or "Plugin not found" in reason:
        return BackendError(
            f"{TITLES[backend]} has no operator {first.node_operator()} (node {node})",
            "replace it in the model, or deploy the bundle with ONNX Runtime",
        )
    return BackendError(
        f"{TITLES[backend]} refuses node {node} ({first.node_operator()}): {reason}",
        "see docs/gpu.md for what TensorRT takes",
    )


def _this_gpu() -> dict[str, Any]:
    try:
        from pycuda import driver
    except ImportError:
        return {"gpu": "unknown"}
    driver.init()
    device = driver.Device(0)
    return {
        "gpu": device.name(),
        "compute_capability": ".".join(map(str, device.compute_capability())),
    }


def _write(path: Path, content: bytes) -> None:
    """Write a file in one step."""
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(content)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise BackendError(
            f"cannot write {path}: {error.strerror}", "choose another folder"
        ) from error
