"""Reads the machine code of compiled kernels: what an assembler got wrong shows there, and on a GPU only by chance.

ptxas 12.8 sometimes moves the arithmetic of a matrix product's descriptor to where its base is not yet known. The
product then reads whatever the register held: wrong numbers, or an illegal access, or nothing at all to notice. In the
uniform registers that register is one nothing has written; in a thread's own, the stack's, R1, stands for it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton

INSTRUCTION = re.compile(
    r"^\s*/\*(?P<place>[0-9a-f]+)\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<name>[A-Z0-9_.]+)(?P<rest>[^;]*);"
)
LABEL = re.compile(r"^(\.L_\S+):")
TARGET = re.compile(r"`\((\.L_\S+?)\)")
UNIFORM = re.compile(r"\bUR(\d+)\b")
WRITERS = re.compile(r"U|R2UR|S2UR|CS2UR|C?REDUX|VOTEU|LDCU|ELECT")
"""Instructions whose first operand is a uniform register that they write."""
STACK = re.compile(r"[-~!|]*R1\b[^\[\]]*")
"""The register of the stack's address as a number, and not inside an address."""
DESCRIPTOR = 4
"""Uniform registers that name the two operands of a matrix product; the first two are idle where a thread holds the
left one. From Blackwell on each operand has a descriptor of 64 bits of its own (PTX ISA, tcgen05.mma)."""


@dataclass(frozen=True)
class Instruction:
    place: str
    name: str
    operands: tuple[str, ...]
    guarded: bool

    def __str__(self) -> str:
        return f"{self.place}: {self.name} {', '.join(self.operands)}"

    @property
    def writes(self) -> frozenset[int]:
        found = re.fullmatch(r"UR(\d+)", self.operands[0]) if self.operands else None
        if found is None or not WRITERS.match(self.name):
            return frozenset()
        width = 4 if ".128" in self.name else 2 if ".64" in self.name or ".WIDE" in self.name else 1
        return frozenset(range(int(found[1]), int(found[1]) + width))

    @property
    def reads(self) -> frozenset[int]:
        read: set[int] = set()
        for number, operand in enumerate(self.operands):
            for register in map(int, UNIFORM.findall(operand)):
                if "gdesc" in operand and self.name.startswith("UTC"):
                    read.update((register, register + 1))
                elif "gdesc" in operand:
                    held = re.match(r"R\d+", self.operands[1]) is not None
                    read.update(range(register + 2 * held, register + DESCRIPTOR))
                elif number or not self.writes:
                    # of a wide product only the summand is wide
                    wide = ".WIDE" in self.name and number == 3
                    wide |= ".64" in self.name and WRITERS.match(self.name) is not None
                    read.update(range(register, register + 1 + wide))
        return frozenset(read)

    @property
    def counts_with_the_stack(self) -> bool:
        """Whether it makes of the stack's address what is not the stack's address: nobody asked for that."""
        first = self.operands[:1] if self.name.startswith("ST") else ()
        moves = self.operands[:1] == ("R1",)
        return not moves and any(STACK.fullmatch(operand) for operand in (*first, *self.operands[1:]))


def unset_reads(cubin: bytes) -> list[str]:
    """The instructions that read a uniform register which, on some way to them, no instruction has written, or count
    with the stack's address in the place of a value that there is not yet."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [str(triton.knobs.nvidia.nvdisasm.path), "-c", file.name]
        text = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    return unset_reads_of(text)


def unset_reads_of(text: str) -> list[str]:
    """The same of what the disassembler wrote."""
    code, labels = _parsed(text)
    known: list[frozenset[int] | None] = [None] * len(code)
    ways = [(0, frozenset[int]())]
    while ways:
        number, have = ways.pop()
        while number < len(code):
            before, one = known[number], code[number]
            have = have if before is None else have & before
            if have == before:
                break
            known[number] = have
            copied = one.reads if one.name == "UMOV" else frozenset()
            have = have | one.writes if copied <= have else have - one.writes
            target = TARGET.search(" ".join(one.operands))
            always = not one.guarded and not re.match(r"!?U?P\w", one.operands[0] if one.operands else "")
            if one.name.startswith("BRA") and target:
                ways.append((labels[target[1]], have))
                if always:
                    break
            if one.name.startswith(("EXIT", "RET")) and always:
                break
            number += 1
    # to copy what nothing has set does no harm: where the copy is read it is found
    used = [(one, have) for one, have in zip(code, known, strict=True) if have is not None and one.name != "UMOV"]
    return [str(one) for one, have in used if one.reads - have or one.counts_with_the_stack]


def _parsed(text: str) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            operands = tuple(part.strip() for part in found["rest"].split(",") if part.strip())
            if found["name"].startswith("R2UR") and operands[0].startswith("P"):
                operands = operands[1:]  # whether it could, beside what it wrote
            code.append(Instruction(found["place"], found["name"], operands, found["guard"] is not None))
    assert code, "the disassembler's words are not those that this was written for"
    return code, labels
