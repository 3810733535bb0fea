"""The machine code of CUDA kernels: instructions, loops, and what a warp executes when it goes round a loop."""

import functools
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cuda_kernels import demangled, nvcc

Counts = Counter[str]
Ways = dict[tuple[int, ...], tuple[int, tuple[range, ...]]]  # by the counts so far: instructions, and blocks


def nvdisasm() -> str:
    """NVIDIA's disassembler: of the PATH, beside nvcc, or of the pip package."""
    found = shutil.which("nvdisasm")
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    beside = [Path(nvcc() or "").parent / "nvdisasm", *packages.glob("cu*/bin/nvdisasm")]
    found = found or next((str(path) for path in beside if path.is_file()), None)
    if found is None:
        raise FileNotFoundError("there is no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return found


@dataclass
class Instruction:
    """Without its predicate: `opcode` as in "LDG.E.128"; where it jumps to, if it does, and whether it always does."""

    opcode: str
    target: int | None = None
    always: bool = False


@dataclass
class Loop:
    """Instructions first ... last, of which the last jumps back to the first."""

    first: int
    last: int


@dataclass
class Code:
    """The instructions of one kernel."""

    instructions: list[Instruction]

    def counts(self, loop: Loop | None = None) -> Counts:
        """How often every opcode stands in the kernel, or in a loop of it."""
        chosen = self.instructions[loop.first : loop.last + 1] if loop else self.instructions
        return Counter(one.opcode for one in chosen)

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """All loops, inner ones before those around them.

        A jump back makes one if there is no way to it but through its target; that from a slow path, which the compiler
        has put behind everything else, makes none.
        """
        backwards = {}
        for place, one in enumerate(self.instructions):
            if one.target is not None and one.target < place and not self.reached_without(one.target, place):
                backwards[one.target] = place  # the last jump to this place
        return sorted(map(Loop, backwards, backwards.values()), key=lambda loop: loop.last - loop.first)

    def innermost(self, key: str) -> Loop:
        """Of the loops that have no others with the key in them, the one in which it stands most often."""
        having = [loop for loop in self.loops if number(self.counts(loop), key)]
        inner = [a for a in having if not any(b is not a and a.first <= b.first and b.last <= a.last for b in having)]
        return max(inner, key=lambda loop: number(self.counts(loop), key))

    def around(self, inner: Loop) -> Loop:
        """The smallest loop around this one."""
        return next(loop for loop in self.loops if loop.first < inner.first and inner.last <= loop.last)

    def once_round(self, loop: Loop, needed: dict[str, int]) -> Counts:
        """The fewest instructions on a way through the loop on which each of these opcodes stands so many times.

        So what a warp seldom does, such as the slow path of a division, is left out. Jumps back within are not taken.
        """
        ways: dict[int, Ways] = {loop.first: {(0,) * len(needed): (0, ())}}
        finished: Ways = {}
        for block in self.blocks(loop):
            counts = Counter(self.instructions[place].opcode for place in block)
            for before, (length, way) in ways.pop(block.start, {}).items():
                arrived = tuple(old + number(counts, key) for old, key in zip(before, needed, strict=True))
                for place in self.successors(block.stop - 1):
                    at = finished if place == loop.first else ways.setdefault(place, {})
                    if arrived not in at or length + len(block) < at[arrived][0]:
                        at[arrived] = length + len(block), (*way, block)
        _, way = finished[tuple(needed.values())]
        return Counter(self.instructions[place].opcode for block in way for place in block)

    def blocks(self, loop: Loop) -> list[range]:
        """Runs of instructions that are executed together."""
        inside = range(loop.first, loop.last + 1)
        jumps = [place for place in inside if self.instructions[place].target is not None]
        targets = {self.instructions[place].target for place in jumps}
        begins = sorted({loop.first, *(one for one in targets if one in inside), *(place + 1 for place in jumps)})
        return [range(a, b) for a, b in zip(begins, [*begins[1:], loop.last + 1], strict=True) if a < b]

    def reached_without(self, without: int, goal: int) -> bool:
        """Whether there is a way to an instruction that does not lead through another one."""
        seen, ahead = {without}, [0]
        while ahead:
            place = ahead.pop()
            if place == goal:
                return True
            if place not in seen and place < len(self.instructions):
                seen.add(place)
                ahead.extend(self.successors(place))
        return False

    def successors(self, place: int) -> Iterable[int]:
        """Where it goes on after this instruction."""
        one = self.instructions[place]
        if one.target is not None:
            yield one.target
        if not one.always:
            yield place + 1


def matches(opcode: str, key: str) -> bool:
    """Whether an opcode is the key, or begins with it and a dot."""
    return opcode == key or opcode.startswith(f"{key}.")


def number(counts: Counts, *keys: str) -> int:
    """Of the instructions that match any of the keys."""
    return sum(count for opcode, count in counts.items() if any(matches(opcode, key) for key in keys))


def disassembled(cubin: Path) -> dict[str, Code]:
    """Every kernel of a compiled file, by its name and template arguments."""
    printed = subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"^\.text\.(\w+):$", printed, flags=re.MULTILINE)[1:]
    return {demangled(symbol): code_of(text) for symbol, text in zip(kernels[::2], kernels[1::2], strict=True)}


def code_of(text: str) -> Code:
    """What nvdisasm prints for one kernel."""
    lines = re.findall(r"^(?:(\.L_\w+):|\s+/\*[0-9a-f]+\*/\s+(.+?) ?;)", text, flags=re.MULTILINE)
    labels: dict[str, int] = {}
    printed: list[str] = []
    for label, instruction in lines:
        if label:
            labels[label] = len(printed)
        elif not instruction.startswith("@!PT "):  # which is never executed
            printed.append(instruction)
    instructions = []
    for one in printed:
        bare = re.sub(r"^@!?U?P\w+ +", "", one)
        opcode, _, operands = bare.partition(" ")
        jump = re.search(r"`\((\.L_\w+)\)", operands) if opcode.split(".")[0] == "BRA" else None
        ends = opcode.startswith(("EXIT", "RET")) or (jump is not None and operands.startswith("`"))
        instructions.append(Instruction(opcode, labels.get(jump[1]) if jump else None, ends and one == bare))
    return Code(instructions)
