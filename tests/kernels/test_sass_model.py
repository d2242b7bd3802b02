"""The model of a multiprocessor on loops whose time is known, and its reading of machine code."""

import pytest

from sass_model import LIMIT, Instruction, main_loops, misused_registers, parse, predict

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                                /* 0x00000a0000017a02 */
                                                                                         /* 0x000fe40000000f00 */
        /*0010*/              @!P0 BRA 0x50 ;                                            /* 0x0000000000008947 */
                                                                                         /* 0x000fea0003800000 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ; /* 0x01e00000081879f0 */
                                                                                         /* 0x000fe2000c0018ff */
        /*0030*/                   MUFU.EX2 R2, R3 ;                                     /* 0x0000000300027308 */
                                                                                         /* 0x004ee20000000800 */
        /*0040*/              @P1  BRA 0x20 ;                                            /* 0xffffffd000001947 */
                                                                                         /* 0x000fea000383ffff */
        /*0050*/                   BRA 0x30 ;                                            /* 0xffffffd000001947 */
                                                                                         /* 0x000fea000383ffff */
"""


def make(opcode: str, operands: str = "R1, R2", sets: tuple[int, ...] = (), waits: tuple[int, ...] = ()) -> Instruction:
    return Instruction(0, opcode, operands, 1, sets, waits)


LOGITS = make("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR8], RZ, !UPT, gsb0")
VALUES = make("HGMMA.64x64x16.F32.BF16", "R88, R120, gdesc[UR8].tnspB, R88, gsb0")
WAIT, WAIT_BUT_ONE = make("WARPGROUP.DEPBAR.LE", "gsb0, 0x0"), make("WARPGROUP.DEPBAR.LE", "gsb0, 0x1")
EXP2 = make("MUFU.EX2", "R2, R3")


def test_machine_code_is_read() -> None:
    code = parse(SASS)
    assert [x.opcode.split(".")[0] for x in code] == ["MOV", "BRA", "HGMMA", "MUFU", "BRA", "BRA"]
    exp2 = code[3]
    assert (exp2.operands, exp2.stall, exp2.sets, exp2.waits) == ("R2, R3", 1, (3,), (2,))
    # The last jump leads back into the loop from outside; it makes no loop of its own.
    assert [[x.address for x in loop] for loop in main_loops(code)] == [[0x20, 0x30, 0x40]]


@pytest.mark.parametrize(
    ("body", "busy"),
    [
        ([LOGITS] * 8, 8 * 64),  # the tensor core: 64 clocks each
        ([EXP2] * 64, 64 * 8),  # four results a clock, 32 threads
        ([make("FADD")] * 256, 256),  # one instruction a clock
        ([make("F2FP.BF16.F32.PACK_AB")] * 256, 512),  # half as many
    ],
    ids=["wgmma", "exp2", "fma", "alu"],
)
def test_a_loop_of_one_unit_takes_what_the_unit_takes(body: list[Instruction], busy: int) -> None:
    for warps in (1, 3):
        rates = predict([body], keys=128, warps=warps, programs=1, phases=2)
        assert rates == sorted(rates)
        assert rates[0] == pytest.approx(LIMIT * 512 / busy, rel=0.01)


@pytest.mark.slow
def test_two_units_overlap_across_warps_and_not_within_one() -> None:
    """Wgmma and exp2 for 512 clocks each, with a wait after the wgmma."""
    body = [LOGITS] * 8 + [WAIT] + [EXP2] * 64
    alone, both = (predict([body], keys=128, warps=1, programs=n, phases=5)[2] for n in (1, 2))
    assert alone == pytest.approx(LIMIT * 512 / 1024, rel=0.06)
    assert both > 1.7 * alone


@pytest.mark.slow
def test_a_barrier_of_the_block_keeps_its_warps_together_and_one_of_a_warpgroup_does_not() -> None:
    work = [LOGITS] * 8 + [WAIT] + [EXP2] * 64
    block, group = make("BAR.SYNC.DEFER_BLOCKING", "0x0"), make("BAR.SYNC.DEFER_BLOCKING", "0x0, 0x80")
    together = predict([[*work, block]], keys=128, warps=2, programs=1, phases=3)[1]
    apart = predict([[*work, group], [*work, group]], keys=128, warps=2, programs=1, phases=3)[1]
    assert apart > 1.2 * together


def test_a_scoreboard_is_waited_for() -> None:
    independent = [EXP2, make("FADD")] * 8
    chained = [make("MUFU.EX2", sets=(0,)), make("FADD", waits=(0,))] * 8
    fast, slow = (predict([body], keys=128, warps=1, programs=1, phases=1)[0] for body in (independent, chained))
    assert fast > 2 * slow


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ([LOGITS, VALUES, WAIT_BUT_ONE, make("FFMA", "R24, R25, R2, R3"), WAIT, make("F2FP", "R120, R1, R2")], 0),
        ([LOGITS, VALUES, make("FFMA", "R4, R25, R2, R3"), WAIT], 2),  # the logits are read: in both passes
        ([LOGITS, VALUES, WAIT_BUT_ONE, make("F2FP", "R121, R1, R2"), WAIT], 2),  # the weights are written
        ([LOGITS, VALUES, WAIT_BUT_ONE, make("FADD", "R3, R88, R2"), WAIT], 2),  # the sums are read
        ([make("FADD", "R3, R88, R2"), LOGITS, VALUES, WAIT_BUT_ONE], 1),  # only in the second pass
        ([LOGITS, VALUES, WAIT_BUT_ONE, make("FADD", "R3, R120, R2"), WAIT], 0),  # weights may be read
        ([LOGITS, VALUES, WAIT_BUT_ONE, make("STG.E", "desc[UR4][R2.64], R120"), WAIT], 0),
    ],
)
def test_registers_of_a_running_wgmma(body: list[Instruction], wrong: int) -> None:
    assert len(misused_registers(body)) == wrong
