"""The compile gate reads machine code right: loops, spills, copies, unrolled iterations."""

from dataclasses import replace

import pytest
from aot import ptx, sass
from aot.flow import innermost, natural_loops

# a loop with a label, a spill inside it and predicates; the code that waits stands at the end
LABELLED = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   STL [R1+0x4], R9 ;
.L_x_0:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2 ;
        /*0040*/              @!P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0050*/               @P2 LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64] ;
        /*0060*/                   LDG.E.U16 R7, desc[UR6][R2.64+0x10] ;
        /*0070*/              @!P3 LDG.E.128.CONSTANT R8, desc[UR6][R2.64] ;
        /*0080*/                   LDGDEPBAR ;
        /*0090*/                   STS.128 [R4], R8 ;
        /*00a0*/              @UP1 STSM.16.M88.4 [R4], R8 ;
        /*00b0*/                   I2FP.F32.S32 R7, R7 ;
        /*00c0*/                   I2F.U8 R7, R7.B1 ;
        /*00d0*/                   HGMMA.64x16x16.F32.BF16 R80, R88, gdesc[UR12], R80, gsb0 ;
        /*00e0*/                   LDL.LU R9, [R1+0x4] ;
        /*00f0*/                   BRA.U !UP0, `(.L_x_0) ;
        /*0100*/                   LDG.E R7, desc[UR6][R2.64] ;
        /*0110*/                   EXIT ;
.L_x_2:
        /*0120*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2 ;
        /*0130*/              @!P1 BRA `(.L_x_2) ;
        /*0140*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0150*/                   BRA `(.L_x_3);
"""

# two products behind one another, the first left by a call, with encodings and without labels
ABSOLUTE = """
	code for sm_80
		Function : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;    /* 0x00000a0000017a02 */
                                                             /* 0x000fc40000000f00 */
        /*0010*/                   LDGSTS.E.64 [R4], [R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0030*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0040*/               @P5 CALL.REL.NOINC 0x60 ;
        /*0050*/                   BRA 0x10 ;
        /*0060*/                   BRA.DIV UR4, 0x90 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0080*/               @P0 BRA P1, 0x70 ;
        /*0090*/                   EXIT ;
"""

STREAMING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R4, [R2.64] ;
        /*0020*/                   LDG.E R5, [R2.64+0x4] ;
        /*0030*/                   LDG.E R6, [R2.64+0x8] ;
        /*0040*/                   LDG.E R7, [R2.64+0xc] ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""

NESTED = """
.L_x_0:
        /*0000*/                   IADD3 R0, R0, 0x1, RZ ;
.L_x_1:
        /*0010*/                   IMMA.16832.S8.S8 R4, R8.ROW, R2.COL, R4 ;
.L_x_2:
        /*0020*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


def test_a_loop_with_a_label() -> None:
    program = sass.read(LABELLED)
    assert (program.local, program.mma) == (2, "HGMMA")
    # 13 instructions stand in the loop and 3 behind the end
    assert program.loops == (sass.Loop(16, mma=1, copies=3, wide=2, sts=2, i2f=2),)


def test_loops_with_absolute_targets() -> None:
    program = sass.read(ABSOLUTE)
    assert (program.local, program.mma) == (0, "HMMA")
    assert program.loops == (
        sass.Loop(5, mma=1, copies=1, wide=0, sts=0, i2f=0),
        sass.Loop(2, mma=1, copies=0, wide=0, sts=0, i2f=0),
    )


def test_of_nested_loops_the_innermost_with_a_product_is_the_main_one() -> None:
    (loop,) = sass.main_loops(sass.parse(NESTED))
    assert [i.op for i in loop] == ["IMMA.16832.S8.S8", "IADD3", "BRA", "BRA"]


def test_without_a_product_the_longest_loop_is_the_main_one() -> None:
    assert sass.read(STREAMING).loops == (sass.Loop(5, mma=0, copies=4, wide=0, sts=0, i2f=0),)


def test_without_a_loop_the_program_is_the_main_one() -> None:
    text = "/*0000*/ LDG.E.ENL2.256 R4, R8, [R2.64] ;\n/*0010*/ UTMALDG.2D [UR8], [UR4] ;"
    assert sass.read(text).loops == (sass.Loop(2, mma=0, copies=2, wide=2, sts=0, i2f=0),)


def test_a_jump_into_the_middle_makes_no_loop() -> None:
    code = sass.parse("""
        /*0000*/               @P0 BRA 0x30 ;
        /*0010*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0020*/                   EXIT ;
        /*0030*/                   BRA 0x10 ;
    """)
    assert natural_loops(code) == []


def test_loops_with_one_head_are_one() -> None:
    code = sass.parse("""
        /*0000*/               @P0 BRA 0x30 ;
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0020*/                   BRA 0x0 ;
        /*0030*/                   IADD3 R0, R0, 0x2, RZ ;
        /*0040*/               @P1 BRA 0x0 ;
        /*0050*/                   EXIT ;
    """)
    assert natural_loops(code) == [{0, 1, 2, 3, 4}]
    assert innermost([frozenset({1}), frozenset({0, 1}), frozenset({2})]) == [{1}, {2}]


def test_a_loop_of_one_instruction() -> None:
    code = sass.parse("""
        /*0000*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0010*/               @P0 BRA 0x10 ;
        /*0020*/                   EXIT ;
    """)
    assert natural_loops(code) == [{1}]


def test_a_program_without_instructions_is_an_error() -> None:
    with pytest.raises(ValueError, match="no instructions"):
        sass.read(".text.kernel:")


def test_a_line_that_is_not_understood_is_an_error() -> None:
    with pytest.raises(ValueError, match="not understood"):
        sass.read("/*0000*/ EXIT ;\n/*0010*/ ??? R1 ;")


TABLE = """
        /*0000*/                   BRX R6 -0x10      (*"BRANCH_TARGETS .L_x_1,.L_x_2,.L_x_3"*);
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   EXIT ;
.L_x_2:
        /*0040*/                   EXIT ;
.L_x_3:
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0060*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0070*/               @P0 BRA `(.L_x_3) ;
        /*0080*/                   EXIT ;
"""


def test_a_jump_table_leads_to_every_loop() -> None:
    assert [loop.instructions for loop in sass.read(TABLE).loops] == [2, 3]


@pytest.mark.parametrize("jump", ["BRX R6 -0x360 ;", "BRA 0x40 ;", "BRA `(.L_x_9) ;"])
def test_a_jump_to_an_unknown_place_is_an_error(jump: str) -> None:
    with pytest.raises(ValueError, match="a jump to an unknown place"):
        sass.read(f"/*0000*/ {jump}")


def test_a_jump_table_of_ptx_is_followed() -> None:
    text = """
JTI0_0:
	.branchtargets
		$L__BB0_1,
		$L__BB0_2;
	brx.idx 	%r135, JTI0_0;
$L__BB0_1:
	ret;
$L__BB0_2:
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };
	@!complete bra.uni waitLoop;
	@%p2 bra 	$L__BB0_2;
	ret;
"""
    (loop,) = sass.main_loops(ptx.parse(text))
    assert [i.op for i in loop] == ["MMA", "BRA"]


def test_iterations_that_ptxas_unrolled_are_counted() -> None:
    text = """
$L__BB0_1:
	// begin inline asm
	@%p3 ld.global.b32 { %r17 }, [ %rd9 + 0 ];
	// end inline asm
	@%p2 bra 	$L__BB0_1;
	bra.uni 	$L__BB0_2;
$L__BB0_2:
	ret;
"""
    loops = sass.read(STREAMING).loops
    assert ptx.unrolled(text, loops) == (4,)
    assert ptx.unrolled(text.replace("ld.global", "ld.shared"), loops) == (1,)
    assert ptx.unrolled(text, loops * 2) == (1, 1)
    assert ptx.unrolled(text, (replace(loops[0], copies=3),)) == (3,)
    doubled = text.replace("$L__BB0_1:", "$L__BB0_1:\n\tld.global.b32 %r1, [%rd1];")
    assert ptx.unrolled(doubled, (replace(loops[0], copies=5),)) == (1,)


def test_matrix_products_of_ptx_are_counted() -> None:
    text = """
$L__BB0_1:
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1}, {%r2}, %rd4, %p, 1, 1;
	wgmma.commit_group.sync.aligned;
	@%p10 bra 	$L__BB0_1;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };
	ret;
"""
    (loop,) = sass.main_loops(ptx.parse(text))
    assert [i.op for i in loop].count("MMA") == 1
    assert ptx.unrolled(text, (sass.Loop(99, mma=4, copies=0, wide=0, sts=0, i2f=0),)) == (4,)
