"""The C library over an emulated driver: a launch goes through the C ABI, its choice of kernel, its tensor maps and its
argument list, and then executes the kernel's own source on the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from emulated_assembly import MACHINE
from emulated_gluon import Descriptor, Pointer, call_on, load_kernel_modules
from emulated_machine import Machine
from filelock import FileLock
from interpreted_triton import run_kernel
from torch import Tensor

from sparse_attention import native

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
HERE = Path(__file__).resolve().parent
DRIVER = "libemulated_cuda.so"
OPENS_DRIVER = "driver.cpp"  # the one source that is told which
TYPES = {6: torch.float16, 9: torch.bfloat16}
SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
POINTEES = {"i32": torch.int32, "fp32": torch.float32, "u8": torch.uint8}
MAPS = 4 * 9  # arguments of the tensor maps in front of the others: the map, four sizes, four strides
REACH = 1 << 22
"""Bytes of host memory an emulated pointer may reach; the tests' tensors are smaller and padded to it."""


class _Map(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("sizes", ctypes.c_uint64 * 4), ("strides", ctypes.c_uint64 * 3),
                ("box", ctypes.c_uint32 * 4), ("type", ctypes.c_int), ("swizzle", ctypes.c_int)]  # fmt: skip


def plugin_module(name: str) -> ModuleType:
    """A build script of `plugins/` or a module of its kernels, which are no packages."""
    kernels = str(PLUGINS / "kernels")
    if kernels not in sys.path:  # they import each other by name
        sys.path.append(kernels)
    if not (PLUGINS / f"{name}.py").is_file():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, PLUGINS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def compile_library(folder: Path, objects: Path, libcuda: str, without: str | None = None) -> Path:
    """The C library with every specialisation in its table; an image is the kernel's name and that of its entry.

    Args:
        folder: where it is made.
        objects: where what is the same in all of them is compiled, unless it is there already.
        libcuda: the driver it opens.
        without: leaves out the kernels of this name, a regular expression.
    """
    build = plugin_module("build_kernels")
    kernels = []
    for spec in build.all_specialisations():
        if without and re.search(without, spec.name):
            continue
        line = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
        if is_plain(spec):
            capability, architecture = spec.architecture, build.architecture_of(spec)
            line |= {"threads": 32 * spec.warps, "boxes": [], "entry": spec.function}
        else:
            capability, architecture = 90, "sm_90a"
            boxes = [[rows, 64] for rows in (spec.group_rows, spec.columns, spec.columns, spec.group_rows)]
            line |= {"family": "hopper", "rows": spec.rows, "threads": 128 * (spec.groups + 1),
                     "boxes": boxes, "entry": "prefill"}  # fmt: skip
        line |= {"name": spec.name, "file": f"{spec.name}.cubin", "shared_bytes": 1000, "capability": capability,
                 "architecture": architecture}  # fmt: skip
        (folder / line["file"]).write_bytes(spec.name.encode() + b"\0" + line["entry"].encode() + b"\0")
        kernels.append(line)
    (folder / "manifest.json").write_text(json.dumps({"kernels": kernels}))
    plugin_module("embed_kernels").embed(folder / "manifest.json", folder)
    shared = [source for source in (PLUGINS / "csrc").glob("*.cpp") if source.name != OPENS_DRIVER]
    with FileLock(f"{objects}.lock"):
        if not objects.exists():
            unfinished = objects.with_suffix(".new")
            unfinished.mkdir()
            _compile("-c", *shared, cwd=unfinished)
            unfinished.rename(objects)
    library = folder / native.LIBRARY_NAME
    own = [PLUGINS / "csrc" / OPENS_DRIVER, folder / "kernel_table.cpp", folder / "kernel_images.S"]
    _compile("-shared", f'-DBSA_LIBCUDA="{libcuda}"', *own, *objects.glob("*.o"), "-o", library, "-ldl", cwd=folder)
    return library


def _compile(*arguments: str | Path, cwd: Path) -> None:
    subprocess.run(
        ["g++", "-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
         f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'csrc'}", *map(str, arguments)], check=True, cwd=cwd,
    )  # fmt: skip


def is_plain(spec: Any) -> bool:
    """Whether a specialisation is of a kernel in plain Triton; Hopper's are in Gluon."""
    return hasattr(spec, "signature")


def compile_driver(folder: Path) -> Path:
    path = folder / DRIVER
    subprocess.run(
        ["gcc", "-O1", "-fPIC", "-shared", "-w", str(HERE / "emulated_driver.c"), "-o", str(path)], check=True
    )
    return path


def build_emulation(folder: Path, objects: Path, without: str | None = None) -> tuple[Path, Path]:
    """Driver and library in `folder`, made unless they are there; what the arguments mean: see `compile_library`."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".new")
            unfinished.mkdir()
            compile_library(unfinished, objects, str(folder / compile_driver(unfinished).name), without)
            unfinished.rename(folder)
    return folder / DRIVER, folder / native.LIBRARY_NAME


class Emulation:
    """Launches through the C library and runs the kernels.

    `launched` lists (kernel, CTAs) of the last call, `scalars` the numbers that its last Hopper kernel was given.
    """

    def __init__(self, driver: Path, library: Path) -> None:
        self.library = native.Library(library)
        self.driver = ctypes.CDLL(str(driver))
        build = plugin_module("build_kernels")
        self.specs = {spec.name: spec for spec in build.all_specialisations()}
        self.arguments = [entry.split(":") for entry in f"{build.POINTERS} {build.SCALARS}".split()]
        self.seed = 0
        self.executes = True
        self.launched: list[tuple[str, int]] = []
        self.scalars: dict[str, torch.Tensor] = {}
        self._error: BaseException | None = None
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint,
                                ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p))  # fmt: skip
        self._callback = kind(self._launch)
        self.driver.emulated_on_launch(self._callback)

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Output, counts and log-sum-exp, poisoned before the launch."""
        batch, heads, rows, _ = q.shape
        out = torch.full((batch, heads, rows, v.shape[3]), float("nan"), dtype=q.dtype)
        counts = torch.full((heads, 2), -7, dtype=torch.int32)
        lse = torch.full((batch, heads, rows), float("nan"))
        if options.get("bias") is not None:
            options["bias"] = options["bias"].expand(batch, heads, rows, k.shape[2])
        options.setdefault("scale", q.shape[3] ** -0.5)
        self.seed, self.launched, self._error = seed, [], None
        call = native.pack(q, k, v, out, counts=counts, lse=lse, **options)
        workspace = torch.full((self.library.workspace_size(call),), 255, dtype=torch.uint8)
        try:
            self.library.launch(call.with_workspace(workspace), 0)
        except native.KernelError:
            if self._error is None:
                raise
        if self._error is not None:
            raise self._error
        return out, counts, lse

    def kernels_of(self, call: native.Call) -> list[str]:
        """The kernels that a call launches, none of which is executed."""
        self.executes, self.launched = False, []
        workspace = torch.empty(self.library.workspace_size(call), dtype=torch.uint8)
        try:
            self.library.launch(call.with_workspace(workspace), 0)
        finally:
            self.executes = True
        return [name for name, _ in self.launched]

    def _launch(self, name: bytes, grid: Any, block: int, shared: int, arguments: Any) -> int:
        try:
            spec = self.specs[name.decode()]
            assert block == (32 * spec.warps if is_plain(spec) else 128 * (spec.groups + 1)) and shared == 1000
            self.launched.append((spec.name, grid[0] * grid[1] * grid[2]))
            if not is_plain(spec):
                self.scalars = {
                    name: _argument(arguments[place], kind, torch.float16)
                    for place, (name, kind) in enumerate(self.arguments, MAPS)
                    if not kind.startswith("*")
                }
            if not self.executes:
                return 0
            if is_plain(spec):
                self._interpret(spec, (grid[0], grid[1], grid[2]), arguments)
            else:
                assert grid[1] == grid[2] == 1
                self._execute(spec, grid[0], arguments)
        except BaseException as error:
            self._error = error
            return 1
        return 0

    def _interpret(self, spec: Any, grid: tuple[int, int, int], arguments: Any) -> None:
        values = {}
        for place, entry in enumerate(spec.arguments.split()):
            name, kind, *divisor = entry.split(":")
            values[name] = SCALARS.get(kind, ctypes.c_uint64).from_address(arguments[place]).value
            assert not divisor or values[name] % int(divisor[0]) == 0, f"{name} is no multiple of {divisor[0]}"
        run_kernel(spec, grid, values)

    def _execute(self, spec: Any, grid: int, arguments: Any) -> None:
        values: list[Any] = []
        for place in range(0, MAPS, MAPS // 4):
            values.append(_descriptor(_Map.from_address(arguments[place])))
        for place, (_, kind) in enumerate(self.arguments, MAPS):
            values.append(_argument(arguments[place], kind, values[0].memory.dtype))
        machine = Machine(self.seed)
        MACHINE[:] = [machine]
        call_on(lambda: machine.local.program, lambda: grid)
        prefill = load_kernel_modules()["hopper_prefill"].prefill
        roles = []
        for program in range(grid):
            machine.local.program, machine.local.roles = program, []
            prefill(
                *values, values[0].memory.dtype, spec.head, spec.groups, spec.group_rows, spec.columns,
                spec.queries, spec.key_stages, spec.value_stages, spec.alternate, spec.schedule, spec.causal,
                spec.joins_votes, spec.speculative, spec.ones, spec.pieces, spec.on_demand, spec.registers,
            )  # fmt: skip
            roles += [_on_program(machine, program, n, *role) for n, role in enumerate(machine.local.roles)]
        machine.run(roles)


def work_items(spec: Any, scalars: dict[str, torch.Tensor]) -> list[tuple[int, int, int]]:
    """`(head, first row, tiles)` of a Hopper kernel's work items in the order in which they are given out."""
    item = _items(spec, scalars)[1]
    parts = item.batch * scalars["heads_q"] + item.head, item.row0, item.tiles
    return [(int(head), int(row), int(tiles)) for head, row, tiles in zip(*parts, strict=True)]


def row_blocks(spec: Any, scalars: dict[str, torch.Tensor], q_length: int | None = None) -> list[list[int]]:
    """The first rows of the warpgroups' blocks, for each work item; those at the sequence's end or beyond are empty.

    `q_length`: of every batch entry, where they are given.
    """
    call, item = _items(spec, scalars, q_length)
    first_row = load_kernel_modules()["hopper_queries"].first_row
    blocks = [first_row(call, item, ticket).tolist() for ticket in range(spec.groups)]
    return [list(block) for block in zip(*blocks, strict=True)]


def _items(spec: Any, scalars: dict[str, torch.Tensor], q_length: int | None = None) -> tuple[SimpleNamespace, Any]:
    """The call, and all its work items at once."""
    lengths = load_kernel_modules()["hopper_common"].HAS_Q_LENGTHS
    call = SimpleNamespace(
        **scalars, CAUSAL=spec.causal, GENERAL=False, GROUPS=spec.groups, ROWS=spec.group_rows, COLUMNS=spec.columns,
        ONES=spec.ones, QUERIES=spec.queries, has=lambda bit: bit == lengths and q_length is not None,
        q_lengths=Pointer(torch.tensor([q_length or 0] * int(scalars["heads"]))),
    )  # fmt: skip
    call_on(lambda: 0, lambda: 1)
    index = torch.arange(int(scalars["heads"] * scalars["row_blocks"]))
    return call, load_kernel_modules()["hopper_produce"].unpack_item(call, index)


def _on_program(machine: Machine, program: int, number: int, warps: int, role: Any) -> Any:
    def run() -> None:
        machine.local.program, machine.local.role, machine.local.warps = program, number, warps
        role()

    return run


def _descriptor(entry: _Map) -> Descriptor:
    dtype = TYPES[entry.type]
    size, rows, heads, batch = entry.sizes
    row, head, outer = (stride // 2 for stride in entry.strides)
    reach = (batch - 1) * outer + (heads - 1) * head + (rows - 1) * row + size
    flat = torch.frombuffer((ctypes.c_char * (2 * reach)).from_address(entry.address), dtype=dtype)
    return Descriptor(flat.as_strided((batch, heads, rows, size), (outer, head, row, 1)), (entry.box[1], entry.box[0]))


def _argument(address: int, kind: str, dtype: torch.dtype) -> Any:
    if not kind.startswith("*"):
        return torch.tensor(SCALARS[kind].from_address(address).value)
    target = ctypes.c_uint64.from_address(address).value
    if not target:
        return Pointer(None)
    pointee = POINTEES.get(kind[1:], dtype)
    width = torch.empty(0, dtype=pointee).element_size()
    return Pointer(torch.frombuffer((ctypes.c_char * REACH).from_address(target), dtype=pointee, count=REACH // width))
