"""The part of Gluon's language that the Hopper kernels use, executed by PyTorch on a CPU.

`load_kernel_modules` imports the kernels' own sources with these modules in place of Triton's, so that what is tested
is the very code that is compiled: its schedule, barriers, masks and decisions. Layouts and registers mean nothing here.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from emulated_assembly import MACHINE, Cells, Tile, inline_asm, inline_asm_elementwise, tile, wait
from emulated_machine import Barrier, EmulationError

KERNELS = Path(__file__).resolve().parents[2] / "plugins" / "kernels"


class Pointer:
    def __init__(self, memory: torch.Tensor | None, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.offset + step)


class Descriptor:
    """A tensor map over `[B, H, S, D]` in any strides; reads beyond it are zeros, writes beyond it are dropped."""

    def __init__(self, memory: torch.Tensor, box: tuple[int, int]) -> None:
        self.memory, self.box = memory, box

    def parts(self, coordinates: list[Any], rows: int, columns: int) -> tuple[torch.Tensor, slice, slice]:
        b, h, row, column = (int(c) for c in coordinates)
        assert column == 0
        begin = min(max(-row, 0), rows)
        inside = slice(begin, max(begin, min(rows, self.memory.shape[2] - row)))
        width = slice(0, min(columns, self.memory.shape[3]))
        return self.memory[b, h, row + inside.start : row + inside.stop, width], inside, width


class Shared:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory

    def index(self, i: Any) -> Shared:
        return Shared(self.memory[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.memory.permute(order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory.narrow(dim, start, length))

    def load(self, layout: object) -> Tile:
        return tile(self.memory.clone())

    def store(self, value: torch.Tensor) -> None:
        self.memory.copy_(value)


class Token:
    """A product in flight; its operands in shared memory are read when it ends, not when it is issued."""

    type = Tile.type

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self.compute, self.result = compute, None

    def finish(self) -> None:
        if self.result is None:
            self.result = tile(self.compute())


def _products() -> list[Token]:
    return MACHINE[0].local.__dict__.setdefault("products", [])


def _copies_out() -> list[Callable[[], None]]:
    return MACHINE[0].local.__dict__.setdefault("copies_out", [])


def _warpgroup_mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Token:
    def compute() -> torch.Tensor:
        left = a.memory if isinstance(a, Shared) else a
        product = left.float() @ b.memory.float()
        if not use_acc:
            return product
        return (acc.result if isinstance(acc, Token) else acc) + product  # products end in the order of their issue

    assert is_async
    token = Token(compute)
    _products().append(token)
    return token


def _warpgroup_mma_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
    while len(_products()) > outstanding:
        _products().pop(0).finish()
    results = []
    for dep in deps:
        if isinstance(dep, Token):
            if dep.result is None:
                raise EmulationError("a product is used before the wait for it")
            dep = dep.result
        results.append(dep)
    return results[0] if len(results) == 1 else tuple(results)


class DescriptorWords:
    """Low words of descriptors of V and the ones (hopper_product): a pair's number, `REACH` apart, less what was added.

    One more in the word's low half and one less in the high half is 16 bytes further on in V.
    """

    REACH = 1 << 40
    STEP = 0xFFFF

    def __init__(self) -> None:
        self.pairs: list[tuple[Shared, Shared]] = []

    def first(self, values: Shared, ones: Shared) -> Tile:
        self.pairs.append((values, ones))
        return tile(torch.tensor(len(self.pairs) * self.REACH))

    def at(self, word: int, keys: int) -> tuple[Shared, Shared]:
        """So many keys of V, and the ones."""
        number = -(-word // self.REACH)
        away, rest = divmod(number * self.REACH - word, self.STEP)
        values, ones = self.pairs[number - 1]
        slot, inside = divmod(away, values.memory[0].numel() // 8)
        assert rest == 0 and inside % 8 == 0
        return values.index(slot).slice(inside // 8, keys), ones


def _words() -> DescriptorWords:
    return MACHINE[0].local.__dict__.setdefault("words", DescriptorWords())


def _product_with_ones(kind: str, p: Tile, acc: Any, sums: Any, word: Any) -> tuple[Any, Any]:
    """The output, and the row sums from 16 rows of ones; both in flight. 16 keys are one instruction."""
    p = p.to(torch.float16 if kind == "f16" else torch.bfloat16)
    values, ones = _words().at(int(word), p.shape[1])
    ones = Shared(ones.memory[:, :8])
    for first, part in enumerate(p.split(ones.memory.shape[0], 1)):
        keys = values.slice(first * part.shape[1], part.shape[1])
        acc = _warpgroup_mma(part, keys, acc, is_async=True)
        sums = _warpgroup_mma(part, ones, sums, is_async=True)
    return acc, sums


def _inline_asm(asm: str, constraints: Any, args: Any = (), result_types: Any = (), is_pure: bool = False) -> Any:
    """Of assembly what has to do with products; the rest is that of `emulated_assembly`."""
    if "sub.s32 away, $2, $1" in asm:
        return _words().first(*args)
    if found := re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n72k16\.f32\.(\w+)\.", asm):
        return _product_with_ones(found[1], *args)
    if asm == "wgmma.wait_group.sync.aligned 0;" and args:
        return _warpgroup_mma_wait(0, tuple(args))
    return inline_asm(asm, constraints, args, result_types, is_pure)


def _async_load(desc: Descriptor, coordinates: list[Any], barrier: Barrier, target: Shared) -> None:
    if desc.box[0] != target.memory.shape[0]:
        raise EmulationError(f"the tensor map's box has {desc.box[0]} rows, the tile {target.memory.shape[0]}")
    target.memory.fill_(float("nan"))

    def land() -> None:
        source, rows, columns = desc.parts(coordinates, *target.memory.shape)
        target.memory.zero_()
        target.memory[rows, columns] = source
        barrier.land(target.memory.numel() * 2)

    MACHINE[0].copies.append(land)


def _async_store(desc: Descriptor, coordinates: list[Any], source: Shared) -> None:
    if coordinates[2] < 0:
        raise EmulationError("the copy engine traps on a store that begins below row 0")
    done = []

    def land() -> None:
        if not done:
            target, rows, columns = desc.parts(coordinates, *source.memory.shape)
            target.copy_(source.memory[rows, columns])
            done.append(True)

    MACHINE[0].copies.append(land)
    _copies_out().append(land)


def _store_wait(pending: int) -> None:
    assert pending == 0
    while _copies_out():
        _copies_out().pop(0)()


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tile:
    assert pointer.memory is not None, "a null pointer is read"
    offset = torch.as_tensor(pointer.offset)
    if mask is None:
        return tile(pointer.memory[offset])
    value = pointer.memory[torch.where(mask, offset, 0)]
    return tile(torch.where(mask, value, torch.tensor(other, dtype=value.dtype)))


def _store(pointer: Pointer, value: Any, mask: Any) -> None:
    assert pointer.memory is not None
    offset, value = torch.as_tensor(pointer.offset)[mask], torch.as_tensor(value)[mask]
    pointer.memory[offset.as_subclass(torch.Tensor)] = value.as_subclass(torch.Tensor)


def _atomic_add(pointer: Pointer, value: Any, mask: Any = True, sem: str = "relaxed") -> Tile:
    assert pointer.memory is not None
    before = pointer.memory[int(pointer.offset)].clone()
    if bool(mask):
        pointer.memory[int(pointer.offset)] += int(value)
    return tile(before)


def _maximum(a: Any, b: Any) -> Tile:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return tile(torch.fmax(a, b) if (a + b).is_floating_point() else torch.maximum(a, b))


def _minimum(a: Any, b: Any) -> Tile:
    return tile(torch.minimum(torch.as_tensor(a), torch.as_tensor(b)))


def _max(values: torch.Tensor, axis: int) -> Tile:
    return tile(torch.where(values.isnan(), -float("inf"), values).amax(axis))


def _where(condition: Any, a: Any, b: Any) -> Tile:
    return tile(torch.where(torch.as_tensor(condition), a, b))


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Shared:
    return Shared(torch.full(shape, float("nan") if dtype.is_floating_point else -99, dtype=dtype))


def _warp_specialize(
    roles: list[tuple[Callable[..., Any], tuple[Any, ...]]], warps: list[int], registers: list[int]
) -> None:
    assert len(warps) == len(registers)
    for (function, arguments), count in zip(roles, [4, *warps], strict=True):
        MACHINE[0].local.roles.append((count, functools.partial(function, *arguments)))


def _aggregate(cls: type) -> type:
    names = list(cls.__annotations__)

    def __init__(self: Any, *values: Any) -> None:
        assert len(values) == len(names), f"{cls.__name__} takes {len(names)} fields, not {len(values)}"
        self.__dict__.update(zip(names, values, strict=True))

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def _layout(*parts: Any) -> None:
    return None


def _language(program: Callable[[], int], programs: Callable[[], int]) -> types.ModuleType:
    gl = types.ModuleType("triton.experimental.gluon.language")
    layouts = "NVMMASharedLayout SwizzledSharedLayout NVMMADistributedLayout SliceLayout DotOperandLayout BlockedLayout"
    for name in layouts.split():
        setattr(gl, name, _layout)
    gl.__dict__.update(
        constexpr=lambda value: value, tensor=Tile, shared_memory_descriptor=Shared, int32=torch.int32,
        int64=torch.int64, float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16, static_range=range,
        to_tensor=tile, program_id=lambda axis: tile(program()), num_programs=lambda axis: programs(), load=_load,
        store=_store, atomic_add=_atomic_add, maximum=_maximum, minimum=_minimum, where=_where, max=_max,
        sum=lambda x, axis: x.sum(axis), reshape=lambda x, shape: x.reshape(shape), cdiv=lambda a, b: (a + b - 1) // b,
        exp2=lambda x: tile(torch.exp2(x)), log2=lambda x: tile(torch.log2(x)),
        arange=lambda start, end, layout=None: tile(torch.arange(start, end, dtype=torch.int32)),
        full=lambda shape, value, dtype, layout: tile(torch.full(shape, value, dtype=dtype)),
        permute=lambda x, order: x.permute(order), split=lambda x: x.unbind(-1),
        convert_layout=lambda x, layout, assert_trivial=False: x, inline_asm=_inline_asm,
        inline_asm_elementwise=inline_asm_elementwise,
        allocate_shared_memory=_allocate, warp_specialize=_warp_specialize,
    )  # fmt: skip
    return gl


def call_on(program: Callable[[], int], programs: Callable[[], int]) -> None:
    """What the kernels are told of their number and of how many there are, from now on."""
    _grid[:] = program, programs


_grid: list[Callable[[], int]] = []


@functools.cache
def load_kernel_modules() -> dict[str, types.ModuleType]:
    """The kernels' own sources over this emulation, by name; other importers of Triton are not disturbed.

    Read once a process: compiling them takes longer than many a call of them.
    """
    gl = _language(lambda: _grid[0](), lambda: _grid[1]())
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.__dict__.update(jit=lambda f: f, constexpr_function=lambda f: f, aggregate=_aggregate, language=gl)
    hopper = types.ModuleType("triton.experimental.gluon.language.nvidia.hopper")
    hopper.__dict__.update(
        mbarrier=SimpleNamespace(
            wait=wait, allocate_mbarrier=Cells, init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, count: barrier.expect(count),
        ),
        tma=SimpleNamespace(
            tensor_descriptor=Descriptor, async_load=_async_load, async_store=_async_store, store_wait=_store_wait
        ),
        warpgroup_mma=_warpgroup_mma, warpgroup_mma_wait=_warpgroup_mma_wait, fence_async_shared=lambda: None,
    )  # fmt: skip
    fakes = {
        "triton": types.ModuleType("triton"), "triton.experimental": types.ModuleType("triton.experimental"),
        gluon.__name__: gluon, gl.__name__: gl,
        "triton.experimental.gluon.language.nvidia": types.ModuleType("triton.experimental.gluon.language.nvidia"),
        hopper.__name__: hopper,
    }  # fmt: skip
    fakes["triton.experimental"].gluon = gluon  # type: ignore[attr-defined]
    ours = {path.stem for path in KERNELS.glob("hopper_*.py")}
    hidden = {name: module for name, module in sys.modules.items() if name in ours or name.split(".")[0] == "triton"}
    for name in hidden:
        del sys.modules[name]
    sys.modules.update(fakes)
    sys.path.insert(0, str(KERNELS))
    try:
        importlib.import_module("hopper_prefill")
        return {name: sys.modules[name] for name in ours if name in sys.modules}
    finally:
        sys.path.remove(str(KERNELS))
        for name in [n for n in sys.modules if n in ours or n.split(".")[0] == "triton"]:
            del sys.modules[name]
        sys.modules.update(hidden)
