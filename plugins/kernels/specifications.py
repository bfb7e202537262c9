"""Which Hopper prefill kernels are compiled, and how each is shaped.

A specialisation is chosen by dtype, head size, schedule, causality and the rows of a decision; everything else is an
argument. Where a number is not obvious it was measured; README.md beside this folder says what and on which hardware.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("fp16", "bf16")
HEADS = (64, 128, 256)
ACCEPTED_SPILLS = {
    ("dense", 64): 32, ("skip", 64): 0, ("wide", 64): 8, ("general", 64): 1024,
    ("dense", 128): 0, ("skip", 128): 0, ("wide", 128): 8, ("general", 128): 1472,
    ("dense", 256): 0, ("skip", 256): 32, ("general", 256): 3200,
}  # fmt: skip
"""Bytes a thread may spill, by role and head size; what the build last reported and a little more."""


@dataclass(frozen=True, slots=True)
class Specialisation:
    """One compiled kernel.

    Args:
        dtype: "fp16" or "bf16".
        head: head size in shared memory; smaller heads are zero-filled by the copy engine.
        schedule: "dense", "skip" (overlapped), "plain" or "wide" (skip, without overlap inside a warpgroup; "wide" has
            more rows) or "general".
        causal: compiled for causal attention ("general" asks at run time).
        joint: decides 128 rows instead of 64.
        groups: consumer warpgroups.
        group_rows: query rows of each, 64, or 128 that decide without another warpgroup.
        columns: key columns of a loaded tile.
        queries: buffers of Q and the output, "double", "queue", "apart" or "shared" (kernels/hopper_queries.py).
        key_stages: tiles of K in flight.
        value_stages: tiles of V in flight.
        alternate: K and V take turns in one ring of all these buffers (kernels/hopper_rings.py).
        ones: the product with V also gives P's row sums (kernels/hopper_product.py).
        pieces: in which P is then made and multiplied.
        registers: registers a thread of a consumer may use.
        spills: bytes of spilled registers that are accepted; more fails the build.
        speculative: the dense schedule takes exponentials before it checks their reference.
        on_demand: while few tiles are kept, V is loaded only once a tile is.
    """

    dtype: str
    head: int
    schedule: str
    causal: bool
    joint: bool
    groups: int
    group_rows: int
    columns: int
    queries: str
    key_stages: int
    value_stages: int
    alternate: bool
    ones: bool
    pieces: int
    registers: int
    spills: int
    speculative: bool
    on_demand: bool

    @property
    def rows(self) -> int:
        """Query rows of a work item."""
        return self.groups * self.group_rows

    @property
    def joins_votes(self) -> bool:
        """Whether no warpgroup has all rows of a decision."""
        return self.joint and self.group_rows == 64

    @property
    def name(self) -> str:
        parts = [f"sm90a_{self.dtype}_d{self.head}", self.schedule]
        if self.causal:
            parts.append("causal")
        if self.schedule != "dense":
            parts.append("128x128" if self.joint else "64x128")
        return "_".join(parts)


def _specialise(dtype: str, head: int, role: str, causal: bool, joint: bool) -> Specialisation:
    """`role` is what the kernel is chosen for: "dense", "skip", "wide" (skip, many rows in the call) or "general"."""
    groups, group_rows, columns, keys, values, registers, schedule = 2, 64, 128, 3, 2, 240, role
    queries = "double" if role in ("skip", "general") else "apart"
    if role == "wide" and not joint:
        groups, registers, queries = 3, 160, "queue" if head == 128 else "double"
    if head == 64:
        keys, values = (2, 2) if role == "general" else (3, 5) if role == "wide" else (4, 4)
        if role == "dense":
            groups, registers = 3, 160
        if role == "wide" and joint:
            group_rows = 128
        if role == "skip" and joint:
            queries = "apart"  # for small calls only, and "double" was not timed there
    if head == 256:
        queries, keys, values = "shared", 1, 1
        if role == "dense":
            columns, keys, values = 64, 2, 2
        if role == "skip":
            schedule = "plain"
    return Specialisation(
        dtype, head, schedule, causal, joint, groups, group_rows, columns, queries, keys, values,
        alternate=head == 128 and role in ("dense", "wide"),
        ones=head <= 128 and role in ("skip", "wide"), pieces=2 if head == 128 and role == "wide" else 4,
        registers=registers, spills=ACCEPTED_SPILLS[role, head],
        speculative=head <= 128, on_demand=role in ("skip", "wide") and head == 128,
    )  # fmt: skip


def all_specialisations() -> list[Specialisation]:
    """Every kernel of the library."""
    result = []
    for dtype in DTYPES:
        for head in HEADS:
            for causal in (False, True):
                result.append(_specialise(dtype, head, "dense", causal, False))
                result += [_specialise(dtype, head, "skip", causal, joint) for joint in (False, True)]
                if head <= 128:
                    result.append(_specialise(dtype, head, "wide", causal, False))
                if head == 64:  # at 128 the output of 128 rows would fill the registers
                    result.append(_specialise(dtype, head, "wide", causal, True))
            result += [_specialise(dtype, head, "general", False, joint) for joint in (False, True)]
    return result
