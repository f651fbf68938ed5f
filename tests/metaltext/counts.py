"""What a GPU's compiler makes of attention: operations an element, registers.

clang compiles the C++14 text (`portable`) for an AMD GPU of 32 lanes with packed
halves, which any clang of Linux can and no such GPU need be there for. Operations are
those of LLVM's code before a GPU is chosen, in the loop over rounds of packed tokens,
of one lane: it takes as many elements as a key and a value have. They are static: what
a round seldom does (raising bounds, the last tile) counts, too. Registers are AMD's, of
32 bits, as Apple's are; beside them what would be spilled of 128, which Apple's GPUs
have. Both are estimates to compare with themselves: another compiler allocates.

Owns no limit (`budgets`).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from metalsim.build import CompileError, find_clang

from .control_flow import blocks_of, loops_of
from .portable import FLAGS, portable_text
from .specialisations import Specialisation
from .texts import entry_text

_TARGET = ["-target", "amdgcn-amd-amdhsa", "-mcpu=gfx1100", "-nogpulib", "-O2", "-w"]
_TARGET += ["-mllvm", "-unroll-allow-peeling=false"]
#: Registers of a thread on Apple's GPUs.
APPLE_REGISTERS = 128
#: Instructions by what they cost a GPU. The first pattern that an instruction matches
#: has it; what matches none (branches, phis, casts of addresses) costs nothing here.
_CLASSES = {
    "matrix products": r"asm .*; MATRIX",
    "shuffles": r"asm .*; (SHUFFLE|SIMD_)",
    "barriers": r"asm .*; BARRIER",
    "exponentials": r"@llvm\.(exp2|log2|sqrt)\.",
    "integer divisions": r"= ([us]div|[us]rem) ",
    "float divisions": r"= fdiv ",
    "half pairs": r"(= f(add|sub|mul|neg)|@llvm\.(fma|fmuladd)\.\w+\().*<\d+ x half>"
    r"|@llvm\.(fma|fmuladd)\.v\d+f16",
    "floats": r"= f(add|sub|mul|neg) |@llvm\.(fma|fmuladd|minnum|maxnum|minimum|maximum"
    r"|rint)\.",
    "64-bit integers": r"= (add|sub|mul|shl|lshr|ashr|and|or|xor) .*\bi64\b",
    "shifts by variables": r"= (shl|lshr|ashr) .*, %[\w.]+$"
    r"|@llvm\.fsh.*, i32 %[\w.]+\)",
    "shifts": r"= (shl|lshr|ashr) |@llvm\.fsh",
    "bit operations": r"= (and|or|xor) ",
    "integers": r"= (add|sub|mul) |@llvm\.[us](min|max)\.",
    "comparisons": r"= (icmp|fcmp|select) ",
    "conversions": r"= (fptrunc|sitofp|uitofp|fptosi|fptoui) ",
    "device memory": r"(= load|^store) .*addrspace\(1\)",
    "threadgroup memory": r"(= load|^store) .*addrspace\(3\)",
    "thread memory": r"= load |^store |= alloca ",
}


@dataclass(frozen=True)
class Counted:
    """Of one specialisation of attention.

    Attributes:
        operations: Of a lane and round, by class; 64-bit ones are no others.
        elements: Of keys and values that a lane takes in it.
        registers: 32 bits each, if there is no limit.
        spilled: Bytes of a thread that 128 registers leave no room for.
    """

    operations: Counter[str]
    elements: int
    registers: int
    spilled: int

    @property
    def per_element(self) -> float:
        """Operations an element."""
        return self.operations.total() / self.elements


def count(made: Specialisation) -> Counted:
    """Operations and registers of a specialisation of DECODE_SPLIT_KV."""
    template = dict(made.template)
    header, entry = entry_text(made)
    # Registers are those of the kernel as it is; operations those of packed tokens,
    # with inner loops over units and simdgroups unrolled, so that all are counted.
    threads = 32 * int(str(template["SIMDGROUPS"]))
    code = llvm_of(header, entry)
    registers, _ = _allocated(code, threads, None)
    _, spilled = _allocated(code, threads, APPLE_REGISTERS)
    packed_only = entry.replace("if (split < 0) {", "if (false) {")
    unrolled = header.replace("unroll(disable)", "unroll(full)")
    # But not the two passes of a round, the second of which is rare.
    unrolled = unrolled.replace("TQ_ROLL\nfor (int pass", "for (int pass")
    if packed_only == entry or unrolled == header:
        raise ValueError("the text is not the one that operations are counted of")
    function = blocks_of(llvm_of(unrolled, packed_only))
    rounds = [loop for loop in loops_of(function) if _is_round(function, loop)]
    outermost = max(rounds, key=len)
    operations = Counter(
        kind
        for block in outermost
        for line in function[block].lines
        if (kind := class_of(line))
    )
    elements = int(str(template["DK"])) + int(str(template["DV"]))
    return Counted(operations, elements, registers, spilled)


def class_of(line: str) -> str | None:
    """What an instruction of LLVM counts as; None for those that cost nothing."""
    for name, pattern in _CLASSES.items():
        if re.search(pattern, line):
            return name
    return None


def llvm_of(header: str, entry: str) -> str:
    """LLVM's code of an entry, optimised."""
    text = portable_text(header, [entry])
    flags = [flag for flag in FLAGS if not flag.startswith("-W")]
    code = _clang([*flags, *_TARGET, "-S", "-emit-llvm", "-o", "-", "-"], text)
    # C++ says zero; threadgroup memory begins with anything.
    return re.sub(r"(addrspace\(3\) global .*?) zeroinitializer", r"\1 undef", code)


def _is_round(function, loop) -> bool:
    text = "\n".join(line for block in loop for line in function[block].lines)
    return "; BARRIER" in text and "exp2" in text


def _allocated(code: str, threads: int, limit: int | None) -> tuple[int, int]:
    """Registers, and bytes of thread memory, of LLVM's code for an AMD GPU."""
    kernel = re.search(r"^define .*amdgpu_kernel .*#(\d+)", code, re.MULTILINE)
    if kernel is None:
        raise ValueError("no kernel in LLVM's code")
    wanted = f'"amdgpu-flat-work-group-size"="{threads},{threads}"'
    if limit is not None:
        wanted += f' "amdgpu-num-vgpr"="{limit}"'
    code = code.replace(
        f"attributes #{kernel[1]} = {{", f"attributes #{kernel[1]} = {{ {wanted}", 1
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ll"
        path.write_text(code)
        listing = _clang(["-x", "ir", *_TARGET, "-S", "-o", "-", str(path)], "")
    found = dict(re.findall(r"; (NumVgprs|ScratchSize): (\d+)", listing))
    return int(found["NumVgprs"]), int(found["ScratchSize"])


def _clang(arguments: list[str], text: str) -> str:
    done = subprocess.run(
        [find_clang()[0], *arguments], input=text, capture_output=True, text=True
    )
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout
