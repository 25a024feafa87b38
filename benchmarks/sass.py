"""Machine code of NVIDIA GPUs: cubins disassembled without a GPU, their loops found, their instructions counted.

Instructions are 16 bytes each from sm_70 on. What is counted is text, so every number is a static one: an instruction
in a loop's body counts once for each time around, whether or not a branch goes past it.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

BYTES = 16  # of an instruction
WIDE = 16  # bytes of a wide load or store; sm_100 has 32 too

_PIPES = {
    "fma": "FADD FMUL FFMA IMAD HFMA2 HADD2 HMUL2 FADD2 FMUL2 FFMA2",
    "xu": "MUFU I2F F2I F2F FRND POPC FLO BREV FCHK",
    "lsu": "LDG STG LDGSTS LDS STS LDL STL SHFL RED ATOMG ATOMS",
    "f64": "DADD DMUL DFMA DSETP DSET DMNMX DMMA",
    "control": "BRA BRX JMP EXIT CALL RET BSSY BSYNC BREAK WARPSYNC YIELD BAR NOP LDC S2R CS2R S2UR BMOV MEMBAR DEPBAR",
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
_SIZES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    predicate: str
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def nbytes(self) -> int:
        """What one thread reads from memory or writes to it."""
        return next((_SIZES[m] for m in self.opcode.split(".") if m in _SIZES), 4)

    @property
    def loads(self) -> bool:
        """From global memory."""
        return self.name in ("LDG", "LDGSTS")

    @property
    def stores(self) -> bool:
        """To global memory."""
        return self.name == "STG"

    @property
    def pipe(self) -> str:
        """The unit that runs it: arithmetic of floats, of all else, of functions and conversions, memory, float64."""
        if any(m == "F64" or m.endswith("64H") for m in self.opcode.split(".")):
            return "f64"
        return _PIPE_OF.get(self.name) or ("control" if self.name[0] == "U" else "alu")

    @property
    def parts(self) -> bool:
        """Whether it is the branch that shuffles take in a warp that has parted: ours never do."""
        return self.opcode.startswith("BRA.DIV")

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if self.name == "BRA" and not self.parts and found else None

    @property
    def ends(self) -> bool:
        """Whether what follows it is never reached from it."""
        conditional = self.predicate or "," in self.operands or self.parts
        return self.name in ("RET", "BRX", "JMP") or (self.name in ("BRA", "EXIT") and not conditional)


# ---- disassembly


def tool(name: str) -> Path:
    """nvdisasm or cuobjdump: the wheel's, or the one on the path."""
    for package in (f"nvidia-cuda-{name}", f"nvidia-cuda-{name}-cu12"):
        try:
            found = [file.locate() for file in files(package) or () if file.stem == name and "bin" in file.parts]
        except PackageNotFoundError:
            continue
        if found:
            return Path(str(found[0]))
    if on_path := shutil.which(name):
        return Path(on_path)
    raise FileNotFoundError(f"{name} is not installed: pip install nvidia-cuda-{name}")


def _run(name: str, *arguments: str) -> str:
    return subprocess.run([tool(name), *arguments], check=True, capture_output=True, text=True).stdout


def text_section(cubin: bytes) -> bytes:
    """The instructions of a cubin: an ELF file with one kernel."""
    table = struct.unpack_from("<Q", cubin, 40)[0]
    size, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + k * size) for k in range(count)]
    names = sections[names_at][4]
    found = [s for s in sections if cubin.startswith(b".text.", names + s[0])]
    if len(found) != 1:
        raise ValueError(f"the cubin has {len(found)} sections of code, expected 1")
    offset, length = found[0][4:6]
    return cubin[offset : offset + length]


def disassembled(cubins: Sequence[bytes], arch: int) -> list[list[Instruction]]:
    """The instructions of each. One run of nvdisasm for all: it starts in 0.4 s, and then takes 0.02 s a kernel."""
    codes = [text_section(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code")
        path.write_bytes(b"".join(codes))
        lines = _LINE.findall(_run("nvdisasm", "--binary", f"SM{arch}", str(path)))
    instructions = [Instruction(int(address, 16), *rest) for address, *rest in lines]
    if [i.address for i in instructions] != list(range(0, sum(map(len, codes)), BYTES)):
        raise ValueError("nvdisasm's output has lines of another form than is read here")
    out, begin = [], 0
    for code in codes:
        end = begin + len(code) // BYTES
        out.append(instructions[begin:end])
        begin = end
    return out


# ---- control flow


class Graph:
    """A kernel's basic blocks by their addresses, without the routines that it calls, and its loops."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        starts = {code[0].address} | {i.target for i in code if i.target is not None}
        starts |= {i.address + BYTES for i in code if i.target is not None or i.ends}
        blocks: dict[int, list[Instruction]] = {}
        for i in code:
            if i.address in starts:
                block = blocks[i.address] = []
            block.append(i)
        self.next = {start: list(self._follow(block, blocks)) for start, block in blocks.items()}
        reached, stack = {code[0].address}, [code[0].address]
        while stack:
            new = set(self.next[stack.pop()]) - reached
            reached |= new
            stack += new
        self.blocks = {start: block for start, block in blocks.items() if start in reached}
        self.before: dict[int, list[int]] = {start: [] for start in self.blocks}
        for start in self.blocks:
            for follower in self.next[start]:
                self.before[follower].append(start)
        self.dominators = self._dominators(code[0].address)
        self.loops = self._loops()

    @staticmethod
    def _follow(block: list[Instruction], blocks: dict[int, list[Instruction]]) -> Iterator[int]:
        last = block[-1]
        if last.target is not None:
            yield last.target
        if not last.ends and last.address + BYTES in blocks:
            yield last.address + BYTES

    def _dominators(self, entry: int) -> dict[int, set[int]]:
        """The blocks that every way to a block goes through."""
        everything = set(self.blocks)
        out = dict.fromkeys(self.blocks, everything) | {entry: {entry}}
        changed = True
        while changed:
            changed = False
            for start in sorted(everything - {entry}):
                new = {start} | set.intersection(*(out[b] for b in self.before[start]))
                changed |= new != out[start]
                out[start] = new
        return out

    def _loops(self) -> dict[int, set[int]]:
        """Natural loops: first block -> all blocks."""
        loops: dict[int, set[int]] = {}
        for end in self.blocks:
            for head in set(self.next[end]) & self.dominators[end]:
                body, stack = loops.setdefault(head, {head}), [end]
                while stack:
                    block = stack.pop()
                    if block not in body:
                        body.add(block)
                        stack += self.before[block]
        return loops

    def around(self, block: int) -> list[int]:
        """The loops around a block, innermost first, by their first blocks."""
        return sorted((head for head, body in self.loops.items() if block in body), key=lambda h: len(self.loops[h]))

    def code(self, blocks: Iterable[int], head: int | None) -> list[Instruction]:
        """The instructions of blocks (of the loop that begins at `head`), without those that call a routine and that
        another way leads past: such are the slow paths of divisions and of 64-bit quotients."""
        chosen = set(blocks)
        ends = [block for block in chosen if not set(self.next[block]) & (chosen - {head})]

        def slow(block: int) -> bool:
            calls = any(i.name == "CALL" for i in self.blocks[block])
            return calls and not all(block in self.dominators[end] for end in ends)

        return [i for block in sorted(chosen) if not slow(block) for i in self.blocks[block]]


# ---- facts


@dataclass(frozen=True)
class Pass:
    """What a thread does again and again while it goes through its data: the body of a loop that moves elements, or,
    where there is no such loop, what lies between the first wide load and the last wide store."""

    kind: str  # from where to where: "global", "global > global", "global > shared", "shared > shared", ...; "sample"
    instructions: int
    loaded: int  # bytes of elements, from global memory, else from shared memory
    waits: int  # for global memory, one after the other
    pipes: dict[str, int]
    calls: int  # of routines that are gone around unless an operand is unusual
    spills: int


@dataclass(frozen=True)
class Facts:
    """What a kernel's machine code says."""

    registers: int
    stack: int  # bytes
    spills: int  # loads and stores of the stack
    shared: int  # bytes
    wide_loads: int
    wide_stores: int
    float64: int
    instructions: int
    passes: tuple[Pass, ...]


def _registers(i: Instruction) -> list[int]:
    """Of the operands, the first of each: those that an address or a stored vector goes on to are added."""
    out = []
    for first, double in re.findall(r"\bR(\d+)(\.64)?", i.operands):
        out += range(int(first), int(first) + (2 if double else 1))
    return out + list(range(out[-1] + 1, out[-1] + i.nbytes // 4)) if i.stores and out else out


def _waits(code: Sequence[Instruction]) -> int:
    """How many times the latency of global memory passes, one after the other: instructions are issued in order, and
    wait for the loads whose registers they name."""
    now, ready = 0, dict[int, int]()
    for i in code:
        registers = _registers(i)
        now = max([now, *(ready.get(register, 0) for register in registers)])
        if i.name == "LDG" and registers:
            ready |= dict.fromkeys(range(registers[0], registers[0] + -(-i.nbytes // 4)), now + 1)
    return max(now, 1)


def _spills(code: Iterable[Instruction]) -> int:
    return sum(i.name in ("LDL", "STL") for i in code)


def _elements(code: Iterable[Instruction], wide: bool, tiled: bool) -> tuple[str, int]:
    """What code moves, and the bytes of it that are loaded. Where a kernel has wide loads, narrow ones bring
    something other than elements (class indices, weights)."""
    moved: Counter[str] = Counter()
    for i in code:
        if i.loads or i.stores:
            moved[i.name] += i.nbytes if i.nbytes >= WIDE or not wide else 0
        elif tiled and i.name in ("LDS", "STS"):
            moved[i.name] += i.nbytes
    source = "global" if moved["LDG"] else "shared" if moved["LDS"] else ""
    sink = "global" if moved["STG"] else "shared" if moved["STS"] else ""
    return f"{source} > {sink}" if sink else source, moved["LDG"] or moved["LDS"]


def passes(code: Sequence[Instruction], tiled: bool) -> tuple[Pass, ...]:
    """Of the innermost loops that move elements, the one of each kind that moves most at a time: the others take what
    it leaves over. `tiled`: elements pass through shared memory, and the loop around is added, a pass "sample"."""
    graph = Graph(code)
    wide = any(i.loads and i.nbytes >= WIDE for block in graph.blocks.values() for i in block)
    own: dict[int | None, list[int]] = {}
    for block in graph.blocks:
        own.setdefault(next(iter(graph.around(block)), None), []).append(block)
    found = []
    for head, blocks in own.items():
        kind, loaded = _elements((i for block in blocks for i in graph.blocks[block]), wide, tiled)
        if loaded and (wide or head is not None):
            found.append((0 if head is None else len(graph.around(head)), kind, loaded, head, blocks))
    deepest = max((depth for depth, kind, *_ in found if kind.startswith("global")), default=None)
    best: dict[str, Pass] = {}
    outer = set()
    for depth, kind, loaded, head, blocks in found:
        if depth != deepest:
            continue
        one = _pass(graph, head, blocks if head is None else graph.loops[head], kind, loaded)
        if kind not in best or (loaded, -one.instructions) > (best[kind].loaded, -best[kind].instructions):
            best[kind] = one
        outer |= set(graph.around(head)[1:2] if head is not None else ())
    around = [_pass(graph, head, own[head], "sample", 0) for head in outer] if tiled else []
    return (*best.values(), *around)


def _pass(graph: Graph, head: int | None, blocks: Iterable[int], kind: str, loaded: int) -> Pass:
    blocks = list(blocks)
    code = graph.code(blocks, head)
    if head is None:
        wide = [k for k, i in enumerate(code) if (i.loads or i.stores) and i.nbytes >= WIDE]
        code = code[wide[0] : wide[-1] + 1 if code[wide[-1]].stores else len(code)]
    pipes: Counter[str] = Counter()
    for i in code:
        pipes[i.pipe] += max(1, i.nbytes // 4) if i.pipe == "lsu" else 1
    calls = sum(i.name == "CALL" for block in blocks for i in graph.blocks[block])
    return Pass(kind, len(code), loaded, _waits(code), dict(pipes), calls, _spills(code))


def inspect(cubins: Sequence[bytes], arch: int, tiled: Sequence[bool]) -> list[Facts]:
    """The facts of each kernel, for one architecture (90: sm_90); `tiled` as in `passes`."""
    out = []
    for cubin, code, through_shared in zip(cubins, disassembled(cubins, arch), tiled, strict=True):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", _run("cuobjdump", "-res-usage", file.name)))
        facts = Facts(
            registers=int(usage["REG"]),
            stack=int(usage["STACK"]),
            spills=_spills(code),
            shared=int(usage["SHARED"]),
            wide_loads=sum(i.loads and i.nbytes >= WIDE for i in code),
            wide_stores=sum(i.stores and i.nbytes >= WIDE for i in code),
            float64=sum(i.pipe == "f64" for i in code),
            instructions=len(code),
            passes=passes(code, through_shared),
        )
        out.append(facts)
    return out
