"""Every kind of GPU kernel compiled and its machine code read: the tests' facts, and what to expect of a device.

    python benchmarks/machine_code.py [part of a kernel's name ...] [--arch 75 80 90 100] [--processes 2]
                                      [--json FILE] [--write docs/cuda-kernels.md]

Needs no GPU and no driver, but numba-cuda and the wheels nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from sass import Facts, inspect, tool

from fastloss.backends.cuda.tuning import tuning_for
from fastloss.kernels.bce import BCE
from fastloss.kernels.bce_with_logits import BCE_WITH_LOGITS, BCE_WITH_LOGITS_POS_WEIGHT
from fastloss.kernels.cuda.build import Kernel, cubin
from fastloss.kernels.cuda.device import SIMULATED, WARP
from fastloss.kernels.cuda.folding import FoldingKernel
from fastloss.kernels.cuda.memory import VECTOR_BYTES
from fastloss.kernels.cuda.nll import NLLKernel
from fastloss.kernels.cuda.pointwise import PointwiseKernel
from fastloss.kernels.cuda.rows import RowsKernel
from fastloss.kernels.cuda.samples import SamplesKernel
from fastloss.kernels.cuda.sums import Combination, Reduction
from fastloss.kernels.huber import HUBER
from fastloss.kernels.kl_div import KL_DIV, KL_DIV_LOG_TARGET
from fastloss.kernels.l1 import L1
from fastloss.kernels.mse import MSE
from fastloss.kernels.pointwise import Pointwise
from fastloss.kernels.smooth_l1 import SMOOTH_L1
from fastloss.kernels.storage import itemsize

GENERATED = "<!-- python benchmarks/machine_code.py --write docs/cuda-kernels.md writes what follows -->\n"


# ---- the catalogue


@dataclass(frozen=True)
class Entry:
    """A kernel that stands for its kind."""

    name: str
    kernel: Kernel
    loaded: int  # bytes of an element that one pass over the data loads
    moved: int  # bytes of an element to and from the device's memory, caches left out
    wide_loads: bool
    wide_stores: bool = False
    tile: int = 0  # elements of a sample that pass through shared memory together
    float64: bool = False
    warps: int = 16  # that an SM is to hold: with 64 bytes a thread in flight they make 32 KiB, enough for an H100

    @property
    def budget(self) -> int:
        """Registers of a thread with which an SM holds the wanted warps."""
        return min(255, REGISTERS // (self.warps * WARP) // 8 * 8)


def pointwise(loss: Pointwise, storage: str, what: str = "", warps: int = 24, **options: Any) -> Entry:
    """The mean of a loss and, where `options` asks for it, its gradient."""
    compute = "float64" if storage == "float64" else "float32"
    reduction = None if "losses" in options else Reduction(compute, storage, "constant")
    inputs = (storage,) * (2 + len(loss.operands))
    kernel = PointwiseKernel(loss, compute, inputs, reduction=reduction, **options)
    loaded, stored = (sum(map(itemsize, names)) for names in (kernel.sources, kernel.sinks))
    name = " ".join(filter(None, [loss.name, storage, what or ("gradient" if kernel.grad else "")]))
    wide, float64 = not kernel.ndim, compute == "float64"
    return Entry(name, kernel, loaded, loaded + stored, wide, wide and stored > 0, 0, float64, warps)


def rows(storage: str, what: str, warps: int = 16, **options: Any) -> Entry:
    """Cross-entropy of rows: those that stay in registers are read once, for a gradient the others twice."""
    compute = "float64" if storage == "float64" else "float32"
    whole = options.setdefault("phase", "whole") == "whole"
    options = {
        "lanes": VECTOR_BYTES // itemsize(storage),
        "vectors": TUNING.vectors,
        "threads": TUNING.long_row_threads,
        "index": None if "probabilities" in options else "int64",
        "reduction": Reduction(compute, storage, "weight") if whole else None,
    } | options
    kernel = RowsKernel(compute=compute, logits=storage, **{"group": options["threads"]} | options)
    loaded = sum(itemsize(name) for name in (kernel.logits, kernel.probabilities) if name)
    twice = kernel.grad is not None and whole and not kernel.resident
    moved = loaded * (1 + twice) + (itemsize(kernel.grad) if kernel.grad else 0)
    wide, float64 = kernel.lanes > 1, compute == "float64"
    name = f"cross_entropy {storage} {what}"
    return Entry(name, kernel, loaded, moved, wide, wide and bool(kernel.grad), 0, float64, warps)


def samples(storage: str, what: str, warps: int = 12, **options: Any) -> Entry:
    """Cross-entropy with a thread a sample: short rows, or classes that lie apart, which gradients read twice."""
    options = {"reduction": Reduction("float32", storage, "weight"), "threads": TUNING.sample_threads} | options
    kernel = SamplesKernel(compute="float32", logits=storage, index="int64", **options)
    size, twice = itemsize(storage), bool(kernel.grad) and not kernel.tile
    moved = size * (1 + twice) + (size if kernel.grad else 0)
    wide = kernel.tile > 0 or kernel.lanes * size >= VECTOR_BYTES
    name = f"cross_entropy {storage} {what}"
    return Entry(name, kernel, size, moved, wide, wide and bool(kernel.grad), kernel.tile, False, warps)


def small(name: str, kernel: Kernel) -> Entry:
    """A kernel that moves little, or not element by element: nothing is estimated."""
    return Entry(name, kernel, 0, 0, wide_loads=False, warps=16)


def _pointwise() -> Iterable[Entry]:
    losses = (L1, MSE, SMOOTH_L1, HUBER, BCE, BCE_WITH_LOGITS, BCE_WITH_LOGITS_POS_WEIGHT, KL_DIV, KL_DIV_LOG_TARGET)
    for loss in losses:
        yield pointwise(loss, "float32")
        yield pointwise(loss, "float32", grad="float32")
    for storage in ("bfloat16", "float64"):
        yield pointwise(MSE, storage)
        yield pointwise(MSE, storage, grad=storage)
        yield pointwise(BCE_WITH_LOGITS, storage)
    yield pointwise(BCE_WITH_LOGITS, "float64", grad="float64")
    for storage in ("bfloat16", "float16"):
        yield pointwise(BCE_WITH_LOGITS, storage, grad=storage, warps=16)
    yield pointwise(MSE, "float32", "losses", losses="float32")
    yield pointwise(MSE, "float32", "weighted", weight="float32")
    yield pointwise(MSE, "float32", "weighted gradient", weight="float32", grad="float32", by_weight=True)
    yield pointwise(MSE, "float32", "both gradients", grad="float32", grad_target="float32")
    yield pointwise(MSE, "float32", "gradient by losses", grad="float32", upstream="float32")
    yield pointwise(MSE, "float32", "strided", ndim=2)
    yield pointwise(MSE, "float32", "strided gradient", ndim=2, grad="float32")


def _classes() -> Iterable[Entry]:
    few, *_, most = TUNING.row_threads
    bfloat16 = {"grad": "bfloat16"}
    for storage in ("float32", "bfloat16"):
        yield rows(storage, "long rows")
        yield rows(storage, "long rows gradient", grad=storage)
    for storage in ("float32", "bfloat16", "float16", "float64"):
        yield rows(storage, "rows in a block gradient", resident=True, threads=few, grad=storage)
    yield rows("bfloat16", "rows in a block", resident=True, threads=few)
    yield rows("bfloat16", "rows in a large block gradient", resident=True, threads=most, **bfloat16)
    yield rows("bfloat16", "rows in a warp", resident=True, group=WARP, threads=few)
    yield rows("bfloat16", "rows in a warp gradient", resident=True, group=WARP, threads=few, **bfloat16)
    unaligned = {"lanes": 1, "vectors": 2 * TUNING.vectors}
    yield rows("bfloat16", "unaligned rows gradient", **unaligned, **bfloat16)
    yield rows("bfloat16", "slices", phase="part")
    yield rows("bfloat16", "slices gradient", phase="spread", **bfloat16)
    options = {"weight": "float32", "smoothing": True, "z_loss": True, "softcap": True}
    yield rows("bfloat16", "long rows gradient, all options", **options, **bfloat16)
    yield rows("float32", "probabilities gradient", probabilities="float32", grad="float32")
    for storage in ("float32", "bfloat16"):
        yield samples(storage, "few classes", tile=32)
        yield samples(storage, "few classes gradient", tile=32, grad=storage)
        lanes = VECTOR_BYTES // itemsize(storage)
        yield samples(storage, "classes apart", lanes=lanes)
        yield samples(storage, "classes apart gradient", lanes=lanes, grad=storage)

    mean = Reduction("float32", "float32", "weight")
    nll = NLLKernel(compute="float32", logits="float32", index="int64", weight="float32", reduction=mean)
    yield small("nll_loss float32", nll)
    yield small("nll_loss float32 gradient", replace(nll, phase="gradient", grad="float32", reduction=None, group=32))
    yield small("sum of weights", replace(nll, phase="weights", reduction=Reduction("float32", "sums")))
    yield small("slices' outcome", replace(rows("bfloat16", "").kernel, phase="merge", group=WARP, threads=few))
    yield small("sum of blocks", Combination(reduction=mean))
    yield small("sum over axes", FoldingKernel(compute="float32", source="float32", result="float32", kept=1, folded=2))


TUNING = tuning_for((9, 0))
CATALOGUE = {entry.name: entry for entry in (*_pointwise(), *_classes())}


# ---- devices


@dataclass(frozen=True)
class Device:
    """One GPU of an architecture, as its data sheet describes it."""

    name: str
    bandwidth: float  # bytes a second
    tflops: float  # of float32
    sms: int
    lanes: int  # for float32 arithmetic, of an SM
    float64_lanes: int
    warps: int = 64  # that an SM holds
    shared: int = 228 << 10  # bytes of an SM

    @property
    def clock(self) -> float:
        """Hz at which the float32 lanes make the data sheet's operations, two each."""
        return self.tflops * 1e12 / (2 * self.lanes * self.sms)

    @property
    def rates(self) -> dict[str, int]:
        """Thread instructions of an SM in a cycle, from the CUDA programming guide's table of throughputs."""
        return {"issue": 4 * WARP, "fma": self.lanes, "alu": 64, "xu": 16, "lsu": 32, "f64": self.float64_lanes}

    def resident(self, facts: Facts, threads: int) -> int:
        """Warps that an SM holds at a time, in whole blocks: registers are given out 256 at a time to a warp, and
        1 KiB of shared memory goes to the system with each block."""
        warps = threads // WARP
        of_warp = -(-facts.registers * WARP // 256) * 256
        blocks = (self.warps // warps, REGISTERS // of_warp // warps, self.shared // (facts.shared + 1024))
        return min(blocks) * warps


REGISTERS = 1 << 16  # of an SM
# Seconds from a load to its data: assumed. 470 cycles pass on an idle A100 or H100 (arXiv:2402.13499), a third of this;
# a busy memory takes longer.
LATENCY = 1e-6
DEVICES = {
    75: Device("T4", 320e9, 8.1, 40, 64, 2, warps=32, shared=64 << 10),
    80: Device("A100 80 GB SXM", 2.039e12, 19.5, 108, 64, 32, shared=164 << 10),
    90: Device("H100 SXM", 3.35e12, 67, 132, 128, 64),
    100: Device("B200, HGX", 7.7e12, 75, 148, 128, 64),
}


@dataclass(frozen=True)
class Estimate:
    """What a kernel needs of a device for one element, and what runs out first."""

    instructions: float
    in_flight: float  # bytes of an SM
    limit: str
    fraction: float  # of the bandwidth


def estimate(entry: Entry, facts: Facts, arch: int) -> Estimate:
    """Every resource taken to be in use all the time: the one that is needed longest is the limit."""
    device = DEVICES[arch]
    warps = device.resident(facts, entry.kernel.threads)
    pipes: Counter[str] = Counter()
    waits = 0.0
    for found in facts.passes:
        in_global = found.kind.startswith("global")
        elements = found.loaded / (entry.loaded if in_global else 4) or entry.tile
        for pipe, n in found.pipes.items():
            pipes[pipe] += n / elements
        pipes["issue"] += found.instructions / elements
        waits += found.waits / elements if in_global or found.kind == "sample" else 0
    cycle = 1 / (device.sms * device.clock)
    seconds = {pipe: pipes[pipe] / rate * cycle for pipe, rate in device.rates.items()}
    seconds["latency"] = waits * LATENCY / (warps * WARP * device.sms)
    seconds["memory"] = entry.moved / device.bandwidth
    limit = max(seconds, key=lambda name: seconds[name])
    in_flight = warps * WARP * entry.loaded / waits if waits else 0
    return Estimate(pipes["issue"], in_flight, limit, seconds["memory"] / seconds[limit])


# ---- compiling


def _compiled(name: str, arch: int) -> bytes | str:
    """A kernel's cubin, or what went wrong."""
    kernel = replace(CATALOGUE[name].kernel, pairs=arch >= 80)
    try:
        return cubin(kernel, divmod(arch, 10))[0]
    except Exception as error:  # noqa: BLE001  # the others are still read
        return f"{type(error).__name__}: {error}"


def read(names: Sequence[str], arches: Sequence[int], processes: int) -> dict[int, dict[str, Facts | str]]:
    """By architecture and kernel: the facts, or why there are none."""
    if SIMULATED:
        raise SystemExit("NUMBA_ENABLE_CUDASIM is set: the simulator has no machine code")
    for name in ("nvdisasm", "cuobjdump"):  # missing ones are told of before a minute goes by
        tool(name)
    jobs = list(product(arches, names))
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            codes = list(pool.map(_compiled, [name for _, name in jobs], [arch for arch, _ in jobs]))
    else:
        codes = [_compiled(name, arch) for arch, name in jobs]
    out: dict[int, dict[str, Facts | str]] = {}
    for arch in arches:
        found = {name: code for (of, name), code in zip(jobs, codes, strict=True) if of == arch}
        good = {name: code for name, code in found.items() if isinstance(code, bytes)}
        facts = inspect(list(good.values()), arch, [CATALOGUE[name].tile > 0 for name in good]) if good else []
        read = dict(zip(good, facts, strict=True))
        out[arch] = {name: read[name] if name in read else str(code) for name, code in found.items()}
    return out


# ---- tables


def _table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in (head, rule, *lines))


def _devices(arches: Iterable[int]) -> str:
    head = ["", "arch", "GB/s", "float32, TFLOPS", "SMs", "float32 lanes of an SM", "GHz", "bytes in flight an SM"]
    lines = []
    for arch in arches:
        d = DEVICES[arch]
        in_flight = f"{d.bandwidth * LATENCY / d.sms / 1024:.0f} KiB"
        line = (d.name, f"sm_{arch}", f"{d.bandwidth / 1e9:.0f}", d.tflops, d.sms, d.lanes, f"{d.clock / 1e9:.2f}")
        lines.append((*line, in_flight))
    return _table(head, lines)


def _kernels(facts: dict[str, Facts | str], arch: int) -> str:
    head = ["kernel", "registers", "warps an SM", "spills", "16-byte loads, stores", "float64", "shared, bytes",
            "instructions an element", "bytes an element", "in flight, KiB", "limit", "of the bandwidth"]  # fmt: skip
    lines: list[Sequence[object]] = []
    for name, f in facts.items():
        if isinstance(f, str):
            lines.append([name, f.splitlines()[0], *[""] * (len(head) - 2)])
            continue
        entry = CATALOGUE[name]
        warps = DEVICES[arch].resident(f, entry.kernel.threads)
        line: list[object] = [name, f.registers, warps, f.spills, f"{f.wide_loads}, {f.wide_stores}", f.float64]
        line += [f.shared, *[""] * 5]
        if entry.loaded:
            e = estimate(entry, f, arch)
            line[7:] = [f"{e.instructions:.1f}", entry.moved, f"{e.in_flight / 1024:.0f}", e.limit, f"{e.fraction:.0%}"]
        lines.append(line)
    return _table(head, lines)


def report(found: dict[int, dict[str, Facts | str]]) -> str:
    """All tables, in Markdown."""
    packages = ("numba-cuda", "nvidia-nvjitlink", "nvidia-cuda-nvdisasm")
    parts = [f"Compiled by {', '.join(f'{package} {version(package)}' for package in packages)}.\n"]
    parts += ["## Devices\n", _devices(found)]
    for arch, facts in found.items():
        parts += [f"## sm_{arch}: {DEVICES[arch].name}\n", _kernels(facts, arch)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", nargs="*", help="parts of names; without any, all kernels")
    parser.add_argument("--arch", nargs="+", type=int, choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the facts there")
    parser.add_argument("--write", type=Path, help="put the tables into a page of the documentation")
    options = parser.parse_args()
    names = [name for name in CATALOGUE if not options.kernels or any(part in name for part in options.kernels)]
    found = read(names, options.arch, options.processes)
    if options.json:
        as_json = {a: {n: f if isinstance(f, str) else asdict(f) for n, f in by.items()} for a, by in found.items()}
        options.json.write_text(json.dumps(as_json))
    if options.write:
        prose = options.write.read_text().partition(GENERATED)[0]
        options.write.write_text(f"{prose}{GENERATED}\n{report(found)}")
    if not (options.json or options.write):
        print(report(found))
    sys.exit(any(isinstance(facts, str) for by in found.values() for facts in by.values()))


if __name__ == "__main__":
    main()
