"""What is compiled of a kernel in plain Triton: pointers and strides instead of tensor maps, any architecture.

A family (a module `<family>_specifications.py`) lists its kernels as `PlainKernel`; build_kernels.py compiles them, and
csrc/launch_<family>.cpp launches them with the arguments listed here.
"""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100f", 120: "sm_120"}
"""Compute capability, times ten, and what ptxas is told. A cubin of sm_80 runs on every 8.x, of sm_100f on 10.x, of
sm_120 on 12.x; "a" binds it to that capability alone (and gives wgmma)."""

SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory a CTA may have on every device that runs the cubin (8.6 and 8.9 have less than 8.0)."""


@dataclass(frozen=True, slots=True)
class PlainKernel:
    """One compiled kernel.

    Args:
        family: "decode" or "prefill".
        module, function: where its source is.
        arguments: `name:type[:divisor]` of everything that is not a constant, in the kernel's order; type is a Triton
            type in which T stands for the dtype, divisor what the value (an address in bytes) is a multiple of.
        constants: the kernel's `tl.constexpr` arguments.
        architecture: a key of `ARCHITECTURES`.
        ptx: compute capability, times ten, for which Triton generates PTX; 0 is `architecture`. An earlier one makes
            the same PTX serve several architectures, and what is tried on one is what the others run.
        dtype: "fp16" or "bf16".
        head: head size it is shaped for; narrower heads are masked.
        role: what the kernel does in its family.
        causal, joint: as in a Hopper prefill kernel; meaningless for decode.
        early: may be launched before the kernel in front of it has ended: it waits for that itself (from 9.0 on).
        rows, columns: query rows and key columns of a program.
        warps, stages: of a program, and of its loads in flight.
        spills: bytes of spilled registers that are accepted; more fails the build.
    """

    family: str
    module: str
    function: str
    arguments: str
    constants: tuple[tuple[str, int | float | bool], ...]
    architecture: int
    dtype: str
    head: int
    role: str
    rows: int
    columns: int
    warps: int
    stages: int
    causal: bool = False
    joint: bool = False
    early: bool = False
    spills: int = 0
    ptx: int = 0

    @property
    def name(self) -> str:
        parts = [f"sm{self.architecture}_{self.dtype}_d{self.head}_{self.family}", self.role]
        if self.causal:
            parts.append("causal")
        if self.joint:
            parts.append("128x128")
        return "_".join(parts)

    @property
    def signature(self) -> dict[str, str]:
        """Triton's types by argument, constants included."""
        types = {}
        for entry in self.arguments.split():
            name, kind, *_ = entry.split(":")
            types[name] = kind.replace("T", self.dtype)
        return types | {name: "constexpr" for name, _ in self.constants}

    @property
    def divisors(self) -> dict[tuple[int, ...], list[list[object]]]:
        """Triton's attributes: which argument is a multiple of what."""
        entries = [entry.split(":") for entry in self.arguments.split()]
        return {(i,): [["tt.divisibility", int(entry[2])]] for i, entry in enumerate(entries) if len(entry) > 2}
