"""Roles by number and one copy of the consumers' code, on PTX in miniature; `test_build_kernels` has compiled ones."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from emulation import plugin_module

triton = pytest.importorskip("triton")

ROLE = """\
$L__BB0_{label}:
	setmaxnreg.inc.sync.aligned.u32 	160;
	barrier.sync 	1;
	add.s32 	%r{a}, %r2, -{start};
	shl.b32 	%r{b}, %r{a}, 5;
	or.b32 	%r{c}, %r{b}, %r4;
	add.s32 	%r{c}, %r{c}, %r3;
$L__BB0_{loop}:
	bar.sync 	{barrier}, 128;
	add.s32 	%r{c}, %r{c}, -1;
	setp.gt.s32 	%p{p}, %r{c}, 0;
	@%p{p} bra 	$L__BB0_{loop};
	st.shared.b32 	[%r{c}+128], %r{a};
	bra.uni 	$L__BB0_3;
"""
PTX = f"""\
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry prefill(
	.param .u32 prefill_param_0
)
.reqntid 512
.maxnreg 128
{{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<40>;

JTI0_0:
	.branchtargets
		$L__BB0_5,
		$L__BB0_6,
		$L__BB0_7,
		$L__BB0_9;
// %bb.0:
	ld.param.b32 	%r3, [prefill_param_0];
	mov.u32 	%r1, %tid.x;
	shr.u32 	%r2, %r1, 5;
	setp.lt.u32 	%p1, %r2, 4;
	@!%p1 bra 	$L__BB0_1;
// %bb.4:
	setmaxnreg.inc.sync.aligned.u32 	256;
	st.shared.b32 	[global_smem+64], 0;
	st.shared.v2.b32 	[global_smem+68], {{16843009, 33686018}};
	barrier.sync 	1;
	setmaxnreg.dec.sync.aligned.u32 	168;
	barrier.sync 	1;
	and.b32 	%r20, %r1, 96;
	st.shared.b32 	[%r20+128], %r2;
	bar.sync 	0, 128;
	bra.uni 	$L__BB0_8;
$L__BB0_1:                              // %.preheader.preheader
	and.b32 	%r4, %r1, 31;
	bra.uni 	$L__BB0_2;
$L__BB0_3:                              // %.loopexit
	cp.async.bulk.wait_group.read 	0;
	barrier.sync 	1;
	setmaxnreg.dec.sync.aligned.u32 	80;
$L__BB0_2:                              // %.preheader
	setmaxnreg.dec.sync.aligned.u32 	80;
	barrier.sync 	1;
	mov.b32 	%r22, global_smem;
	add.s32 	%r21, %r22, %r2;
	ld.shared.b8 	%r5, [%r21+60];
	brx.idx 	%r5, JTI0_0;
{ROLE.format(label=5, loop=10, a=6, b=7, c=8, p=2, start=4, barrier=2)}\
{ROLE.format(label=6, loop=11, a=9, b=10, c=11, p=3, start=8, barrier=3)}\
$L__BB0_7:
	setmaxnreg.dec.sync.aligned.u32 	24;
	barrier.sync 	1;
	st.shared.b32 	[global_smem+256], %r2;
	barrier.sync 	1;
	setmaxnreg.inc.sync.aligned.u32 	80;
	bra.uni 	$L__BB0_2;
$L__BB0_8:
	cp.async.bulk.wait_group.read 	0;
	barrier.sync 	1;
	setmaxnreg.inc.sync.aligned.u32 	256;
	st.shared.b32 	[global_smem+64], 50529027;
	st.shared.v2.b32 	[global_smem+68], {{50529027, 50529027}};
	barrier.sync 	1;
$L__BB0_9:                              // %common.ret
	ret;
}}
"""


def assemble(ptx: str, folder: Path) -> str:
    """The machine code, as text."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    (folder / "kernel.ptx").write_text(ptx)
    command = [str(tools / "ptxas-blackwell"), "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    command = [str(tools / "nvdisasm"), "-c", "kernel.cubin"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_workers_know_their_roles_by_number(tmp_path: Path) -> None:
    fixed = plugin_module("fixed_roles").fix_roles(PTX)
    before, after = assemble(PTX, tmp_path), assemble(fixed, tmp_path)
    assert "LDS.U8" in before and "LDS" not in after
    assert len(re.findall(r"STS", before)) - len(re.findall(r"STS", after)) == 4  # the roles, and that they are over
    assert "global_smem+64" not in fixed and "global_smem+68" not in fixed and "global_smem+256" in fixed
    # words of four roles each: that of a warp, and its byte
    find = fixed[fixed.index("mov.b32 \t%roles, 0;") : fixed.index("brx.idx")]
    assert re.findall(r"setp\.ge\.u32 \t%later, %r2, (\d+);\n\tselp\.b32 \t%roles, (\d+), %roles, %later;", find) == [
        ("8", "16843009"), ("12", "33686018")]  # fmt: skip
    assert find.endswith("shl.b32 \t%bit, %bit, 3;\n\tbfe.u32 \t%r5, %roles, %bit, 8;\n\t")
    # nobody goes back for another role, whether with a branch or without, and nobody waits for those who are gone
    assert fixed.count("$L__BB0_2;") == 1 and fixed.index("bra.uni \t$L__BB0_2;") < fixed.index("$L__BB0_3:")
    assert fixed.count("\tbarrier.sync \t1;\n\tret;\n") == 2
    assert fixed.endswith("cp.async.bulk.wait_group.read \t0;\n\tbarrier.sync \t1;\n$L__BB0_9:                 "
                          "             // %common.ret\n\tret;\n}\n")  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("ld.shared.b8 \t%r5", "ld.shared.b16 \t%r5", "0 for 1 load"),
        ("%r21, %r22, %r2;", "%r21, %r2, %r22;", "not shared memory's address"),
        ("mov.b32 \t%r22, global_smem", "mov.b32 \t%r22, other", "not shared memory's address"),
        ("\tst.shared.v2.b32 \t[global_smem+68], {16843009, 33686018};\n", "", "not taken back"),
        ("{50529027, 50529027}", "{50529027, 7}", "not taken back"),
        ("[global_smem+64], 50529027", "[global_smem+512], 50529027", "a role at 512"),
        (".reqntid 512", ".reqntid 640", "not one for every worker"),
        ("\tbar.sync \t2, 128;", "\tbar.sync \t2, 128;\n\t@%p1 bra \t$L__BB0_2;", "go back"),
        ("$L__BB0_3:", "$L__BB0_12:\n\tbarrier.sync \t1;\n\tbra.uni \t$L__BB0_2;\n$L__BB0_3:", "go back"),
        ("\tbra.uni \t$L__BB0_2;\n$L__BB0_3:", "$L__BB0_3:", "go back"),
        ("%r1, 5;", "%r4, 5;", "not shared memory's address"),
        ("st.shared.b32 \t[global_smem+64], 0;\n", "", "a role at 68"),
        ("{16843009, 33686018}", "{%r1, %r2}", "1 for 2 places"),
        ("\tsetmaxnreg.inc.sync.aligned.u32 \t80;\n\tbra.uni \t$L__BB0_2", "\t@%p1 bra \t$L__BB0_2", "go back"),
        ("\tsetmaxnreg.dec.sync.aligned.u32 \t80;\n$L__BB0_2:", "$L__BB0_2:", "not one kind of worker"),
        (".reg .pred", ".reg .b1", "no registers"),
    ],
)
def test_roles_of_another_form_are_refused(old: str, new: str, complaint: str) -> None:
    module = plugin_module("fixed_roles")
    assert old in PTX
    with pytest.raises(module.PtxError, match=complaint):
        module.fix_roles(PTX.replace(old, new))


def test_all_consumers_run_the_code_of_the_first_worker(tmp_path: Path) -> None:
    fixed = plugin_module("fixed_roles").fix_roles(PTX)
    joined = plugin_module("join_consumers").join(fixed)
    stores = r"STS \[[^\]]*\+0x80\]"
    assert len(re.findall(stores, assemble(fixed, tmp_path))) == 3  # of the default role and two workers
    assert len(re.findall(stores, assemble(joined, tmp_path))) == 1
    assert re.findall(r"^\t\t(\$\w+)[,;]", joined, re.M) == [f"$L__BB0_{n}" for n in (5, 5, 7, 9)]
    # the default role comes with as many registers as the others have
    assert "setmaxnreg.dec.sync.aligned.u32 \t160;\n\tbarrier.sync \t1;\n\tbra.uni \t$joined;" in joined
    body = joined[joined.index("$joined:") : joined.index("$L__BB0_6:")]
    # every thread looks like one of the first worker, and what was computed from its number is computed from that
    assert "and.b32 \t%own_r1, %own_r1, 127;\n\tadd.s32 \t%own_r1, %own_r1, 128;" in body
    assert all(line in body for line in ("shr.u32 \t%own_r2, %own_r1, 5;", "and.b32 \t%own_r4, %own_r1, 31;"))
    assert "add.s32 \t%r6, %own_r2, -4;" in body and "bar.sync \t%barrier, 128;" in body
    assert not re.search(r"%r[1-5]\b", body)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("// %bb.0:", "// %entry:", "no '// %bb.0:'"),
        ("setmaxnreg.inc.sync.aligned.u32 \t160", "setmaxnreg.dec.sync.aligned.u32 \t160", "takes registers"),
        ("bra.uni \t$L__BB0_3;\n$L__BB0_6", "bra.uni \t$L__BB0_9;\n$L__BB0_6", "leaves otherwise"),
        ("@%p2 bra \t$L__BB0_10", "@%p2 bra \t$L__BB0_11", "goes on at"),
        ("or.b32 \t%r8, %r7, %r4", "or.b32 \t%r8, %r7, %r20", "another place"),
        ("and.b32 \t%r4, %r1, 31", "mov.b32 \t%r8, 31", "goes on with"),
        ("bar.sync \t2, 128", "bar.sync \t5, 128", "in use"),
        ("\tbar.sync \t2, 128", "\tbarrier.sync \t2, 128", "share"),
        ("\tbar.sync \t2, 128", "\t@%p2 bar.sync \t2, 256", "share"),
        ("add.s32 \t%r6, %r2, -4", "and.b32 \t%r6, %r2, 3", "found"),
        ("\tbarrier.sync \t1;\n\tret;", "\tadd.s32 \t%r8, %r8, 1;\n\tbarrier.sync \t1;\n\tret;", "leaves otherwise"),
        ("setmaxnreg.dec.sync.aligned.u32 \t168;\n", "", "found"),
    ],
)
def test_ptx_of_another_form_is_refused(old: str, new: str, complaint: str) -> None:
    module = plugin_module("join_consumers")
    fixed = plugin_module("fixed_roles").fix_roles(PTX)
    assert old in fixed
    with pytest.raises(module.PtxError, match=complaint):
        module.join(fixed.replace(old, new))
