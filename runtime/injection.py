"""Three ways to flip the bits of a loaded engine's weights, all by the address of the INT8 graph.

live    XOR in GPU memory, in the blocks the engine allocated; nothing is reloaded
plan    XOR in the plan's bytes, which are then loaded as a second engine
refit   faulty tensors through the library's refitter, where the engine was built for it
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import BackendError
from resq_deploy.faults import FaultSpace, Flips, flipped
from resq_deploy.runtime.layouts import Indices
from resq_deploy.runtime.plan import PlanMap, locate, merged

if TYPE_CHECKING:
    from resq_deploy.runtime.trt import TrtRunner


class Injection(ABC):
    """One way to change the weights that a runner's session uses."""

    name: ClassVar[str]

    def __init__(self, runner: TrtRunner) -> None:
        self.runner = runner

    @property
    @abstractmethod
    def coverage(self) -> float:
        """Share of the INT8 weights' bytes it reaches, in [0, 1]."""

    @abstractmethod
    def unreachable(self, flips: Flips) -> int:
        """How many of these bits it cannot change."""

    @abstractmethod
    def inject(self, flips: Flips) -> AbstractContextManager[None]:
        """Flips inside the block; golden memory afterwards, checked."""

    def close(self) -> None:  # noqa: B027 - most hold nothing of the library's
        """Give back what holds the engine."""


class PlanInjection(Injection):
    """Flip bits of the plan, load it beside the golden engine, and drop it afterwards."""

    name: ClassVar[str] = "plan"

    @property
    def coverage(self) -> float:
        return _share(self.runner.space, lambda name: _located(self.runner.plan_map, name))

    def unreachable(self, flips: Flips) -> int:
        return self.runner.plan_map.unreachable(flips)

    @contextmanager
    def inject(self, flips: Flips) -> Iterator[None]:
        plan = bytearray(self.runner.plan)
        changed = self.runner.plan_map.apply(plan, flips)
        cancelled, odd = divmod(flips.count - changed, 2)  # in pairs, in a copy that tensors share
        if odd or cancelled < 0 or (cancelled and not self.runner.plan_map.shared):
            raise BackendError(f"{changed} bits of the plan changed, not {flips.count}")
        session = self.runner.loader.load(plan)
        self.runner.session = session
        try:
            yield
        finally:
            self.runner.session = self.runner.golden
            session.close()


class LiveInjection(Injection):
    """Flip bits in the device memory that the loaded engine reads."""

    name: ClassVar[str] = "live"

    def __init__(self, runner: TrtRunner) -> None:
        super().__init__(runner)
        self.device = runner.loader.device
        self.maps = _find(runner)

    @property
    def coverage(self) -> float:
        return _share(
            self.runner.space,
            lambda name: _located(self.maps[name][1], name) if name in self.maps else 0,
        )

    def unreachable(self, flips: Flips) -> int:
        return sum(
            int(np.bitwise_count(part.masks).sum())
            if name not in self.maps
            else self.maps[name][1].unreachable(Flips({name: part}))
            for name, part in flips.items()
        )

    @contextmanager
    def inject(self, flips: Flips) -> Iterator[None]:
        addresses, masks = self._addresses(flips)
        golden = self.device.peek(addresses)
        self.device.flip(addresses, masks)
        try:
            if not np.array_equal(self.device.peek(addresses), golden ^ masks):
                raise BackendError("GPU memory did not take the flips")
            yield
        finally:
            self.device.synchronize()
            self.device.flip(addresses, masks)
            if not np.array_equal(self.device.peek(addresses), golden):
                raise BackendError(
                    "GPU memory is not golden again: the engine writes to its weights"
                )

    def _addresses(self, flips: Flips) -> tuple[Indices, NDArray[np.uint8]]:
        """Byte addresses in GPU memory, ascending and distinct, and XOR masks."""
        parts = []
        for name, part in flips.items():
            base, where = self.maps[name]
            offsets, masks = where.scatter(Flips({name: part}))
            parts.append((offsets + base, masks))
        if not parts:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8)
        addresses, masks = (np.concatenate(part) for part in zip(*parts, strict=True))
        return merged(addresses, masks)


class RefitInjection(Injection):
    """Hand faulty tensors to the refitter. It cannot be read back, so outputs on a probe are compared instead."""

    name: ClassVar[str] = "refit"

    def __init__(self, runner: TrtRunner) -> None:
        super().__init__(runner)
        if not runner.golden.engine.refittable:
            raise BackendError(
                "the plan was not built to be refitted",
                "build it with --refit, or choose another way: live, plan",
            )
        self.refitter: Any = runner.loader.module.Refitter(
            runner.golden.engine, runner.loader.log.logger
        )
        rng = np.random.default_rng(0)
        self.probe = rng.random((runner.golden.smallest, *runner.shape), dtype=np.float32)
        try:
            self.names = frozenset(self.refitter.get_all_weights())
            self.expected = runner.golden(self.probe)
        except BaseException:
            self.close()
            raise

    @property
    def coverage(self) -> float:
        sizes = {m.name: m.value.size for m in self.runner.space.memories}
        return _share(self.runner.space, lambda name: sizes[name] if name in self.names else 0)

    def unreachable(self, flips: Flips) -> int:
        lost = (part for name, part in flips.items() if name not in self.names)
        return sum(int(np.bitwise_count(part.masks).sum()) for part in lost)

    @contextmanager
    def inject(self, flips: Flips) -> Iterator[None]:
        memories = {name: self.runner.space.by_name[name] for name in flips}
        try:
            self._refit({name: flipped(m, flips[name]) for name, m in memories.items()})
            yield
        finally:
            self._refit({name: m.value for name, m in memories.items()})
            if not np.array_equal(self.runner.golden(self.probe), self.expected):
                raise BackendError("the refitted engine does not answer as the golden one did")

    def close(self) -> None:
        """The refitter keeps the engine alive, and the engine its runtime and allocator."""
        self.refitter = None

    def _refit(self, tensors: dict[str, NDArray[Any]]) -> None:
        held = [np.ascontiguousarray(value) for value in tensors.values()]
        weights = self.runner.loader.module.Weights
        for name, value in zip(tensors, held, strict=True):
            if not self.refitter.set_named_weights(name, weights(value)):
                raise self.runner.loader.refused(f"refit {name}")
        if not self.refitter.refit_cuda_engine():
            raise self.runner.loader.refused("refit the engine")


INJECTIONS: dict[str, type[Injection]] = {
    kind.name: kind for kind in (LiveInjection, PlanInjection, RefitInjection)
}


def choose(name: str, runner: TrtRunner) -> Injection:
    """The way of injection of this name; `auto`: live where it reaches all that the plan's map does, else plan."""
    if name != "auto":
        return INJECTIONS[name](runner)
    live, plan = LiveInjection(runner), PlanInjection(runner)
    return live if live.coverage >= plan.coverage > 0 else plan


def _find(runner: TrtRunner) -> dict[str, tuple[int, PlanMap]]:
    """Where each weight lies in the engine's blocks: tensor -> (block address, map of the block).

    First in the layouts of the plan, then, for weights that no block has so, in all. A tensor that
    several blocks hold is left out: which copy the engine reads is not known.
    """
    weights = {m.name: m.value for m in runner.space.memories if m.kind == "weights"}
    known = {name: p.layout for name, p in runner.plan_map.tensors.items() if name in weights}
    found = _in_blocks(runner, {name: weights[name] for name in known}, known)
    missing = {name: value for name, value in weights.items() if name not in found}
    found |= _in_blocks(runner, missing, {})
    return {
        name: places[0]
        for name, places in found.items()
        if len(places) == 1 and not places[0][1].tensors[name].copies
    }


def _in_blocks(
    runner: TrtRunner, weights: dict[str, NDArray[Any]], known: dict[str, str]
) -> dict[str, list[tuple[int, PlanMap]]]:
    found: dict[str, list[tuple[int, PlanMap]]] = {}
    least = min((value.nbytes for value in weights.values()), default=None)
    for address, size in runner.loader.blocks.sizes.items():
        if least is not None and size >= least:
            block = locate(runner.loader.device.download(address, size), weights, known)
            for name in block.tensors:
                found.setdefault(name, []).append((address, block))
    return found


def _located(plan_map: PlanMap, name: str) -> int:
    found = plan_map.tensors.get(name)
    return 0 if found is None else found.located


def _share(space: FaultSpace, located: Callable[[str], int]) -> float:
    """Share of the weights' elements, all of one byte, of which `located` tells how many it reaches in a tensor."""
    sizes = {m.name: m.value.size for m in space.memories if m.kind == "weights"}
    total = sum(sizes.values())
    return sum(min(located(name), size) for name, size in sizes.items()) / total if total else 1.0
