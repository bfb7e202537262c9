"""The ahead-of-time build: what is listed, and that a subset compiles without spilling or serialising."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_gluon import load_kernel_modules
from emulation import PLUGINS, plugin_module

TRITON = pytest.importorskip("triton", reason="the kernels are compiled by triton==3.9.0")
HOPPER_SUBSET = r"bf16_d128_(dense_causal|skip_causal_128)|fp16_d64_dense$|fp16_d128_wide_64|fp16_d256_plain_64"
DECODE_SUBSET = (
    r"sm80_bf16_d128_decode_(s|v)|sm90_fp16_d64_decode_scores|sm100_bf16_d128_decode_v|sm120_fp16_d256_decode_(s|v)"
)
PREFILL_SUBSET = "sm100_bf16_d128_prefill_skip_128x128"
SUBSET = f"{HOPPER_SUBSET}|{DECODE_SUBSET}|{PREFILL_SUBSET}"


def test_every_combination_is_listed_once() -> None:
    specs = plugin_module("specifications").all_specialisations()
    kernels = load_kernel_modules()
    assert len({spec.name for spec in specs}) == len(specs) == 60
    text = (PLUGINS / "kernels/hopper_common.py").read_text()
    drift = re.search(r"^DRIFT = gl\.constexpr\((\d+)\)", text, re.M)
    bits = re.search(r"^DRIFT_BITS = gl\.constexpr\((\d+)\)", text, re.M)
    assert drift and bits and int(drift[1]) == 1 << int(bits[1])
    for spec in specs:
        assert not spec.joint or spec.groups == 2
        assert spec.key_stages + spec.value_stages <= int(drift[1])
        assert not spec.alternate or (spec.key_stages + spec.value_stages) % 2 == 1  # else V follows V
        # a step waits for the next V tile before the previous one is given back
        assert spec.schedule != "dense" or spec.value_stages >= 2
        # a warpgroup's 128 threads, the producers' 24 registers: the register file has 64 K
        assert (spec.groups * spec.registers + 24) * 128 <= 65536
        assert spec.queries != "queue" or (spec.schedule == "wide" and not spec.joint)  # others take no tickets
        buffers = kernels["hopper_queries"].query_buffers(spec.queries, spec.groups)
        rows = (spec.key_stages + spec.value_stages) * spec.columns + spec.group_rows * buffers
        shape = spec.groups, spec.queries, spec.key_stages, spec.alternate, spec.joins_votes, int(drift[1])
        cells = kernels["hopper_shared"].cell_count(*shape)
        triton = 232  # bytes of its own, for the roles
        assert rows * spec.head * 2 + spec.ones * 16 * 64 * 2 + cells * 8 + triton <= 232448


def test_a_decode_kernel_is_listed_for_every_architecture_and_fits_its_name() -> None:
    specs = plugin_module("decode_specifications").all_specialisations()
    build = plugin_module("build_kernels")
    assert len({spec.name for spec in specs}) == len(specs) == 4 * 2 * 3 * 3
    assert {spec.architecture for spec in specs} == set(build.ARCHITECTURES) == set(build.SHARED_BYTES)
    for role in ("scores", "values", "combine"):
        source = (PLUGINS / "kernels" / f"decode_{role}.py").read_text()
        signature = re.search(rf"def {role}\((.*?)\):", source, re.S)
        assert signature
        names = [part.split(":")[0].strip() for part in signature[1].split(",") if part.strip()]
        for spec in specs:
            if spec.role == role:
                assert names == list(spec.signature)
    # the library counts chunks, lanes and columns of the output as the kernels do
    common = dict(
        re.findall(r"^(\w+) = tl\.constexpr\((\d+)\)", (PLUGINS / "kernels/decode_common.py").read_text(), re.M)
    )
    combine = (PLUGINS / "kernels/decode_combine.py").read_text()
    header = (PLUGINS / "csrc/launch_decode.h").read_text() + (PLUGINS / "csrc/launch_decode.cpp").read_text()
    host = dict(re.findall(r"k(\w+) = (\d+);", header))
    assert host["DECODE_LANES"] == common["LANES"] and host["DECODE_CHUNK"] == common["CHUNK"]
    assert host["OUTPUT_COLUMNS"] == re.findall(r"^SLICE = tl\.constexpr\((\d+)\)", combine, re.M)[0]
    assert {spec.columns for spec in specs} <= {int(common["TILE"]) // n for n in (1, 2, 4)}


def test_a_portable_prefill_kernel_is_listed_for_every_architecture_but_hopper() -> None:
    build = plugin_module("build_kernels")
    specs = plugin_module("prefill_specifications").all_specialisations()
    assert len({spec.name for spec in specs}) == len(specs) == 3 * 2 * 3 * 2 * 2
    assert {build.architecture_of(spec) for spec in specs} == {"sm_80", "sm_100", "sm_120"}
    hopper = plugin_module("prefill_specifications").hopper_specialisations()
    assert {build.architecture_of(spec) for spec in hopper} == {"sm_90"} and len(hopper) * 3 == len(specs)
    source = (PLUGINS / "kernels" / "portable_prefill.py").read_text()
    signature = re.search(r"def portable_prefill\((.*?)\):", source, re.S)
    assert signature
    names = [part.split(":")[0].strip() for part in signature[1].split(",") if part.strip()]
    for spec in specs:
        assert names == list(spec.signature)
        assert spec.joint == (spec.rows == 128) and spec.columns == 128


def test_arguments_are_in_the_order_of_the_kernel() -> None:
    build = plugin_module("build_kernels")
    source = (PLUGINS / "kernels" / "hopper_prefill.py").read_text()
    signature = re.search(r"def prefill\((.*?)\):", source, re.S)
    assert signature
    names = [part.split(":")[0].strip() for part in signature[1].split(",") if part.strip()]
    listed = [entry.split(":")[0] for entry in f"{build.POINTERS} {build.SCALARS}".split()]
    assert names[: 4 + len(listed)] == ["q", "k", "v", "o", *listed]


def test_the_bits_of_given_are_the_same_in_python_and_c() -> None:
    host = dict(re.findall(r"^    k(\w+) = (\d+),", (PLUGINS / "csrc/given.h").read_text(), re.M))
    assert len(host) == 15
    found = set()
    for file in ("hopper_common", "plain_common"):
        text = (PLUGINS / f"kernels/{file}.py").read_text()
        kernel = dict(re.findall(r"^(\w+) = [gt]l\.constexpr\((\d+)\)", text, re.M))
        for name, value in host.items():
            seen = kernel.get(name, kernel.get(f"HAS_{name}"))
            assert seen in (None, value), name
            found |= {name} if seen else set()
    assert found == set(host)


def test_ones_in_front_of_values_are_found() -> None:
    """Their distance from V is computed modulo a descriptor's 14 bits, in which there is no way back."""
    build = plugin_module("build_kernels")
    ptx = """
\tmov.b32 \t%r1, global_smem;
\tadd.s32 \t%r2, %r1, 65536;
\tand.b32 \t%r3, %r2, 16777200;
\tadd.s32 \t%r4, %r1, 163840;
\tand.b32 \t%r5, %r4, 16777200;
\t{ .reg .b32 away; sub.s32 away, %r5, %r3; shl.b32 away, away, 12; }
"""
    assert build.ones_lie_behind(ptx, "x")
    assert not build.ones_lie_behind(ptx.replace("163840", "1024"), "x")
    assert not build.ones_lie_behind("", "x")
    with pytest.raises(build.BuildError, match=r"x: .*%r5"):
        build.ones_lie_behind(ptx.replace("\t%r5, %r4", "\t%r6, %r4"), "x")


def test_a_subset_compiles(tmp_path: Path) -> None:
    """At most 12 kernels; fails on spills beyond the list and on serialised products, as the whole build does."""
    command = [sys.executable, str(PLUGINS / "build_kernels.py"), "--only", SUBSET]
    listed = subprocess.run([*command, "--output", str(tmp_path), "--list"], capture_output=True, text=True, check=True)
    assert 4 <= len(listed.stdout.split()) <= 12
    done = subprocess.run([*command, "--output", str(tmp_path), "--jobs", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    # a masked and an unmasked loop, once for all warpgroups; at least the first quarter of 64 scores a thread
    for name in ("bf16_d128_dense_causal", "fp16_d64_dense"):
        under = exponentials_under_products(tmp_path / f"sm90a_{name}.cubin")
        assert len(under) == 2 and all(16 <= count < 64 for count in under), under
    # operands' addresses stay in uniform registers: a loop that ptxas takes as divergent moves two for every product
    for name in ("bf16_d128_skip_causal_128x128", "fp16_d256_plain_64x128", "fp16_d128_wide_64x128"):
        loops = tile_loops(tmp_path / f"sm90a_{name}.cubin")
        # one for masked tiles, one for others; of two warpgroups that decide together another, in which they take turns
        assert len(loops) == {"plain": 1, "wide": 2, "skip": 3}[name.split("_")[2]]
        assert all(body.count(" R2UR ") < 0.5 * body.count(" HGMMA.") for body in loops), name
        assert all("0xfffff8" not in body and "0xfffffc" not in body for body in loops), name  # no address is masked
    # the wide kernel's row sums come with the product: no addition for every score
    assert all(" HGMMA.64x72x16" in body and body.count(" FADD ") < 16 for body in loops)
    # of its unmasked loop, nothing is issued between the eight products with K but their operands' addresses
    code = [match[1] for match in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(\S+)", loops[0])]
    places = [at for at, name in enumerate(code) if name.startswith("HGMMA.")][:8]
    between = [name.split(".")[0] for name in code[places[0] : places[7]] if not name.startswith("HGMMA.")]
    assert set(between) <= {"UMOV", "UIADD3"} and len(between) <= 28, between
    architectures = {"sm_80": 99 << 10, "sm_90a": 227 << 10, "sm_100f": 227 << 10, "sm_120": 99 << 10,
                     "sm_100": 99 << 10}  # fmt: skip
    assert {kernel["architecture"] for kernel in manifest["kernels"]} == set(architectures)
    for kernel in manifest["kernels"]:
        image = (tmp_path / kernel["file"]).read_bytes()
        assert image[:4] == b"\x7fELF" and kernel["bytes"] == len(image) < 300_000
        assert b".debug_info" not in image and b".debug_line" not in image
        assert kernel["spilled_bytes"] <= kernel["spills"]
        assert kernel["shared_bytes"] <= architectures[kernel["architecture"]]
        if kernel["family"] != "hopper":
            assert kernel["threads"] == 32 * kernel["warps"] and kernel["boxes"] == []
            continue
        assert kernel["threads"] == 128 * (kernel["groups"] + 1)
        assert " LDS.U8 " not in disassemble(tmp_path / kernel["file"])  # roles do not come through shared memory
        rows, columns = [kernel["group_rows"], 64], [kernel["columns"], 64]
        assert kernel["boxes"] == [rows, columns, columns, rows]


def disassemble(cubin: Path) -> str:
    disassembler = Path(TRITON.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return subprocess.run([str(disassembler), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def tile_loops(cubin: Path) -> list[str]:
    """The loops over tiles: from the target of a branch backwards to that branch, with products and no loop inside.

    What stands out of line branches backwards as well, over many jumps.
    """
    lines = disassemble(cubin).splitlines()
    labels = {line.strip().rstrip(":"): at for at, line in enumerate(lines) if line.startswith(".L_")}
    loops: list[str] = []
    for at, line in enumerate(lines):  # an inner loop ends before the one around it
        if target := re.search(r"BRA `\((\.L_\w+)\)", line):
            body = "\n".join(lines[labels[target[1]] : at])  # empty where it leads forwards
            jumps = len(re.findall(r"\*/\s+BRA ", body))
            if " HGMMA." in body and jumps <= 1 and not any(inner in body for inner in loops):
                loops.append(body)
    return loops


def exponentials_under_products(cubin: Path) -> list[int]:
    """Per loop of a dense kernel: exponentials between the wait for the scores and the wait for the product with V."""
    counts: list[int] = []
    inside = False
    for line in disassemble(cubin).splitlines():
        if "WARPGROUP.DEPBAR.LE gsb0, 0x3" in line:
            counts.append(0)
            inside = True
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line:
            inside = False
        elif inside and "MUFU.EX2" in line:
            counts[-1] += 1
    return counts


def test_the_build_refuses_spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    build = plugin_module("build_kernels")
    spec = next(
        s for s in plugin_module("specifications").all_specialisations() if s.name.endswith("bf16_d128_general_64x128")
    )
    monkeypatch.delenv("BSA_ACCEPT_SPILLS", raising=False)
    with pytest.raises(build.BuildError, match="0 are accepted"):
        build.compile_kernel(dataclasses.replace(spec, spills=0), tmp_path)


def test_no_kernel_matches() -> None:
    done = subprocess.run([sys.executable, str(PLUGINS / "build_kernels.py"), "--output", "x", "--only", "nothing"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "no kernel matches" in done.stderr
