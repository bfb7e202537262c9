"""Small calls of all of Hopper's prefill schedules, for compute-sanitizer on an H100 or H200:

compute-sanitizer --tool memcheck python tests/plugins/sanitize.py
compute-sanitizer --tool racecheck --racecheck-report analysis python tests/plugins/sanitize.py
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_checks import run
from planted import THRESHOLD, WIDE_KERNELS, planted

CAUSAL = (False, True)
calls = skipped = 0


def call(shape: tuple[int, ...], *, keep: float = 0.4, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
    global calls, skipped
    counts = run(*planted(*shape, keep=keep, dtype=dtype), **options)[1]
    calls, skipped = calls + 1, skipped + int(counts[:, 0].sum())


def numbers(*values: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device="cuda")


for size in (64, 128, 256):
    for causal in CAUSAL:
        for br, threshold in ((64, 0.0), (64, THRESHOLD), (128, THRESHOLD)):
            call((1, 2, 1, 300, 520, size), br=br, threshold=threshold, is_causal=causal)
        call((1, 2, 1, 200, 400, size), br=64, threshold=THRESHOLD, is_causal=causal, window=150)
for size, br in WIDE_KERNELS:
    for causal in CAUSAL:
        call((4, 32, 4, 129, 400, size), br=br, threshold=THRESHOLD, is_causal=causal)
        lengths = numbers(400, 200, 0, 1)
        call((4, 32, 4, 129, 400, size), br=br, threshold=THRESHOLD, is_causal=causal, kv_lengths=lengths)
        rows = numbers(1024, 961, 960, 200)
        call((4, 32, 4, 1024, 200, size), br=br, threshold=THRESHOLD, is_causal=causal, q_lengths=rows)
        call((12, 32, 4, 129, 100, size), br=br, threshold=THRESHOLD, is_causal=causal)  # items of one tile, in a row
for causal in CAUSAL:
    scale = numbers(1.0, dtype=torch.float32)  # both kernels are enqueued
    call((2, 4, 2, 200, 400, 128), dtype=torch.float16, br=64, threshold=THRESHOLD, is_causal=causal,
         threshold_scale=scale)  # fmt: skip
    call((1, 12, 4, 200, 17000, 128), keep=0.02, br=64, threshold=THRESHOLD, is_causal=causal)  # V on demand
assert skipped > 0
print(f"{calls} calls, {skipped} tiles skipped")
