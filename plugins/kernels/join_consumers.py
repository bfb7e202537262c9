"""Lets the consumer warpgroups of a Hopper kernel run one copy of their code, where Triton makes one for each.

Triton compiles every role of a warp-specialised kernel apart, even if several are the same function. Warpgroups then
fetch two or three copies of the same instructions, which costs up to a fifth of the time where a kernel passes through
all of its code every few thousand cycles (README.md). `join` works on the PTX, between Triton and ptxas.

In it the first four warps of a CTA run the "default" role after they have initialised shared memory; the others, the
workers, branch to theirs. Of the consumers' code that of the first worker stays, and the default role and the other
workers enter there, too. To that code every thread looks like the one with its place in the first worker: what it takes
from outside is computed again from that one's number. What really depends on the warpgroup it asks of the hardware, of
which Triton sees nothing (`open_shared`). And where Triton synchronises the threads of a role, each warpgroup needs a
barrier of its own.

Whatever does not look as expected is a `PtxError`: better no kernel than a wrong one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fixed_roles import LABEL, SYNCHRONISE, PtxError

FIRST_BARRIER = 4  # of a warpgroup each; below are Triton's, above those of the votes and turns
LAST_BARRIER = 7
REGISTER = re.compile(r"%(?:rs|rd|r|p)\d+\b")
TYPES = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64"}  # of registers, by their names
LEAVE = f"\tcp.async.bulk.wait_group.read \t0;\n\t{SYNCHRONISE}\tret;\n"  # its output has left shared memory


@dataclass(frozen=True, slots=True)
class _Roles:
    before: str  # what workers have run when they come to a role, in so far as it computes something
    consumers: list[str]  # labels of the workers that consume
    body: str  # the code of the first of them, from its label on


def join(ptx: str) -> str:
    """PTX in which all consumer warpgroups run the code of the first worker.

    Raises:
        PtxError: it does not look as expected.
    """
    roles = _find_roles(ptx)
    ptx = _replace(ptx, roles.body, _joined_body(roles))
    for label in roles.consumers[1:]:
        ptx = _replace(ptx, f"\t\t{label},\n", f"\t\t{roles.consumers[0]},\n")
    ptx = _enter_by_default(ptx, _only(r"setmaxnreg\.inc\.sync\.aligned\.u32 \t(\d+);", roles.body))
    own = "".join(f"\t.reg .{kind} \t%own_{name}<9999>;\n" for name, kind in TYPES.items())
    return _replace(ptx, "\t.reg .pred", f"{own}\t.reg .b32 \t%barrier;\n\t.reg .pred")


def _find_roles(ptx: str) -> _Roles:
    start = _find(ptx, "// %bb.0:")
    entry, _, branch = ptx[start : _find(ptx, "\n", _find(ptx, " bra \t", start))].rpartition("\n")
    before = entry + "\n" + _block(ptx, branch.split()[-1].rstrip(";"))
    labels = re.findall(r"^\t\t(\$\w+)[,;]$", ptx, re.MULTILINE)
    places = {label: _find(ptx, f"\n{label}:") + 1 for label in labels}
    consumers = [label for label in labels if re.match(r"[^\n]*\n\tsetmaxnreg\.inc", ptx[places[label] :])]
    if not consumers:
        raise PtxError("no role of the workers takes registers")
    end = min(place for place in [*places.values(), len(ptx)] if place > places[consumers[0]])
    body = ptx[places[consumers[0]] : end]
    outside = set(re.findall(r"bra(?:\.uni)? \t(\$\w+);", body)) - set(LABEL.findall(body))
    if len(outside) != 1:
        raise PtxError(f"a consumer goes on at {sorted(outside)}")
    leave = _block(ptx, outside.pop())
    if REGISTER.search(leave) or not leave.endswith(LEAVE):
        raise PtxError("a consumer leaves otherwise than it should")
    return _Roles(before, consumers, body)


def _block(ptx: str, label: str) -> str:
    """The code from a label to the next."""
    after = ptx[_find(ptx, f"\n{label}:") + 1 :]
    following = LABEL.search(after, 1)
    return after[: following.start() if following else len(after)]


def _enter_by_default(ptx: str, registers: str) -> str:
    """Sends the default role to the joined code, with as many registers as the others have.

    What it would have run instead can no longer be reached, as the code of the other workers; ptxas leaves that out.
    """
    change = rf"{SYNCHRONISE}\tsetmaxnreg\.(?:inc|dec)\.sync\.aligned\.u32 \t\d+;\n\t{SYNCHRONISE}"
    found = _only(change, ptx)
    way = "dec" if int(_only(r"u32 \t(\d+);", found)) >= int(registers) else "inc"
    taken = f"\tsetmaxnreg.{way}.sync.aligned.u32 \t{registers};\n"
    return _replace(ptx, found, f"{SYNCHRONISE}{taken}\t{SYNCHRONISE}\tbra.uni \t$joined;\n")


def _joined_body(roles: _Roles) -> str:
    thread = _only(r"mov\.u32 \t(%r\d+), %tid\.x;", roles.before)
    warp = _only(rf"shr\.u32 \t(%r\d+), {thread}, 5;", roles.before)
    start = 32 * int(_only(rf"add\.s32 \t%r\d+, {warp}, -(\d+);", roles.body))
    outside, instructions = _taken(roles)

    def own(code: str) -> str:
        return REGISTER.sub(lambda match: f"%own_{match[0][1:]}" if match[0] in outside else match[0], code)

    prologue = [
        f"mov.u32 \t{own(thread)}, %tid.x;",
        f"shr.u32 \t%barrier, {own(thread)}, 7;",
        f"add.s32 \t%barrier, %barrier, {FIRST_BARRIER};",
        f"and.b32 \t{own(thread)}, {own(thread)}, 127;",
        f"add.s32 \t{own(thread)}, {own(thread)}, {start};",
        *map(own, instructions),
        "wgmma.wait_group.sync.aligned 0;",  # tells ptxas that a warp's threads are together, whichever way they came
    ]
    body = own(roles.body)
    if re.search(rf"bar\.sync \t[{FIRST_BARRIER}-{LAST_BARRIER}],", body):
        raise PtxError("the barriers of the warpgroups are in use")
    body = re.sub(r"bar\.sync \t\d+, 128;", "bar.sync \t%barrier, 128;", body)
    barriers = set(re.findall(r"\t(?:@!?%p\d+ )?(bar(?:rier)?(?:\.\w+)+ \t\d+[^;]*;)\n", body))
    if others := barriers - {SYNCHRONISE.strip()}:
        raise PtxError(f"consumers share {sorted(others)}")
    return _replace(body, SYNCHRONISE, f"{SYNCHRONISE}$joined:\n" + "".join(f"\t{line}\n" for line in prologue))


def _taken(roles: _Roles) -> tuple[set[str], list[str]]:
    """Registers that the consumers' code takes from outside, and how they are computed from the thread's number."""
    written = _written(roles.body)
    wanted = set(REGISTER.findall(roles.body)) - written
    outside, instructions = set(wanted), []
    for line in reversed(roles.before.split("\n")):
        if targets := _written(line) & (wanted | written):
            if targets & written:
                raise PtxError(f"a consumer goes on with {sorted(targets)}")
            wanted = (wanted | set(REGISTER.findall(line))) - targets
            outside |= wanted
            if "%tid.x" not in line:
                instructions.insert(0, line.strip())
    if wanted:
        raise PtxError(f"a consumer takes {sorted(wanted)} from another place than where all workers begin")
    return outside, instructions


def _written(code: str) -> set[str]:
    """Registers that some instruction writes."""
    target = re.compile(r"\s*\{?\s*(?:@!?%?\w+\s+)?[a-z][\w.:]*\s+(\{[^}]*\}|[^,\[]+)")
    code = re.sub(r"//[^\n]*", "", code)
    found = (target.match(statement.rpartition("\n")[2]) for statement in code.split(";"))
    return {register for match in found if match for register in REGISTER.findall(match[1])}


def _only(pattern: str, text: str) -> str:
    """The one thing that a pattern finds, however often."""
    found = set(re.findall(pattern, text))
    if len(found) != 1:
        raise PtxError(f"found {sorted(found)} for {pattern!r}")
    return str(found.pop())


def _find(text: str, what: str, start: int = 0) -> int:
    place = text.find(what, start)
    if place < 0:
        raise PtxError(f"no {what!r}")
    return place


def _replace(text: str, old: str, new: str) -> str:
    place = _find(text, old)
    return text[:place] + new + text[place + len(old) :]
