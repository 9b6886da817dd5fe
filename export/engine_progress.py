"""Progress of an engine build: what TensorRT's progress calls turn into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from resq_deploy.console import Reporter, Task


class Monitor:
    """What the library's progress calls turn into: its outermost phase is the bar, the phase in hand its note."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter, self.stack = reporter, ExitStack()
        self.phase, self.left, self.cancelled = "", 0, False
        self.task: Task | None = None

    def start(self, phase: str, steps: int) -> None:
        if self.task is None:
            self.phase, self.left = phase, steps
            self.task = self.stack.enter_context(self.reporter.task(phase, steps, "steps"))
        else:
            self.task.note(phase)

    def step(self, phase: str) -> bool:
        if phase == self.phase:
            self.advance(1)
        return not self.cancelled

    def finish(self, phase: str) -> None:
        if phase == self.phase:
            self.advance(self.left)

    def advance(self, steps: int) -> None:
        if self.task is not None and steps:
            self.left -= steps
            self.task.advance(steps)


@contextmanager
def progress(module: Any, config: Any, reporter: Reporter) -> Iterator[Monitor]:
    """Progress of one build. Ctrl-C must not cross the library's frames: it asks it to stop instead."""
    monitor = Monitor(reporter)

    class Progress(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            monitor.start(phase, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                return monitor.step(phase)
            except KeyboardInterrupt:
                monitor.cancelled = True
                return False

        def phase_finish(self, phase: str) -> None:
            monitor.finish(phase)

    held = Progress()
    config.progress_monitor = held
    with monitor.stack:
        yield monitor
