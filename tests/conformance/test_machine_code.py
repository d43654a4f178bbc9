"""What reads machine code finds a register that nothing has set, on whatever way it is reached, and no other."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from machine_code import unset_reads_of


def listing(*lines: str) -> str:
    """As the disassembler writes it: labels end with a colon, instructions have their places before them."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * place:04x}*/                   {line} ;"
        for place, line in enumerate(lines)
    )


SET = ("S2UR UR4, SR_CgaCtaId", "ULDC.64 UR6, c[0x0][0x218]")


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param((*SET, "UIADD3 UR5, UP0, UR4, 0x20, URZ", "IADD3 R1, R2, UR5, RZ"), id="plain"),
        pytest.param((*SET, "UIADD3 UR8, UR6, UR7, URZ"), id="both halves of a pair"),
        pytest.param((*SET, "UIMAD.WIDE UR8, UR4, 0x4, UR6", "MOV R1, UR9"), id="a wide product"),
        pytest.param(("R2UR P0, UR4, R16", "MOV R1, UR4"), id="with a predicate first"),
        pytest.param(("UMOV UR6, 0x1", "UMOV UR7, 0x2", "HGMMA R24, R8, gdesc[UR4], R24"), id="half a descriptor"),
        pytest.param(("ULDC.64 UR6, c[0x0]", "UTCHMMA gdesc[UR6], tmem[UR6], idesc[UR7]"), id="a pair for Blackwell"),
        pytest.param(("CREDUX.MAX.S32 UR9, R27", "MOV R1, UR9"), id="a reduction"),
        pytest.param(("UMOV UR5, UR4",), id="a copy that nobody reads"),
        pytest.param(
            (
                "LDC R1, c[0x0][0x28]",
                "IADD3 R1, R1, -0x28, RZ",
                "STL [R1+0x14], R8",
                "LDL R8, [R1]",
                "IADD3 R11, R10, RZ",
            ),
            id="a stack",
        ),
        pytest.param(
            ("@P0 BRA `(.L_x_0)", "UMOV UR4, 0x1", "EXIT", ".L_x_0:", "UMOV UR4, 0x2", "MOV R1, UR4"), id="ways"
        ),
        pytest.param(("UMOV UR4, 0x1", ".L_x_1:", "MOV R1, UR4", "@P0 BRA `(.L_x_1)", "EXIT"), id="a loop"),
    ],
)
def test_what_is_set_is_not_found(lines: tuple[str, ...]) -> None:
    assert unset_reads_of(listing(*lines)) == []


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        pytest.param(("UIADD3 UR6, UP0, UR6, 0x20, URZ",), "UIADD3 UR6", id="a sum of itself"),
        pytest.param(("ULDC UR6, c[0x0][0x218]", "UIADD3.64 UR8, UR6, UR6, URZ"), "UIADD3.64", id="half of a pair"),
        pytest.param(("UMOV UR6, 0x1", "HGMMA R24, R8, gdesc[UR4], R24"), "HGMMA", id="half of half a descriptor"),
        pytest.param(("UMOV UR6, 0x1", "UMOV UR7, 0x1", "HGMMA R24, gdesc[UR4], R24"), "HGMMA", id="a descriptor"),
        pytest.param(
            ("UMOV UR6, 0x1", "UTCHMMA gdesc[UR6], tmem[UR6], idesc[UR6]"), "UTCHMMA", id="half for Blackwell"
        ),
        pytest.param(("UMOV UR5, 0x1", "UMOV UR5, UR4", "MOV R1, UR5"), "MOV R1", id="a copy that is read"),
        pytest.param(("@P0 BRA `(.L_x_0)", "UMOV UR4, 0x1", ".L_x_0:", "MOV R1, UR4"), "MOV R1", id="one of two ways"),
        pytest.param(("BRA `(.L_x_0)", ".L_x_1:", "MOV R1, UR4", "EXIT", ".L_x_0:", "BRA `(.L_x_1)"), "MOV", id="far"),
        pytest.param(("LDC R1, c[0x0][0x28]", "IADD3 R13, P1, R1, 0x20, RZ"), "IADD3 R13", id="the stack for a base"),
        pytest.param(("IADD3.X R8, R2, -R1.reuse, RZ, P1, !PT",), "IADD3.X", id="the stack in a long sum"),
    ],
)
def test_what_is_not_set_is_found(lines: tuple[str, ...], found: str) -> None:
    (read,) = unset_reads_of(listing(*lines))
    assert found in read


def test_code_that_is_not_reached_is_not_read() -> None:
    assert unset_reads_of(listing("EXIT", "MOV R1, UR4")) == []
    assert len(unset_reads_of(listing("@P0 EXIT", "MOV R1, UR4"))) == 1


def test_words_that_are_not_a_listing_are_no_proof() -> None:
    with pytest.raises(AssertionError, match="disassembler"):
        unset_reads_of("nvdisasm: unknown option")
