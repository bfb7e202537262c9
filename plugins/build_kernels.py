"""Compiles the attention kernels to cubins, without a GPU, and writes a manifest of them.

    python plugins/build_kernels.py --output build/kernels [--only REGEX] [--jobs N]

Needs `triton==3.9.0` (Gluon's interface changes between releases) and nothing of CUDA. Fails if a kernel spills more
registers than its specialisation allows, or if ptxas reports that it serialised the tensor-core instructions (C75xx).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "kernels"))

import decode_specifications  # noqa: E402
import prefill_specifications  # noqa: E402
import specifications  # noqa: E402
from fixed_roles import PtxError, fix_roles  # noqa: E402
from join_consumers import join  # noqa: E402
from plain_kernel import ARCHITECTURES, SHARED_BYTES, PlainKernel  # noqa: E402
from specifications import Specialisation  # noqa: E402

FAMILIES: tuple[ModuleType, ...] = (specifications, decode_specifications, prefill_specifications)
TRITON_VERSION = "3.9.0"
MANIFEST_VERSION = 3

# Arguments of a Hopper kernel after the four tensor maps, in its order. csrc/launch_hopper.cpp fills them by this list.
POINTERS = (
    "kv_lengths:*i32 q_start:*i32 q_lengths:*i32 threshold_scale:*fp32 sinks:*T counts:*i32 lse:*fp32 counter:*i32"
)
SCALARS = (
    "given:i32 heads_q:i32 group:i32 seq_q:i32 seq_k:i32 row_blocks:i32 first_row:i32 heads:i32 section:i32 "
    "last_section:i32 scale_log2:fp32 threshold:fp32 threshold_factor:fp32 window:i32 softcap_log2:fp32 "
    "softcap_rate:fp32 bias:*T bias_bool:*u8 bias_batch:i64 bias_head:i64 bias_row:i64 bias_column:i64"
)


class BuildError(RuntimeError):
    """A kernel that must not be shipped."""


def _signature(spec: Specialisation, gl: Any) -> tuple[dict[str, str], dict[str, object]]:
    layout = gl.NVMMASharedLayout(128, 16, 4)

    def descriptor(rows: int) -> str:
        return f"tensordesc<{spec.dtype}[1,1,{rows},{spec.head}],{layout!r}>"

    tensors = {"q": spec.group_rows, "k": spec.columns, "v": spec.columns, "o": spec.group_rows}
    signature = {name: descriptor(rows) for name, rows in tensors.items()}
    for entry in f"{POINTERS} {SCALARS}".split():
        name, kind = entry.split(":")
        signature[name] = kind.replace("T", spec.dtype)
    constants: dict[str, object] = {
        "DTYPE": gl.float16 if spec.dtype == "fp16" else gl.bfloat16, "HEAD": spec.head, "GROUPS": spec.groups,
        "ROWS": spec.group_rows, "COLUMNS": spec.columns, "QUERIES": spec.queries, "K_STAGES": spec.key_stages,
        "V_STAGES": spec.value_stages, "ALTERNATE": spec.alternate, "SCHEDULE": spec.schedule, "CAUSAL": spec.causal,
        "JOINT": spec.joins_votes, "SPECULATIVE": spec.speculative, "ONES": spec.ones, "PIECES": spec.pieces,
        "ON_DEMAND": spec.on_demand, "CONSUMER_REGISTERS": spec.registers,
    }  # fmt: skip
    signature.update(dict.fromkeys(constants, "constexpr"))
    return signature, constants


def all_specialisations() -> list[Specialisation | PlainKernel]:
    """Every kernel of the library, of all families."""
    return [spec for family in FAMILIES for spec in family.all_specialisations()]


def _hopper(spec: Specialisation) -> tuple[Any, int, str, dict[str, Any]]:
    """Source, compute capability, architecture and compiler options of a Hopper kernel."""
    from hopper_prefill import prefill
    from triton.experimental.gluon import GluonASTSource
    from triton.experimental.gluon import language as gl

    signature, constants = _signature(spec, gl)
    # Triton asks for level 2 of register allocation, against a bug of ptxas 13; 4, the default of ptxas, spills less
    options = {"num_warps": 4, "ptx_options": "--regAllocOptLevel=4"}
    return GluonASTSource(prefill, signature, constants, {}), 90, "sm_90a", options


def _plain(spec: PlainKernel) -> tuple[Any, int, str, dict[str, Any]]:
    """The same of a kernel in plain Triton."""
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(spec.module), spec.function)
    source = ASTSource(function, spec.signature, dict(spec.constants), spec.divisors)
    options = {"num_warps": spec.warps, "num_stages": spec.stages}
    return source, spec.architecture, architecture_of(spec), options


def architecture_of(spec: Specialisation | PlainKernel) -> str:
    """What ptxas is told: sm_80, ..., with a suffix where the kernel's PTX needs one."""
    if isinstance(spec, PlainKernel):
        return f"sm_{spec.architecture}" if spec.ptx else ARCHITECTURES[spec.architecture]
    return "sm_90a"


def _source(spec: Specialisation | PlainKernel) -> Specialisation | PlainKernel:
    """The specialisation that Triton compiles: another's where several architectures share its PTX."""
    shares = isinstance(spec, PlainKernel) and spec.ptx
    return replace(spec, architecture=spec.ptx) if shares else spec  # type: ignore[union-attr]


@functools.lru_cache(maxsize=1)
def _generate(spec: Specialisation | PlainKernel) -> tuple[Any, str]:
    """Triton's compiled kernel and what ptxas reported."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler

    if triton.__version__ != TRITON_VERSION:
        raise BuildError(f"triton is {triton.__version__}; the kernels need exactly {TRITON_VERSION}")
    source, capability, architecture, options = _plain(spec) if isinstance(spec, PlainKernel) else _hopper(spec)
    # Triton itself binds every cubin from 9.0 on to one compute capability; this is where it asks
    compiler.sm_arch_from_capability = lambda _: architecture
    log = io.StringIO()
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope(), knobs.runtime.scope():
        triton.knobs.cache.dir = cache  # a cached kernel would come without the log of ptxas
        knobs.runtime.add_stages_inspection_hook = None if isinstance(spec, PlainKernel) else _hopper_stages
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.disable_line_info = True
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options={**options, "enable_fp_fusion": True}
            )
    return kernel, log.getvalue()


def _hopper_stages(_: Any = None, stages: dict[str, Any] | None = None, *__: Any) -> tuple[str, str] | None:
    """Triton's hook on its stages: what follows the one that makes PTX. Asked for a key to the cache, it has none."""
    if stages is None:
        return "", ""
    make = stages["ptx"]
    stages["ptx"] = lambda source, metadata: join(fix_roles(make(source, metadata)))
    return None


def _assemble(ptx: str, architecture: str) -> tuple[bytes, str]:
    """Machine code of PTX that was made for an earlier architecture, and ptxas's report."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [get_ptxas(80).path, "-v", f"--gpu-name={architecture}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"ptxas failed for {architecture}\n{done.stderr}")
        return target.read_bytes(), done.stderr


def ones_lie_behind(ptx: str, name: str) -> bool:
    """Whether the ones lie behind V in shared memory, wherever their distance is computed (kernels/hopper_product.py).

    Triton decides where they lie; a descriptor cannot hold a distance backwards.
    """

    def offset(register: str) -> int:
        """In shared memory; of every constant that is added to its address."""
        line = re.search(rf"\t(\w+)\.\w+ *\t{re.escape(register)}, ([%\w]+)(?:, (\d+))?;", ptx)
        if not line:
            raise BuildError(f"{name}: nothing in the PTX says what {register} is, where the ones lie")
        if line[2] == "global_smem":
            return 0
        return offset(line[2]) + (int(line[3]) if line[1] == "add" else 0)

    found = re.findall(r"sub\.s32 away, (%\w+), (%\w+);", ptx)
    return bool(found) and all(offset(ones) > offset(values) for ones, values in found)


def compile_kernel(spec: Specialisation | PlainKernel, output: Path) -> dict[str, Any]:
    """Compiles one specialisation to `output/<name>.cubin` and returns its line of the manifest.

    Raises:
        BuildError: too many spilled bytes, too much shared memory, serialised tensor-core instructions, PTX that is
            not as expected, or ones in front of V.
    """
    source, architecture = _source(spec), architecture_of(spec)
    try:
        kernel, text = _generate(source)
    except PtxError as error:
        raise BuildError(f"{spec.name}: Triton's PTX is not as expected: {error}") from error
    if isinstance(spec, Specialisation) and spec.ones and not ones_lie_behind(kernel.asm["ptx"], spec.name):
        raise BuildError(f"{spec.name}: the ones do not lie behind V in shared memory")
    cubin = kernel.asm["cubin"]
    if source != spec:
        cubin, text = _assemble(kernel.asm["ptx"], architecture)
    spilled = max([int(n) for n in re.findall(r"(\d+) bytes spill stores", text)], default=-1)
    if spilled < 0:
        raise BuildError(f"{spec.name}: no report from ptxas\n{text}")
    if spilled > spec.spills:
        raise BuildError(f"{spec.name}: {spilled} bytes spilled, {spec.spills} are accepted")
    capability = spec.architecture if isinstance(spec, PlainKernel) else 90
    if kernel.metadata.shared > SHARED_BYTES[capability]:
        raise BuildError(
            f"{spec.name}: {kernel.metadata.shared} bytes of shared memory do not fit every {architecture}"
        )
    serialised = [line for line in text.splitlines() if re.search(r"C75\d\d", line)]
    if serialised:
        raise BuildError(f"{spec.name}: ptxas serialised the tensor-core instructions\n{serialised[0]}")
    (output / f"{spec.name}.cubin").write_bytes(cubin)
    threads = re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])
    registers = re.search(r"Used (\d+) registers", text)
    assert threads and registers
    line: dict[str, Any] = {}
    if not isinstance(spec, PlainKernel):
        line = {"family": "hopper", "rows": spec.rows}
    return {
        **line, **asdict(spec), "name": spec.name, "architecture": architecture, "capability": capability,
        "entry": kernel.metadata.name, "file": f"{spec.name}.cubin", "bytes": len(cubin), "threads": int(threads[1]),
        "shared_bytes": kernel.metadata.shared, "registers_at_entry": int(registers[1]), "spilled_bytes": spilled,
        "boxes": [[d["block_size"][-2], d["block_size"][-1]] for d in kernel.metadata.tensordesc_meta],
    }  # fmt: skip


def _compile(specs: list[Specialisation | PlainKernel], output: Path) -> list[dict[str, Any]]:
    return [compile_kernel(spec, output) for spec in specs]


def build(specs: list[Specialisation | PlainKernel], output: Path, jobs: int) -> dict[str, Any]:
    """Compiles `specs` and writes `manifest.json`; returns the manifest."""
    output.mkdir(parents=True, exist_ok=True)
    groups: dict[Specialisation | PlainKernel, list[Specialisation | PlainKernel]] = {}
    for spec in specs:
        groups.setdefault(_source(spec), []).append(spec)  # what shares PTX is compiled in one process
    kernels = []
    with concurrent.futures.ProcessPoolExecutor(max_workers=jobs) as pool:
        for line in itertools.chain.from_iterable(pool.map(_compile, groups.values(), itertools.repeat(output))):
            kernels.append(line)
            print(f"{line['name']:45s} {line['bytes'] // 1024:5d} KiB  {line['shared_bytes']:6d} B shared  "
                  f"{line['spilled_bytes']:4d} B spilled", flush=True)  # fmt: skip
    manifest = {"version": MANIFEST_VERSION, "triton": TRITON_VERSION, "kernels": kernels}
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the cubins and manifest.json")
    parser.add_argument("--only", default="", help="regular expression on the kernels' names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--portable-on-hopper", action="store_true", help="also the portable prefill kernels for 9.0")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    everything = all_specialisations()
    if arguments.portable_on_hopper:
        everything += prefill_specifications.hopper_specialisations()
    specs = [spec for spec in everything if re.search(arguments.only, spec.name)]
    if not specs:
        parser.error(f"no kernel matches {arguments.only!r}")
    if arguments.list:
        print("\n".join(spec.name for spec in specs))
        return 0
    try:
        build(specs, arguments.output, arguments.jobs)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
