"""The pieces of PTX that the Hopper kernels contain, executed on a CPU, and the small shared memory they work on."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from emulated_machine import Barrier, Machine, NamedBarrier

MACHINE: list[Machine] = []


class Tile(torch.Tensor):
    """A tensor in registers, or a scalar; `type.layout` exists so that kernels can ask for it."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What PyTorch's own does for this one subclass, without the questions that take it longer than the work."""
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs) if kwargs else function(*args)
            if type(result) is torch.Tensor:
                return result.as_subclass(cls)
            if type(result) in (tuple, list):
                return type(result)(one.as_subclass(cls) if type(one) is torch.Tensor else one for one in result)
        return result

    # a value in registers never changes: `x += y` makes another one, and what else holds x keeps it
    def __iadd__(self, other: Any) -> Any:
        return self + other

    def __ior__(self, other: Any) -> Any:
        return self | other


def tile(value: Any) -> Tile:
    return value if type(value) is Tile else torch.as_tensor(value).as_subclass(Tile)


class Cells:
    """Eight bytes of shared memory each: an mbarrier or two words. Addresses of an array of them begin at REACH times
    its number on this machine."""

    REACH = 1 << 16

    def __init__(self, batch: int) -> None:
        self.barriers = [Barrier() for _ in range(batch)]
        self.words = torch.full((2 * batch,), -99, dtype=torch.int32)
        MACHINE[0].cells.append(self)
        self.address = len(MACHINE[0].cells) * self.REACH

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(i)]


def _at(address: Any) -> tuple[Cells, int]:
    """The array of cells at an address, and the bytes into it."""
    array, offset = divmod(int(address), Cells.REACH)
    cells = MACHINE[0].cells[array - 1]
    assert array > 0 and offset < 8 * len(cells.barriers), "an address outside of shared memory"
    return cells, offset


def _barrier(address: Any) -> Barrier:
    cells, offset = _at(address)
    assert offset % 8 == 0
    return cells.barriers[offset // 8]


def wait(barrier: Barrier, parity: Any) -> None:
    parity = int(parity)
    MACHINE[0].wait_until(lambda: barrier.done(parity))


def named_barrier(what: str, number: int) -> None:
    barrier = MACHINE[0].named.setdefault((MACHINE[0].local.program, number), NamedBarrier())
    generation = barrier.arrive()
    if what == "sync":
        MACHINE[0].wait_until(lambda: barrier.generation > generation)


def _integer_maxima(scores: torch.Tensor) -> Tile:
    """Of the columns of a quad's four threads, `[rows, 4]`: the largest bits, or the smallest if all are negative."""
    bits = scores.contiguous().view(torch.int32).reshape(scores.shape[0], -1, 4, 2)
    high, low = bits.amax((1, 3)), bits.amin((1, 3))
    return tile(torch.where(high < 0, low, high).view(torch.float32))


def _take_ticket(tickets: Any, own: Any, least: int) -> None:
    """Waits until Q was received by so many; the warpgroup's word then says how many more were taken before it."""
    (cells, start), (others, word) = _at(tickets), _at(own)
    MACHINE[0].wait_until(lambda: int(cells.words[start // 4 + 1]) >= least)
    others.words[word // 4] = cells.words[start // 4] - least
    cells.words[start // 4] += 1


def inline_asm(asm: str, constraints: Any, args: list[Any], result_types: Any, is_pure: bool) -> Any:
    """The pieces of PTX the kernels contain: addresses, votes, arrivals, and words of shared memory."""
    if asm == "mov.b32 $0, $1;":
        return tile(args[0].address) if isinstance(args[0], Cells) else args[0]
    if "shl.b32 bytes, $1, 3; add.s32 $0, bytes, $2;" in asm:
        return tile(int(args[0]) * 8 + int(args[1]))
    assert not is_pure
    if "%tid.x; shr.u32 group, group, 7;" in asm:
        return tile(MACHINE[0].local.role)
    if asm == "wgmma.wait_group.sync.aligned 0;":  # said to ptxas alone: there is nothing left to wait for
        return None
    if "st.shared.v4.b32" in asm:
        args[0].memory[int(args[1]) :] = 0
        return None
    if "max.s32" in asm:
        return _integer_maxima(args[0])
    if "atom.shared.add" in asm:
        return _take_ticket(args[0], args[1], int(args[2]))
    if "red.shared.add" in asm:
        cells, start = _at(args[0])
        cells.words[start // 4 + 1] += 1
        return None
    if "%clock" in asm:  # a wait that is for speed only
        return None
    if "red.or.pred" in asm or "vote.sync.any" in asm:  # the one thread here stands for all 128, of all warps
        return tile(int(bool((args[0] != 0).any())))
    if "redux.sync" in asm:
        return args[0]
    if "bar.warp.sync" in asm:
        return _barrier(args[0]).arrive(MACHINE[0].local.warps)
    if asm.startswith("mbarrier.arrive"):  # every lane for itself
        return _barrier(args[0]).arrive(32 * MACHINE[0].local.warps)
    if "mbarrier.test_wait" in asm:
        return tile(int(_barrier(args[0]).done(int(args[1]))))
    if "mbarrier.try_wait" in asm:
        return None if len(args) > 2 and args[2] else wait(_barrier(args[0]), args[1])
    if found := re.match(r"barrier\.cta\.(sync|arrive) \$0, 256;", asm):
        return named_barrier(found[1], int(args[0]))
    kinds = result_types if isinstance(result_types, tuple) else (result_types,)  # () where there is no result
    results: list[Any] = [None] * len(kinds)

    def word(operand: str, offset: str) -> torch.Tensor:
        cells, start = _at(args[int(operand) - len(kinds)] + int(offset or 0))
        return cells.words[start // 4 :][:1]

    for step in asm.split(";"):
        if found := re.search(r"ld\.shared\.(\w+) \$(\d+), \[\$(\d+)\+?(\d*)\]", step):
            value = word(found[3], found[4])
            results[int(found[2])] = tile(value.view(torch.float32)[0] if found[1] == "f32" else value[0]).clone()
        elif found := re.search(r"st\.shared\.(\w+) \[\$(\d+)\+?(\d*)\], \$(\d+)", step):
            kind = torch.float32 if found[1] == "f32" else torch.int32
            word(found[2], found[3]).copy_(torch.tensor([args[int(found[4])]], dtype=kind).view(torch.int32))
        elif found := re.search(r"mbarrier\.arrive\.shared::cta\.b64 _, \[\$(\d+)\]", step):
            _barrier(args[int(found[1])]).arrive(1)
    return tuple(results) if isinstance(result_types, tuple) else results[0]


def inline_asm_elementwise(asm: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    assert is_pure and re.match(r"cvt\.rn\.(f16|bf16)x2\.f32 \$0, \$2, \$1;$", asm) and pack == 2
    return args[0].to(dtype)
