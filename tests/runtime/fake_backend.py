"""The backend `tensorrt` with the stand-in behind it, in this process and in the workers of a pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from resq_deploy.bundle import Bundle
from resq_deploy.runtime.engines import OpenEngine
from resq_deploy.runtime.runner import BACKENDS, Images
from resq_deploy.runtime.trials import TrialEngine
from resq_deploy.runtime.trt import TrtRunner
from tests.runtime.fake_trt import device_of
from tests.runtime.trt_bundles import library

NAME = f"{__name__}:StandIn"


class StandIn(TrtRunner):
    """A TrtRunner on the stand-in; `stand_in`: what is changed about the library."""

    stand_in: dict[str, Any] = {}  # noqa: RUF012 - set by the test, and by the worker's factory

    @classmethod
    def open(cls, bundle: Bundle, **options: Any) -> TrtRunner:
        return super().open(bundle, device=device_of, module=library(**cls.stand_in), **options)


@dataclass(frozen=True, slots=True, eq=False)
class OpenStandIn:
    """As OpenEngine; a worker knows of no monkeypatch, so the stand-in is put in its place here."""

    bundle: str
    backend: str
    images: Images
    options: dict[str, Any] = field(default_factory=dict)
    stand_in: dict[str, Any] = field(default_factory=lambda: dict(StandIn.stand_in))

    def __call__(self, threads: int) -> TrialEngine:
        BACKENDS["tensorrt"] = NAME
        StandIn.stand_in = self.stand_in
        return OpenEngine(self.bundle, self.backend, self.images, self.options)(threads)
