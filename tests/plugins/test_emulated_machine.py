"""The emulation notices what it is there for: deadlocks, arrivals too many, data read before it has landed."""

from __future__ import annotations

import pytest
import torch
from emulated_assembly import MACHINE
from emulated_gluon import Descriptor, Shared, _async_load, _warpgroup_mma, _warpgroup_mma_wait
from emulated_machine import Barrier, EmulationError, Machine


def barrier(arrivals: int) -> Barrier:
    result = Barrier()
    result.init(arrivals)
    return result


def test_phases_follow_arrivals_and_bytes() -> None:
    b = barrier(1)
    assert b.done(1) and not b.done(0)
    b.expect(100)
    assert not b.done(0)
    b.land(100)
    assert b.done(0) and not b.done(1)


def test_an_arrival_too_many() -> None:
    with pytest.raises(EmulationError, match="arrivals"):
        barrier(1).arrive(2)


def test_deadlock() -> None:
    machine, b = Machine(0), barrier(1)
    with pytest.raises(EmulationError, match="deadlock"):
        machine.run([lambda: machine.wait_until(lambda: b.done(0))])


def test_reading_before_the_copy_has_landed_gives_nan() -> None:
    results = set()
    for seed in range(20):
        machine = Machine(seed)
        MACHINE[:] = [machine]
        buffer, b = Shared(torch.zeros(8, 16)), barrier(1)
        source = Descriptor(torch.ones(1, 1, 8, 16), (8, 16))

        def role(
            buffer: Shared = buffer, b: Barrier = b, source: Descriptor = source, machine: Machine = machine
        ) -> None:
            b.expect(8 * 16 * 2)
            _async_load(source, [0, 0, 0, 0], b, buffer)
            machine.wait_until(lambda: True)  # not the barrier
            results.add(bool(buffer.memory.isnan().any()))

        machine.run([role])
    assert results == {True, False}


def test_a_product_must_be_waited_for() -> None:
    machine = Machine(0)
    MACHINE[:] = [machine]

    def role() -> None:
        tile = Shared(torch.ones(4, 4))
        first = _warpgroup_mma(tile, tile, torch.zeros(4, 4), is_async=True)
        second = _warpgroup_mma(tile, tile, torch.zeros(4, 4), is_async=True)
        assert (_warpgroup_mma_wait(1, deps=(first,)) == 4).all()
        with pytest.raises(EmulationError, match="before the wait"):
            _warpgroup_mma_wait(1, deps=(second,))

    machine.run([role])
