"""The assembly that finds a thread's maxima by comparing integers, executed step by step.

The emulated kernels only see what it is for, and CI has no GPU that would run it.
"""

from __future__ import annotations

import re

import pytest
import torch
from emulated_gluon import load_kernel_modules
from torch import Tensor


def execute(asm: str, inputs: list[int], outputs: int) -> tuple[list[int], bool]:
    """What one thread's assembly leaves in its outputs, as bits, and whether it ran to its end."""
    values = {f"${outputs + n}": value for n, value in enumerate(inputs)}
    steps = [step.strip(" {}") for step in asm.split(";")]
    for step in steps:
        operation, _, rest = step.partition(" ")
        names = re.split(r", *", rest)
        if operation in ("max.s32", "min.s32"):
            values[names[0]] = (max if operation == "max.s32" else min)(values[names[1]], values[names[2]])
        elif operation == "mov.b32":
            values[names[0]] = values[names[1]]
        elif operation == "setp.lt.s32":
            values[names[0]] = values[names[1]] < int(names[2])
        elif operation == "selp.b32":
            values[names[0]] = values[names[1]] if values[names[3]] else values[names[2]]
        elif step == "@!some bra settled":
            if not values["some"]:
                return [values[f"${n}"] for n in range(outputs)], False
        else:
            assert step in ("", "settled:") or operation in (".reg", "vote.sync.any.pred"), step
    return [values[f"${n}"] for n in range(outputs)], True


def scores(kind: str, rows: int, columns: int) -> Tensor:
    """Of one thread, `[rows, columns]`."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    if kind == "negative":
        return -made.abs() - 1e-30
    if kind == "one row negative":
        made[rows // 2] = -made[rows // 2].abs()
    if kind == "hidden":
        made = torch.full_like(made, -torch.inf)
        made[0, 3], made[1, 5] = -0.0, -3.0
    return made


@pytest.mark.parametrize("kind", ["both signs", "negative", "one row negative", "hidden"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 128), (128, 128)])
def test_the_maximum_of_every_row(kind: str, rows: int, columns: int) -> None:
    of_a_thread = scores(kind, rows // 32, columns // 4)
    # two columns of a row follow each other, then two of the row eight below; 64 rows after the 64 before
    order = of_a_thread.reshape(rows // 64, 2, columns // 8, 2).transpose(1, 2)
    bits = order.flatten().contiguous().view(torch.int32).tolist()
    asm = load_kernel_modules()["hopper_softmax"]._maxima_asm(rows, columns)
    found, whole = execute(asm, bits, rows // 32)
    assert torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist() == of_a_thread.amax(1).tolist()
    assert whole == (kind != "both signs")
