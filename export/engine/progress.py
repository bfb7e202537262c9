"""TensorRT's progress as rich bars, and Ctrl-C as an orderly end of the build."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Interruption:
    """Whether Ctrl-C was pressed. The first press asks TensorRT to stop, a second one ends the process as usual."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Takes over SIGINT; only the main thread may, elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A KeyboardInterrupt inside a callback would have to pass through C++ frames that do not allow exceptions.
        before = signal.getsignal(signal.SIGINT)

        def remember(_number: int, _frame: FrameType | None) -> None:
            self.requested = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class PhaseBars:
    """One bar a phase of the build, nested phases below their parent; thread-safe, as TensorRT demands."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._depth: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> PhaseBars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._depth[phase] = self._depth.get(parent or "", -1) + 1
            self._tasks[phase] = self._progress.add_task("  " * self._depth[phase] + phase, total=steps)

    def advance(self, phase: str, step: int) -> None:
        with self._lock:
            if phase in self._tasks:
                self._progress.update(self._tasks[phase], completed=step + 1)

    def finish(self, phase: str) -> None:
        with self._lock:
            if phase in self._tasks:
                self._progress.remove_task(self._tasks.pop(phase))


def make_monitor(tensorrt: ModuleType, bars: PhaseBars, interruption: Interruption) -> Any:
    """A `tensorrt.IProgressMonitor` that feeds the bars and stops the build after Ctrl-C."""

    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            bars.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            bars.advance(phase_name, step)
            return not interruption.requested

        def phase_finish(self, phase_name: str) -> None:
            bars.finish(phase_name)

    return Monitor()
