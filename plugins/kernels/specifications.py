"""Which Hopper prefill kernels are compiled, and how each is shaped.

A specialisation is chosen by dtype, head size, schedule, causality and the rows of a decision; everything else is an
argument. Where a number is not obvious it was measured; README.md beside this folder says what and on which hardware.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("fp16", "bf16")
HEADS = (64, 128, 256)
ACCEPTED_SPILLS = {
    ("dense", 64): 640, ("skip", 64): 96, ("general", 64): 2560,
    ("dense", 128): 96, ("skip", 128): 160, ("general", 128): 3328,
    ("dense", 256): 224, ("skip", 256): 320, ("general", 256): 7168,
}  # fmt: skip
"""Bytes a thread may spill, by role and head size; what the build last reported and a little more."""


@dataclass(frozen=True, slots=True)
class Specialisation:
    """One compiled kernel.

    Args:
        dtype: "fp16" or "bf16".
        head: head size in shared memory; smaller heads are zero-filled by the copy engine.
        schedule: "dense", "skip" (overlapped), "plain" (skips, no overlap inside a warpgroup) or "general".
        causal: compiled for causal attention ("general" asks at run time).
        joint: decides 128 rows (two warpgroups together) instead of 64.
        groups: consumer warpgroups of 64 query rows each.
        columns: key columns of a loaded tile.
        stages: tiles of K and of V in flight, a power of two.
        registers: registers a thread of a consumer may use.
        spills: bytes of spilled registers that are accepted; more fails the build.
        output_in_q: the output is staged in Q's shared memory, where there is no room of its own for it.
        lazy: the dense schedule multiplies its output only where a maximum rises (the others always do so).
        fenced: the dense schedule's exponentials form a block of their own.
    """

    dtype: str
    head: int
    schedule: str
    causal: bool
    joint: bool
    groups: int
    columns: int
    stages: int
    registers: int
    spills: int
    output_in_q: bool
    lazy: bool
    fenced: bool

    @property
    def name(self) -> str:
        parts = [f"sm90a_{self.dtype}_d{self.head}", self.schedule]
        if self.causal:
            parts.append("causal")
        if self.schedule != "dense":
            parts.append("128x128" if self.joint else "64x128")
        return "_".join(parts)


def _specialise(dtype: str, head: int, role: str, causal: bool, joint: bool) -> Specialisation:
    """`role` is what the kernel is chosen for: "dense", "skip" or "general"."""
    groups, columns, stages, registers, schedule = 2, 128, 2, 240, role
    if head == 64 and role != "general":
        stages = 4
        if role == "dense":
            groups, registers = 3, 160
    if head == 256:
        stages = 1
        if role == "dense":
            columns, stages = 64, 2
        if role == "skip":
            schedule = "plain"
    return Specialisation(
        dtype, head, schedule, causal, joint, groups, columns, stages, registers, ACCEPTED_SPILLS[role, head],
        output_in_q=head == 256, lazy=head != 128, fenced=head == 256 and causal,
    )  # fmt: skip


def all_specialisations() -> list[Specialisation]:
    """Every kernel of the library."""
    result = []
    for dtype in DTYPES:
        for head in HEADS:
            for causal in (False, True):
                result.append(_specialise(dtype, head, "dense", causal, False))
                result += [_specialise(dtype, head, "skip", causal, joint) for joint in (False, True)]
            result += [_specialise(dtype, head, "general", False, joint) for joint in (False, True)]
    return result
