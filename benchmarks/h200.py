"""What an H200 can do, by its datasheet and the CUDA programming guide."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass

MULTIPROCESSORS, SHARED_BYTES = 132, 227 << 10
"""SHARED_BYTES: what a block can have; a multiprocessor has a KiB more for each block."""

BYTES_PER_SECOND = 4.8e12
TENSOR_FLOPS = {"bfloat16": 989e12, "float32": 494e12 / 3}  # float32 as three products of TF32
PLAIN_FLOPS = {"float64": 34e12}
CLOCKS_PER_SECOND = 1.98e9  # at which it boosts; the datasheet's rates of tensor cores are those at 1.83e9

MATRIX_SHARE = 0.63
"""Of the rate of tensor cores: what instructions that a single warp waits for reach on Hopper (Luo et al., 2024,
"Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", section on tensor cores)."""

# Clocks for which an instruction of one warp keeps a unit of its multiprocessor busy: 32 over the results per clock
# that the programming guide gives for compute capability 9.0 ("Throughput of Native Arithmetic Instructions").
ISSUE = 1 / 4
UNITS = {
    "float64": (1 / 2, "DADD DMUL DFMA DSETP"),
    "float32": (1 / 4, "FADD FMUL FFMA"),
    "integer": (1 / 2, "IADD3 VIADD LOP3 ISETP SEL FSEL SHF PRMT LEA FSETP PLOP3 P2R R2P IMNMX VIMNMX FMNMX"),
    "multiply": (1 / 2, "IMAD"),
    "conversion": (2, "F2F MUFU"),
    "shuffle": (1, "SHFL"),
}
MACS = {"HMMA.16816.F32": 16 * 8 * 16, "HMMA.1688.F32.TF32": 16 * 8 * 8}
SHARED_ACCESSES, GLOBAL_ACCESSES = ("LDS", "STS", "LDSM", "LDGSTS"), ("LDG", "STG")
SHARED_BYTES_PER_CLOCK = 128
CACHE_BYTES, CACHE_BYTES_PER_SECOND = 50e6, 5120 * CLOCKS_PER_SECOND
"""Of the L2 cache. 5120 bytes a clock is the A100's rate, by its whitepaper; no later figure is published."""


@dataclass(frozen=True)
class Least:
    """What an operator must do: bytes to move, and operations, whose rate is that of this dtype."""

    moved_bytes: float
    operations: float = 0
    dtype: str = "float32"

    def seconds(self, bytes_per_second: float, flops: dict[str, float]) -> float:
        """The time of the bytes or that of the operations, whichever is longer."""
        return max(self.moved_bytes / bytes_per_second, self.operations / flops[self.dtype])


def clocks(counts: Counter[str]) -> dict[str, float]:
    """For which these instructions of a warp keep every unit of its multiprocessor busy."""
    busy: dict[str, float] = defaultdict(float, issue=ISSUE * sum(counts.values()))
    for opcode, count in counts.items():
        base = opcode.split(".")[0]
        for unit, (each, opcodes) in UNITS.items():
            if base in opcodes.split():
                busy[unit] += each * count
        if base in SHARED_ACCESSES:
            busy["shared"] += count * 32 * access_bytes(opcode) / SHARED_BYTES_PER_CLOCK
        if base == "HMMA":
            busy["tensor"] += count * tensor_clocks(opcode)
    return dict(busy)


def global_bytes(counts: Counter[str]) -> float:
    """Bytes that these instructions of a warp read from global memory and write to it."""
    accesses = [(one, count) for one, count in counts.items() if one.split(".")[0] in GLOBAL_ACCESSES]
    return sum(32 * access_bytes(opcode) * count for opcode, count in accesses)


def access_bytes(opcode: str) -> int:
    """Bytes that one lane accesses: 16 for LDS.128, and for LDSM of four 8x8 matrices."""
    parts = opcode.split(".")
    if parts[0] == "LDSM":
        return 4 * int(parts[-1] if parts[-1].isdigit() else 1)
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1}
    return next((widths[part] for part in parts if part in widths), 4)


def tensor_clocks(opcode: str) -> float:
    """At the share of the full rate that such an instruction can reach, in clocks of everything else."""
    macs = next(count for name, count in MACS.items() if opcode.startswith(name))
    flops = TENSOR_FLOPS["bfloat16"] if opcode.startswith("HMMA.16816") else 3 * TENSOR_FLOPS["float32"]
    return 2 * macs / (MATRIX_SHARE * flops) * MULTIPROCESSORS * CLOCKS_PER_SECOND


def resident_blocks(threads: int, registers: int, shared_bytes: int) -> int:
    """How many of a kernel's blocks a multiprocessor of compute capability 9.0 holds at once.

    It has room for 64 warps and 32 blocks, four register files of 16,384 registers each, given to warps by 256, and 228
    KiB of shared memory, of which every block takes one for itself.
    """
    warps = math.ceil(threads / 32)
    warps_by_registers = 4 * (16384 // (math.ceil(registers * 32 / 256) * 256))
    by_shared = (228 << 10) // (shared_bytes + (1 << 10))
    return min(64 // warps, 32, warps_by_registers // warps, by_shared)
