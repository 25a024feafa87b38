"""CPU kernels compiled for machines that are not here, and their hot loops read."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from fastloss.backends import cpu
from fastloss.kernels import compiler
from fastloss.kernels.bce import BCE
from fastloss.kernels.bce_with_logits import BCE_WITH_LOGITS
from fastloss.kernels.compiler import Variant
from fastloss.kernels.kl_div import KL_DIV
from fastloss.kernels.l1 import L1
from fastloss.kernels.mse import MSE
from fastloss.kernels.pointwise import Pointwise
from fastloss.kernels.smooth_l1 import SMOOTH_L1

X86, LINUX, APPLE = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "arm64-apple-darwin"
# name: triple, CPU, the registers of its full width
MACHINES = {
    "SSE2": (X86, "x86-64", r"%xmm\d"),
    "AVX2": (X86, "x86-64-v3", r"%ymm\d"),
    "AVX-512, Intel": (X86, "skylake-avx512", r"%zmm\d"),
    "AVX-512, AMD": (X86, "znver4", r"%zmm\d"),
    "NEON, server": (LINUX, "neoverse-n1", r"\.(4s|2d)\b|\bq\d"),
    "NEON, Apple": (APPLE, "apple-m1", r"\.(4s|2d)\b|\bq\d"),
}
# arithmetic on floats, packed: add, multiply, fused, min and max; as it is spelled for x86 and for Arm
PACKED = r"v?(add|sub|mul|div|max|min|fn?m(add|sub)\w+)p[sd]\b|f(n?m(la|ls|ul)|add|sub|div|max|min)(nm)?(\.\d\w)?\s+v\d"
SCALAR = r"v?(add|sub|mul|div|max|min|sqrt|fn?m(add|sub)\w+)s[sd]\b|f(n?m(add|sub|ul)|add|sub|div)\s+[sd]\d"
CALL = r"callq?\b|blr?\b|bl\s"
PREFETCH = r"prefetch|prfm"
GATHER = r"v?p?gather|\bldr\s+[sd]\d+, \[x\d+, x\d+"


def pointwise(loss: Pointwise, storage: str = "float32", grad: bool = False) -> Variant:
    """The mean of two arrays, or mean and gradient past the caches."""
    compute = "float64" if loss.wide else "float32"
    variant = cpu.pointwise_variant(loss, compute, (storage, storage), grad=storage if grad else None)
    return variant.streaming if grad else variant


def softmax(layout: str, logits: str = "float32", **options: Any) -> Variant:
    return cpu.softmax_variant(layout, options.pop("few", 0), "float32", logits, **options)


KERNELS = {
    "l1": pointwise(L1),
    "mse": pointwise(MSE),
    "smooth_l1": pointwise(SMOOTH_L1),
    "bce": pointwise(BCE),
    "bce, bfloat16": pointwise(BCE, "bfloat16"),
    "bce, gradient": pointwise(BCE, grad=True),
    "bce_with_logits": pointwise(BCE_WITH_LOGITS),
    "bce_with_logits, gradient": pointwise(BCE_WITH_LOGITS, grad=True),
    "kl_div": pointwise(KL_DIV),
    "cross_entropy, wide rows": softmax("rows"),
    "cross_entropy, wide rows, bfloat16": softmax("rows", "bfloat16"),
    "cross_entropy, wide rows, gradient": softmax("rows", grad="float32"),
    "cross_entropy, ten classes": softmax("packed", few=10),
    "cross_entropy, ten classes, gradient": softmax("packed", few=10, grad="float32"),
    "cross_entropy, some classes": softmax("flat"),
    "cross_entropy, some classes, gradient": softmax("flat", grad="float32"),
    "cross_entropy, two classes apart": softmax("planes", few=2),
    "cross_entropy, ten classes apart": softmax("planes", few=10),
    "cross_entropy, classes apart": softmax("planes"),
    "cross_entropy, classes apart, gradient": softmax("planes", grad="float32"),
    "cross_entropy, classes apart, softcap": softmax("tile", softcap=True),
}


def instructions(assembly: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and which one each label stands before."""
    out: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        line = re.sub(r"(#|//|;).*" if "%" not in line else r"#.*", "", line).strip()
        if match := re.match(r"([.\w$]+):$", line):
            labels[match[1]] = len(out)
        elif line and not line.startswith("."):
            out.append(line)
    return out, labels


def loops(assembly: str) -> list[list[str]]:
    """The instructions of each innermost loop."""
    code, labels = instructions(assembly)
    jump = re.compile(r"(?:j\w+|b|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+,\s*#\w+,)\s+([.\w$]+)$")
    spans = [
        (labels[target[1]], k + 1)
        for k, line in enumerate(code)
        if (target := jump.match(line)) and labels.get(target[1], k + 1) <= k
    ]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [code[start:stop] for start, stop in inner]


def arithmetic(code: list[str]) -> list[str]:
    return [line for line in code if re.match(PACKED, line)]


def hot_loop(assembly: str, float32: bool = False) -> list[str]:
    """The innermost loop that asks for most memory ahead, of these that with the most packed arithmetic; `float32`: of
    those without float64."""
    found = loops(assembly)
    if float32:
        found = [code for code in found if not any(re.search(r"^v?\w+pd\b|\.2d", line) for line in arithmetic(code))]
    ahead = [sum(bool(re.match(PREFETCH, line)) for line in code) for code in found]
    return max(zip(ahead, found, strict=True), key=lambda pair: (pair[0], len(arithmetic(pair[1]))))[1]


@functools.cache
def assembly(kernel: str, machine: str) -> str:
    triple, name, _ = MACHINES[machine]
    return compiler.assembly(KERNELS[kernel].emit, 4, triple, name)


@pytest.mark.parametrize(
    ("kernel", "machine"),
    # A row's end, its logarithm and float64 sums, has more instructions than the loop over classes, which has float32
    # alone; but on SSE2, where fused operations are spelled out in float64.
    [(k, m) for k in KERNELS for m in MACHINES if not (k.startswith("cross") and m == "SSE2")],
)
def test_hot_loop(kernel: str, machine: str) -> None:
    """Whole registers, no call, no gather, nothing lane by lane."""
    code = hot_loop(assembly(kernel, machine), float32=kernel.startswith("cross"))
    found = arithmetic(code)
    assert len(found) >= 4, code
    assert not [line for line in found if not re.search(MACHINES[machine][2], line)]
    for line in code:
        assert not re.match(CALL, line), line
        assert not re.match(SCALAR, line), line
        assert not re.search(GATHER, line), line


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if "gradient" in name and not name.startswith("cross")])
def test_gradients_leave_past_the_caches(kernel: str, machine: str) -> None:
    stores = [line for line in hot_loop(assembly(kernel, machine)) if re.match(r"v?movnt|stnp", line)]
    assert stores
    assert all(re.search(MACHINES[machine][2], line) for line in stores)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_call_without_fma(kernel: str) -> None:
    """Not in the remainders either."""
    code, _ = instructions(assembly(kernel, "SSE2"))
    assert not [line for line in code if "fma" in line]


@pytest.mark.parametrize("machine", [name for name in MACHINES if MACHINES[name][0] == X86])
@pytest.mark.parametrize("kernel", KERNELS)
def test_spilled_registers_lie_on_cache_lines(kernel: str, machine: str) -> None:
    """A caller aligns its stack to sixteen bytes; what straddles two pages takes many times as long."""
    code, _ = instructions(assembly(kernel, machine))
    aligned = any(re.match(r"andq\s+\$-(64|128|256), %rsp", line) for line in code)
    assert aligned or not any("(%rsp)" in line for line in code)


# ---- the reader itself


def test_the_hot_loop_is_found() -> None:
    found = hot_loop(
        """
kernel:
    xorl %eax, %eax
.outer:
    vxorps %xmm0, %xmm0, %xmm0
.inner:                                 # the loop
    vmovups (%rdi), %ymm1
    vfmadd213ps .LC(%rip), %ymm1, %ymm2
    cmpq %rax, %rbx
    jne .inner
    vaddss %xmm0, %xmm1, %xmm0
    jmp .outer
.tail:
    vaddss %xmm0, %xmm1, %xmm0
    jne .tail
"""
    )
    assert found == ["vmovups (%rdi), %ymm1", "vfmadd213ps .LC(%rip), %ymm1, %ymm2", "cmpq %rax, %rbx", "jne .inner"]


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (PACKED, "vfnmadd231ps %ymm0, %ymm1, %ymm2"),
        (PACKED, "mulps %xmm0, %xmm1"),
        (PACKED, "fmla v1.4s, v2.4s, v3.4s"),
        (PACKED, "fmla.4s v1, v2, v3"),
        (PACKED, "fadd v1.2d, v2.2d, v3.2d"),
        (SCALAR, "vfmadd213ss %xmm0, %xmm1, %xmm2"),
        (SCALAR, "divsd %xmm0, %xmm1"),
        (SCALAR, "fmadd s0, s1, s2, s3"),
        (SCALAR, "fdiv d0, d1, d2"),
        (CALL, "callq *%rax"),
        (CALL, "bl expf"),
        (CALL, "blr x8"),
        (GATHER, "vgatherdps %ymm0, (%rax,%ymm1,4), %ymm2"),
        (GATHER, "vpgatherqq %ymm0, (%rax,%ymm1,8), %ymm2"),
    ],
)
def test_what_is_looked_for(pattern: str, line: str) -> None:
    assert re.match(pattern, line)
    others = {PACKED: SCALAR, SCALAR: PACKED, CALL: GATHER, GATHER: CALL}
    assert not re.match(others[pattern], line)
