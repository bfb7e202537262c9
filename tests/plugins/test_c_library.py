"""The C ABI: layout, refusals, errors; no GPU."""

from __future__ import annotations

import ctypes
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from emulation import PLUGINS, Emulation, compile_library

from sparse_attention import native

HEADER = PLUGINS / "include" / "block_skip_attention.h"


def call(rows: int = 128, **options: object) -> native.Call:
    q = torch.zeros(1, 4, rows, options.pop("size", 128), dtype=options.pop("dtype", torch.bfloat16))  # type: ignore
    k = torch.zeros(1, options.pop("kv_heads", 2), 256, q.shape[3], dtype=q.dtype)  # type: ignore[call-overload]
    return native.pack(q, k, k, torch.zeros_like(q), **options)  # type: ignore[arg-type]


def test_the_header_is_plain_c_and_python_packs_its_layout(tmp_path: Path) -> None:
    (tmp_path / "layout.c").write_text(
        '#include "block_skip_attention.h"\n#include <stdio.h>\n#define AT(f) printf("%zu ", offsetof(bsa_params, f))\n'
        "int main(void) { AT(q); AT(workspace_bytes); AT(batch); AT(unit); AT(q_stride); AT(bias_stride); AT(scale);"
        ' printf("%zu %d", sizeof(bsa_params), BSA_ABI_VERSION); return 0; }\n'
    )
    program = tmp_path / "layout"
    subprocess.run(
        ["gcc", "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{HEADER.parent}",
         str(tmp_path / "layout.c"), "-o", str(program)], check=True,
    )  # fmt: skip
    *offsets, size, abi = map(int, subprocess.run([str(program)], capture_output=True, check=True).stdout.split())
    q = torch.zeros(3, 5, 7, 16, dtype=torch.float16)
    packed = native.pack(q, q, q, q, scale=0.25, window=9, unit="group").packed
    assert size == len(packed) and abi == native.ABI_VERSION

    def at(offset: int, kind: type) -> object:
        return kind.from_buffer_copy(packed, offset).value  # type: ignore[attr-defined]

    assert at(offsets[0], ctypes.c_uint64) == q.data_ptr()
    assert at(offsets[1], ctypes.c_uint64) == 0
    assert at(offsets[2], ctypes.c_int32) == 3
    assert at(offsets[3], ctypes.c_int32) == 1
    assert at(offsets[4], ctypes.c_int64) == 5 * 7 * 16
    assert at(offsets[5], ctypes.c_int64) == 0
    assert at(offsets[6], ctypes.c_float) == 0.25


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"br": 32}, "64 x 128 and 128 x 128"),
        ({"bc": 64}, "tiles of 128 x 64"),
        ({"unit": "group"}, "group"),
        ({"size": 320}, "at most 256"),
        ({"size": 36}, "multiples of 8"),
        ({"kv_heads": 3}, "no multiple"),
        ({"scale": 0.0}, "scale"),
        ({"dtype": torch.float32}, "dtype"),
    ],
)
def test_refusals_name_the_reason(emulation: Emulation, options: dict[str, object], words: str) -> None:
    refused = call(**options)
    assert words in emulation.library.refusal(refused)
    with pytest.raises(native.KernelError, match=r"invalid|unsupported"):
        emulation.library.launch(refused, 0)


def test_too_many_rows_are_refused_before_anything_is_enqueued(emulation: Emulation) -> None:
    rows = torch.empty(1 << 16, 64, 40000, 64, dtype=torch.bfloat16, device="meta")
    counts = torch.full((64, 2), 7, dtype=torch.int32)
    refused = native.pack(rows, rows, rows, rows, br=64, bc=128, scale=1.0, counts=counts)
    assert "2^31 blocks of 64 query rows" in emulation.library.refusal(refused)
    workspace = torch.empty(256, dtype=torch.uint8)
    with pytest.raises(native.KernelError, match=r"2\^31 blocks"):
        emulation.library.launch(refused.with_workspace(workspace), 0)
    assert bool((counts == 7).all())


def test_supported(emulation: Emulation) -> None:
    assert emulation.library.refusal(call()) == ""
    assert emulation.library.refusal(call(unit="group", kv_heads=4)) == ""
    assert emulation.library.refusal(call(rows=1, unit="group", br=1)) == ""
    assert emulation.library.refusal(call(rows=8, unit="group", br=16)) == ""
    assert "as many rows as seq_q, here 8" in emulation.library.refusal(call(rows=8, br=4))


@pytest.mark.parametrize("capability", [75, 86, 90, 103, 110, 121])
def test_what_a_device_cannot_run_is_named(emulation: Emulation, capability: int) -> None:
    emulation.driver.emulated_capability(capability)
    try:
        decode, prefill = (emulation.library.refusal(call(rows=rows)) for rows in (1, 128))
    finally:
        emulation.driver.emulated_capability(90)
    name = f"capability {capability // 10}.{capability % 10}"
    for refusal in (decode, prefill):
        assert (name in refusal and "sm_80" in refusal) == (capability in (75, 110))


def test_version_lists_every_architecture(emulation: Emulation) -> None:
    assert emulation.library.version["abi"] == native.ABI_VERSION
    assert emulation.library.version["architectures"] == ["sm_80", "sm_90a", "sm_100", "sm_100f", "sm_120"]


def test_the_workspace_follows_the_call(emulation: Emulation) -> None:
    size = emulation.library.workspace_size
    skipping = {"threshold": 0.1}
    assert size(call()) == 256
    assert size(call(unit="group")) == 0  # no kernel
    assert 256 < size(call(rows=1)) < size(call(rows=1, **skipping)) < size(call(rows=16, **skipping))
    for splits in (1, 16):
        assert size(call(rows=1, kv_splits=splits, **skipping)) == size(call(rows=1, **skipping))
    decode = call(rows=1)
    with pytest.raises(native.KernelError, match=f"workspace has {size(decode) - 1} bytes"):
        emulation.library.launch(decode.with_workspace(torch.empty(size(decode) - 1, dtype=torch.uint8)), 0)


def test_another_architecture_is_named(emulation: Emulation, objects: Path, tmp_path: Path) -> None:
    library = _library_of_its_own(emulation, objects, tmp_path)
    emulation.driver.emulated_capability(110)
    try:
        refusal = library.refusal(call())
        assert "capability 11.0" in refusal and "sm_100" in refusal
    finally:
        emulation.driver.emulated_capability(90)


def test_rows_too_far_apart_for_the_portable_kernels_are_refused(emulation: Emulation) -> None:
    q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)
    k = torch.empty_strided((1, 1, 2, 64), (1 << 25, 1 << 25, 1 << 24, 1), dtype=q.dtype)
    far = native.pack(q, k, k, q)
    assert emulation.library.refusal(far) == ""
    emulation.driver.emulated_capability(86)
    try:
        assert "16777216 elements apart" in emulation.library.refusal(far)
    finally:
        emulation.driver.emulated_capability(90)


def _library_of_its_own(emulation: Emulation, objects: Path, folder: Path) -> native.Library:
    return native.Library(compile_library(folder, objects, str(emulation.driver._name)))


def test_workspace_is_required(emulation: Emulation) -> None:
    with pytest.raises(native.KernelError, match="workspace has 0 bytes"):
        emulation.library.launch(call(), 0)


def test_params_of_another_version(emulation: Emulation) -> None:
    packed = bytearray(call().packed)
    packed[4] += 1
    with pytest.raises(native.KernelError, match="abi_version 3"):
        emulation.library.launch(native.Call(bytes(packed), ()), 0)


def test_prepare_from_many_threads(emulation: Emulation, objects: Path, tmp_path: Path) -> None:
    library = _library_of_its_own(emulation, objects, tmp_path)
    failures: list[BaseException] = []

    def prepare() -> None:
        try:
            for causal in (False, True):
                library.prepare(call(is_causal=causal, threshold=0.1))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_without_a_driver_the_status_says_so(objects: Path, tmp_path: Path) -> None:
    library = native.Library(compile_library(tmp_path, objects, "libno_such_cuda.so.1"))
    assert library.refusal(call()) == ""  # the kernels exist; it is the machine that lacks something
    with pytest.raises(native.KernelError, match="no CUDA driver") as caught:
        library.launch(call(), 0)
    assert "libno_such_cuda.so.1" in caught.value.found


def test_nothing_but_the_c_abi_is_exported(emulation: Emulation) -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(emulation.library.path)], capture_output=True, text=True
    )
    names = {line.split()[-1] for line in listing.stdout.splitlines() if " T " in line}
    assert names == {"bsa_params_init", "bsa_launch", "bsa_prepare", "bsa_workspace_size",
                     "bsa_workspace_size_any_device", "bsa_supported", "bsa_version", "bsa_status_string",
                     "bsa_last_error"}  # fmt: skip
