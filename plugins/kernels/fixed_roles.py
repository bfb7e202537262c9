"""Lets a warp of a Hopper kernel know its role by its number, and end with it.

In Triton's PTX the first four warps of a CTA run the "default" role, which begins by storing a byte for every other
warp, a worker: the number of its role. Workers read theirs behind a barrier, and come back for the next until they are
told to stop. But a kernel has one set of roles, each taken once, so the numbers can stand in the instructions. Then
there is no loop around the roles, and nothing goes through shared memory whose order compute-sanitizer's racecheck does
not see. `fix_roles` works on the PTX, between Triton and ptxas, before `join_consumers`.

Whatever does not look as expected is a `PtxError`: better no kernel than a wrong one.
"""

from __future__ import annotations

import re

FIRST_WORKER = 4  # warps before it run the default role
SYNCHRONISE = "barrier.sync \t1;\n"  # all warps of the CTA
REGISTERS = r"\tsetmaxnreg\.\w+\.sync\.aligned\.u32 \t\d+;\n"
LABEL = re.compile(r"^(\$\w+):", re.MULTILINE)
LOAD = re.compile(
    r"\tadd\.s32 \t(%r\d+), (%r\d+), (%r\d+);\n"  # of shared memory's address and the warp's number
    r"\tld\.shared\.b8 \t(%r\d+), \[\1\+(\d+)\];\n"
)
STORE = r"\tst\.shared(?:\.v\d)?\.b32 \t\[global_smem\+(\d+)\], \{?([\d, ]+)\}?;\n"
HAND_OUT = re.compile(f"((?:{STORE})+)(?=\\t{SYNCHRONISE})")


class PtxError(RuntimeError):
    """PTX of another form than that of Triton 3.9.0."""


def fix_roles(ptx: str) -> str:
    """PTX in which a worker's role follows from its number, and is its last.

    Raises:
        PtxError: it does not look as expected.
    """
    (load,) = _exactly(1, LOAD, ptx, "load of a role")
    _, memory, warp, role, offset = load.groups()
    if f"\tmov.b32 \t{memory}, global_smem;\n" not in ptx or warp not in _warp_numbers(ptx):
        raise PtxError(f"{memory} and {warp} are not shared memory's address and the warp's number")
    first, stop = _exactly(2, HAND_OUT, ptx, "places that hand out roles")
    roles, ends = (_words(stores[0], int(offset) + FIRST_WORKER) for stores in (first, stop))
    if not first.start() < load.start() < stop.start() or len(ends) != len(roles) or len(set(ends)) != 1:
        raise PtxError("roles are not handed out in the beginning, or not taken back in the end")
    if f".reqntid {32 * (FIRST_WORKER + 4 * len(roles))}\n" not in ptx:
        raise PtxError(f"{4 * len(roles)} roles are not one for every worker")
    head = LABEL.findall(ptx[: load.start()])[-1]
    before, body = ptx[: load.start()], ptx[load.end() : stop.start()]
    after = ptx[stop.end() :].removeprefix(f"\t{SYNCHRONISE}")  # nobody waits there any more
    body, back = re.subn(rf"(?:{REGISTERS})?\tbra\.uni \t{re.escape(head)};\n", "\tret;\n", body)
    if not back or f"{head};" in body + after or before.count(f"{head};") != 1:  # in the beginning all come there
        raise PtxError(f"workers go back to {head}")
    before, through = re.subn(rf"{REGISTERS}({re.escape(head)}:)", r"\tret;\n\1", before.replace(first[0], "", 1))
    if through != 1:
        raise PtxError(f"not one kind of worker goes on at {head} without a branch")
    body = re.sub(rf"(?:{REGISTERS})$", "", body)  # the default role wants those of all workers back
    registers = "\t.reg .pred \t%later;\n\t.reg .b32 \t%roles, %bit;\n\t.reg .pred"
    if "\t.reg .pred" not in before:
        raise PtxError("no registers")
    return before.replace("\t.reg .pred", registers, 1) + _find(role, warp, roles) + body + after


def _find(role: str, warp: str, roles: list[int]) -> str:
    """Instructions that find the role of a worker in words of four bytes."""
    lines = [f"mov.b32 \t%roles, {roles[0]};"]
    for n, word in enumerate(roles[1:], 1):
        lines += [f"setp.ge.u32 \t%later, {warp}, {FIRST_WORKER + 4 * n};",
                  f"selp.b32 \t%roles, {word}, %roles, %later;"]  # fmt: skip
    lines += [f"and.b32 \t%bit, {warp}, 3;", "shl.b32 \t%bit, %bit, 3;", f"bfe.u32 \t{role}, %roles, %bit, 8;"]
    return "".join(f"\t{line}\n" for line in lines)


def _warp_numbers(ptx: str) -> set[str]:
    """Registers that hold a warp's number, as a thread computes it or its warp's first lane does."""
    threads = set(re.findall(r"\tmov\.u32 \t(%r\d+), %tid\.x;", ptx))
    own = {warp for warp, thread in re.findall(r"\tshr\.u32 \t(%r\d+), (%r\d+), 5;", ptx) if thread in threads}
    lanes = re.findall(r"\tshfl\.sync\.idx\.b32 \t(%r\d+), (%r\d+), 0, 31, -1;", ptx)
    return own | {target for target, source in lanes if source in own}


def _words(stores: str, start: int) -> list[int]:
    """What is stored from an address on, one word after another."""
    words: list[int] = []
    for address, values in re.findall(STORE, stores):
        if int(address) != start + 4 * len(words):
            raise PtxError(f"a role at {address}")
        words += map(int, values.split(", "))
    return words


def _exactly(count: int, pattern: re.Pattern[str], ptx: str, what: str) -> list[re.Match[str]]:
    found = list(pattern.finditer(ptx))
    if len(found) != count:
        raise PtxError(f"{len(found)} for {count} {what}")
    return found
