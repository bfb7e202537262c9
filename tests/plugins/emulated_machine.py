"""A Hopper SM in miniature, as far as the kernels can tell: warp roles, mbarriers, asynchronous copies and products.

Every warp role is a thread, but only one runs at a time; at each synchronisation the next is drawn at random from a
seed. Copies by the copy engine land at a random later moment, and what they will overwrite is poisoned when they are
issued, so a wait that is missing or waits for the wrong phase shows as NaN, as a deadlock, or as an arrival too many.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any


class EmulationError(AssertionError):
    """The kernel did something the hardware would not forgive: a deadlock, an arrival too many, a wait for nothing."""


class Barrier:
    """An mbarrier: a phase ends when all arrivals are in and all expected bytes have landed."""

    def __init__(self) -> None:
        self.arrivals = self.pending = self.bytes = self.phase = 0

    def init(self, arrivals: int) -> None:
        self.arrivals = self.pending = arrivals

    def arrive(self, count: int) -> None:
        if count > self.pending:
            raise EmulationError(f"{count} arrivals at a barrier that expects {self.pending} more")
        self.pending -= count
        self._settle()

    def expect(self, count: int) -> None:
        self.bytes += count
        self.arrive(1)

    def land(self, count: int) -> None:
        self.bytes -= count
        self._settle()

    def done(self, parity: int) -> bool:
        """Whether the phase of this parity is over."""
        return self.phase & 1 != parity

    def _settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.arrivals


class NamedBarrier:
    """A barrier of the instruction `barrier`, for two warpgroups: its generation ends when both are counted."""

    def __init__(self) -> None:
        self.counted = self.generation = 0

    def arrive(self) -> int:
        """Counts a warpgroup; returns the generation it belongs to."""
        mine = self.generation
        self.counted += 1
        if self.counted == 2:
            self.counted, self.generation = 0, mine + 1
        return mine


class Machine:
    """Runs threads one at a time; `copies` are what the copy engine still has to do."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.local = threading.local()
        self.named: dict[tuple[int, int], NamedBarrier] = {}  # by program and number
        self.cells: list[Any] = []  # arrays of small shared memory, whose addresses are numbers
        self._blocked: dict[int, Callable[[], bool] | None] = {}
        self._batons: dict[int, threading.Semaphore] = {}
        self._failure: BaseException | None = None
        self._finished = threading.Event()

    def run(self, roles: list[Callable[[], Any]]) -> None:
        """Runs all roles to their end; raises what the first of them raised."""
        threads = []
        for index, role in enumerate(roles):
            self._blocked[index] = None
            self._batons[index] = threading.Semaphore(0)
            threads.append(threading.Thread(target=self._main, args=(index, role), daemon=True))
        for thread in threads:
            thread.start()
        self._pass_on()
        self._finished.wait()
        if self._failure is not None:
            raise self._failure
        while self.copies:
            self.copies.pop(0)()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Called by a role: lets others run until the condition holds."""
        index = self.local.index
        self._blocked[index] = condition
        self._pass_on()
        self._batons[index].acquire()
        self._blocked[index] = None
        if self._failure is not None:
            raise SystemExit

    def _main(self, index: int, role: Callable[[], Any]) -> None:
        self.local.index = index
        self._batons[index].acquire()
        try:
            if self._failure is None:
                role()
        except SystemExit:
            pass
        except BaseException as error:
            self._failure = self._failure or error
        del self._blocked[index]
        self._pass_on()

    def _pass_on(self) -> None:
        """Hands the baton to a random role that can go on; lets copies land in between."""
        if self._failure is not None:
            for baton in self._batons.values():
                baton.release()
            self._finished.set()
            return
        while True:
            if self.copies and self.random.random() < 0.3:
                self.copies.pop(self.random.randrange(len(self.copies)))()
            ready = [i for i, condition in self._blocked.items() if condition is None or condition()]
            if ready:
                self._batons[self.random.choice(ready)].release()
                return
            if not self._blocked:
                self._finished.set()
                return
            if not self.copies:
                self._failure = EmulationError(f"deadlock: {len(self._blocked)} roles wait for each other")
                self._pass_on()
                return
            self.copies.pop(self.random.randrange(len(self.copies)))()
