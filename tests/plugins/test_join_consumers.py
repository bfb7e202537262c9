"""One copy of the consumers' code, on PTX in miniature; `test_build_kernels` checks it on compiled kernels."""

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
	st.shared.b32 	[%r{c}+64], %r{a};
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
	barrier.sync 	1;
	setmaxnreg.dec.sync.aligned.u32 	168;
	barrier.sync 	1;
	and.b32 	%r20, %r1, 96;
	st.shared.b32 	[%r20+64], %r2;
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
	barrier.sync 	1;
	ld.shared.b8 	%r5, [global_smem+60];
	brx.idx 	%r5, JTI0_0;
{ROLE.format(label=5, loop=10, a=6, b=7, c=8, p=2, start=4, barrier=2)}\
{ROLE.format(label=6, loop=11, a=9, b=10, c=11, p=3, start=8, barrier=3)}\
$L__BB0_7:
	setmaxnreg.dec.sync.aligned.u32 	24;
	barrier.sync 	1;
	bra.uni 	$L__BB0_2;
$L__BB0_8:
	cp.async.bulk.wait_group.read 	0;
	barrier.sync 	1;
	setmaxnreg.inc.sync.aligned.u32 	256;
	st.shared.b32 	[global_smem+60], 50529027;
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


def test_all_consumers_run_the_code_of_the_first_worker(tmp_path: Path) -> None:
    joined = plugin_module("join_consumers").join(PTX)
    stores = r"STS \[[^\]]*\+0x40\]"
    assert len(re.findall(stores, assemble(PTX, tmp_path))) == 3  # of the default role and two workers
    assert len(re.findall(stores, assemble(joined, tmp_path))) == 1
    assert re.findall(r"^\t\t(\$\w+)[,;]", joined, re.M) == [f"$L__BB0_{n}" for n in (5, 5, 7, 9)]
    # the default role comes with as many registers as the others have
    assert "setmaxnreg.dec.sync.aligned.u32 \t160;\n\tbarrier.sync \t1;\n\tbra.uni \t$joined;" in joined
    body = joined[joined.index("$joined:") : joined.index("$joined_left:")]
    # every thread looks like one of the first worker, and what was computed from its number is computed from that
    assert "and.b32 \t%own_r1, %own_r1, 127;\n\tadd.s32 \t%own_r1, %own_r1, 128;" in body
    assert all(line in body for line in ("shr.u32 \t%own_r2, %own_r1, 5;", "and.b32 \t%own_r4, %own_r1, 31;"))
    assert "add.s32 \t%r6, %own_r2, -4;" in body and "bar.sync \t%barrier, 128;" in body
    assert not re.search(r"%r[1-5]\b", body)
    # in the end the warps of the default role tell the workers to stop
    assert "@%first st.shared.b32 \t[global_smem+60], 50529027;" in joined[joined.index("$joined_left:") :]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("// %bb.0:", "// %entry:", "no '// %bb.0:'"),
        ("setmaxnreg.inc.sync.aligned.u32 \t160", "setmaxnreg.dec.sync.aligned.u32 \t160", "takes registers"),
        ("bra.uni \t$L__BB0_3;\n$L__BB0_6", "bra.uni \t$L__BB0_9;\n$L__BB0_6", "found"),
        ("@%p2 bra \t$L__BB0_10", "@%p2 bra \t$L__BB0_11", "goes on at"),
        ("or.b32 \t%r8, %r7, %r4", "or.b32 \t%r8, %r7, %r20", "another place"),
        ("and.b32 \t%r4, %r1, 31", "mov.b32 \t%r8, 31", "goes on with"),
        ("bar.sync \t2, 128", "bar.sync \t5, 128", "in use"),
        ("add.s32 \t%r6, %r2, -4", "and.b32 \t%r6, %r2, 3", "found"),
        ("\tst.shared.b32 \t[global_smem+60], 50529027;\n", "", "nobody"),
        ("setmaxnreg.dec.sync.aligned.u32 \t168;\n", "", "found"),
    ],
)
def test_ptx_of_another_form_is_refused(old: str, new: str, complaint: str) -> None:
    module = plugin_module("join_consumers")
    assert old in PTX
    with pytest.raises(module.JoinError, match=complaint):
        module.join(PTX.replace(old, new))
