"""The Runner on TensorRT and TensorRT-RTX: one plan on one GPU, with faults in it.

Faults go in one of three ways, the same address each time (injection.py): `live` in GPU memory,
`plan` in the plan's bytes before they are loaded, `refit` through the library's refitter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np

from resq_deploy.bundle import Bundle
from resq_deploy.errors import BackendError
from resq_deploy.faults import FaultSpace, Flips
from resq_deploy.manifest import Engine
from resq_deploy.memory import fault_space
from resq_deploy.runtime.cuda import CudaDevice, Device
from resq_deploy.runtime.injection import INJECTIONS, Injection, choose
from resq_deploy.runtime.plan import PlanMap
from resq_deploy.runtime.runner import PLAN_OPTIONS, Images, Logits, Runner
from resq_deploy.runtime.session import Loader
from resq_deploy.runtime.trtlib import TITLES, library


class TrtRunner(Runner):
    """A bundle's TensorRT plan on a GPU."""

    backend: ClassVar[str] = "tensorrt"

    def __init__(
        self, space: FaultSpace, shape: tuple[int, int, int], classes: int,
        loader: Loader, plan: bytes, plan_map: PlanMap, injection: str = "auto", name: str = "",
    ) -> None:  # fmt: skip
        super().__init__(space, shape, classes)
        self.loader, self.plan, self.plan_map, self.name = loader, plan, plan_map, name
        self.golden = self.session = loader.load(plan)
        self._injection: Injection | None = None
        try:
            self.session(
                np.zeros((1, *shape), dtype=np.float32)
            )  # engines allocate on their first run
            self._injection = choose(injection, self)
        except BaseException:
            self.close()
            raise

    @classmethod
    def check(cls, bundle: Bundle, **options: Any) -> None:
        """Refuse an unknown way of injection, option or plan, and no plan or several where none is named."""
        injection = options.get("injection", "auto")
        if injection not in (*INJECTIONS, "auto"):
            known = ", ".join((*INJECTIONS, "auto"))
            raise BackendError(f"unknown way of injection {injection!r}", f"one of: {known}")
        if unknown := sorted({*options} - {*PLAN_OPTIONS, "device", "module"}):
            raise BackendError(f"{TITLES[cls.backend]} has no option {unknown[0]!r}")
        find_engine(bundle.manifest.engines, cls.backend, options.get("engine"))

    @classmethod
    def open(
        cls, bundle: Bundle, *, engine: str | None = None, injection: str = "auto",
        allow_host_code: bool = False, device: Callable[[str], Device] = CudaDevice,
        module: Any = None, **options: Any,
    ) -> TrtRunner:  # fmt: skip
        """Load one of the bundle's plans (`engine`: its name, where there are several).

        `injection`: live, plan, refit, or auto (live where all of the plan's weights are found in GPU memory,
        else plan). `allow_host_code`: load a plan that is version compatible, and run the code it brings.
        Raises MissingExtra or BackendError: no such plan, no GPU, another version, an altered plan.
        """
        cls.check(bundle, engine=engine, injection=injection, **options)
        name = find_engine(bundle.manifest.engines, cls.backend, engine)
        trt = module or library(cls.backend)
        plan = bundle.file(f"engines/{name}.plan").read_bytes()
        plan_map = PlanMap.load(bundle.file(f"engines/{name}.weights.json"))
        plan_map.check(plan)
        gpu = device(cls.backend)
        try:
            loader = Loader(cls.backend, trt, gpu, host_code=allow_host_code)
            return cls(
                fault_space(bundle.int8), bundle.manifest.input.shape, len(bundle.manifest.classes),
                loader, plan, plan_map, injection, name,
            )  # fmt: skip
        except BackendError as error:
            gpu.close()
            raise _explained(error, bundle.manifest.engines[name], trt.__version__, gpu) from error

    def unreachable(self, flips: Flips) -> int:
        """How many of these bits the way of injection in use cannot change."""
        return self._way.unreachable(flips)

    @property
    def info(self) -> dict[str, Any]:
        """Backend, plan, library version, GPU, way of injection, and how much of the weights it reaches."""
        return {
            "backend": self.backend,
            "plan": self.name,
            "version": self.loader.module.__version__,
            "gpu": self.loader.device.name,
            "injection": self._way.name,
            "coverage": self._way.coverage,
            "plan_coverage": self.plan_map.coverage,
            "unlocated": sorted(self.plan_map.unlocated),
            "batch": [self.golden.smallest, self.golden.largest],
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Which plan, by its bytes, and the way of injection in use: each reaches other bits."""
        plan = hashlib.sha256(self.plan).hexdigest()
        return {"plan": plan, "injection": self._way.name}

    def close(self) -> None:
        """Free what holds the engine, the engine, the runtime, and device memory, in this order."""
        if self._injection is not None:
            self._injection.close()
        self._injection = None
        self.golden.close()
        self.loader.close()
        self.loader.device.close()

    def _infer(self, images: Images) -> Logits:
        return self.session(images)

    def _inject(self, flips: Flips) -> AbstractContextManager[None]:
        return self._way.inject(flips)

    @property
    def _way(self) -> Injection:
        if self._injection is None:
            raise BackendError("the runner is closed", "open it again")
        return self._injection


class TrtRtxRunner(TrtRunner):
    """A bundle's TensorRT-RTX plan on a GPU."""

    backend: ClassVar[str] = "tensorrt-rtx"


def find_engine(engines: Mapping[str, Engine], backend: str, name: str | None) -> str:
    """The name of the bundle's plan for a backend. Raises BackendError where there is none, or several unnamed."""
    fitting = [n for n, e in engines.items() if e.backend == backend and name in (None, n)]
    if len(fitting) == 1:
        return fitting[0]
    have = ", ".join(f"{n} ({e.backend})" for n, e in engines.items()) or "none"
    if not fitting:
        wanted = f"{TITLES[backend]} plan" + (f" named {name!r}" if name else "")
        others = [n for n, e in engines.items() if e.backend == backend]
        raise BackendError(
            f"the bundle has no {wanted}; its plans: {have}",
            f"one of: {', '.join(others)}" if others else f"export it with --target {backend}",
        )
    raise BackendError(
        f"the bundle has several {TITLES[backend]} plans: {', '.join(fitting)}",
        "name one: --engine NAME, or open_runner(..., engine=NAME)",
    )


def _explained(error: BackendError, entry: Engine, version: str, gpu: Device) -> BackendError:
    """Add what the manifest knows: which version wrote the plan, and for which GPU."""
    title, again = TITLES[entry.backend], f"build it for this one: --target {entry.backend}"
    if "another version" in error.message and entry.version != version:
        return BackendError(
            f"the plan was built by {title} {entry.version}; {version} is installed",
            f"install {entry.version}, or build it again with --target {entry.backend}",
        )
    if "another GPU" in error.message:
        built_for = entry.built_for.get("gpu") or entry.built_for.get("sm") or "another GPU"
        wanted = ", ".join(built_for) if isinstance(built_for, list) else str(built_for)
        return BackendError(f"the plan was built for {wanted}; this is {gpu.name}", again)
    return error
