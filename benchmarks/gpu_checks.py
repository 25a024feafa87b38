"""Checks of the hardware's ways: streams, graphs, sizes, memory, compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_arrays import (
    SIMULATED,
    exact_losses,
    number,
    tensors,
)
from gpu_cases import Work, cross_entropy, kinds
from gpu_checklist import Found, NotRunError, bits, both, check, expect_value, value_of
from gpu_timing import sleep

import fastloss

HERE = Path(__file__).resolve().parent
SANITIZER = "compute-sanitizer"
SANITIZER_SECONDS = 150


# ---- streams


@check("a call returns while earlier work still runs")
def returns_early() -> Found:
    slowest = 0.0
    for work in kinds(SIMULATED):
        x, y = tensors(work)
        for what, call in both(work):
            call(x, y)
            torch.cuda.synchronize()
            sleep(200)
            slept = torch.cuda.Event()
            slept.record()
            start = time.perf_counter()
            result = call(x, y)
            seconds = time.perf_counter() - start
            assert not slept.query(), f"{what}: the call waited for the GPU ({seconds * 1e3:.1f} ms)"
            slowest = max(slowest, seconds)
            expect_value(what, value_of(result), work, x, y)
    return f"longest call {slowest * 1e6:.0f} us, while the GPU was busy for 200 ms"


@check("a call works on the caller's current stream")
def stream_order() -> Found:
    side = torch.cuda.Stream()
    for work in kinds(SIMULATED):
        x, y = tensors(work)
        for what, call in both(work):
            call(x, y)
            late = torch.full_like(x, float("nan"))
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                sleep(50)
                late.copy_(x)  # produced on this stream, late
                result = call(late, y)
                late.fill_(float("nan"))  # and gone right after
            side.synchronize()
            expect_value(what, value_of(result), work, x, y)
    return None


@check("work on another stream is not waited for")
def independent_streams() -> Found:
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    for work in kinds(SIMULATED):
        x, y = tensors(work)
        for what, call in both(work):
            for stream in (busy, other):  # torch keeps memory by stream: none is to be asked of the driver below
                with torch.cuda.stream(stream):
                    call(x, y)
            torch.cuda.synchronize()
            with torch.cuda.stream(busy):
                sleep(300)
                call(x, y)
                end = torch.cuda.Event()
                end.record()
            with torch.cuda.stream(other):
                result = call(x, y)
            other.synchronize()
            assert not end.query(), f"{what}: a call on one stream waited for work on another"
            torch.cuda.synchronize()
            expect_value(what, value_of(result), work, x, y)
    return None


@check("CUDA graphs: captured once, replayed with other inputs")
def graphs() -> Found:
    for work in kinds(SIMULATED):
        x, y = tensors(work)
        for what, call in both(work):
            warm = torch.cuda.Stream()
            with torch.cuda.stream(warm):
                call(x, y)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = call(x, y)
            for _ in range(3):
                other_x, other_y = tensors(work)
                x.copy_(other_x)
                y.copy_(other_y)
                graph.replay()
                eager = call(x, y)  # between replays: they may share no scratch memory that a replay trusts
                torch.cuda.synchronize()
                expect_value(f"{what}, replayed", value_of(captured), work, x, y)
                assert bits(captured) == bits(eager), f"{what}: a replay's bits differ from a call's"
    return None


# ---- size


def _needs(nbytes: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < nbytes * 1.1:
        raise NotRunError(f"needs {nbytes / 1e9:.0f} GB, {free / 1e9:.0f} GB of the GPU are free")


@check("more than 2**31 elements: mean of squared errors")
def many_elements() -> Found:
    work = Work("mse_loss", "float32", (2**31 + 12_345,))
    _needs(2 * work.nbytes)
    x, y = tensors(work)
    x[-5_000:] += 1e4  # an index that wraps around, or stops early, misses what makes up most of the mean
    expect_value(work.name, number(fastloss.mse_loss(x, y)), work, x, y)
    losses = fastloss.mse_loss(x, y, reduction="none")
    for rows, want in exact_losses(work, x, y):
        assert torch.allclose(losses[rows].double(), want, rtol=1e-6), f"{work.name}: losses from {rows.start} on"
    return None


def _rows(work: Work) -> None:
    """Every row's loss, the mean, and some rows of the gradient."""
    _needs(3 * work.nbytes)
    x, y = tensors(work)
    losses = fastloss.cross_entropy(x, y, reduction="none", dtype="float32")
    for rows, want in exact_losses(work, x, y):
        assert torch.allclose(losses[rows].double(), want, rtol=1e-5, atol=1e-5), f"{work.name}: losses of {rows}"
    value, grad = fastloss.value_and_grad(fastloss.cross_entropy)(x, y)
    expect_value(work.name, number(value), work, x, y)
    step = work.shape[0] // 64
    p = x[::step].double().softmax(1)
    p.scatter_add_(1, y[::step, None], torch.full_like(p[:, :1], -1.0))
    error = float((grad[::step].double() * work.shape[0] - p).norm() / p.norm())
    assert error <= 2**-8, f"{work.name}: gradient off by {error:.2g} of its norm"


@check("more than 2**31 elements: cross-entropy, wide rows")
def many_wide_rows() -> Found:
    _rows(cross_entropy("bfloat16", 65_601, 32_768))
    return None


@check("more than 2**31 elements: cross-entropy, few classes")
def many_rows() -> Found:
    _rows(cross_entropy("bfloat16", 2**28 + 77, 8))
    return None


# ---- memory


@check("memory comes from torch's allocator, and grows by the results only")
def memory() -> Found:
    most = 0
    for work in kinds(SIMULATED):
        x, y = tensors(work)
        for what, call in both(work):
            call(x, y)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, allocated = _requested(), torch.cuda.memory_allocated()
            result = call(x, y)
            peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            grown, parts = _requested() - before, result if isinstance(result, tuple) else (result,)
            expected = sum(-(-part.nbytes // 512) * 512 for part in parts)
            assert grown <= expected, f"{what}: {grown} bytes more are held, the results have {expected}"
            assert torch.cuda.memory_allocated() > allocated, f"{what}: the result is not of torch's memory"
            most = max(most, peak)
            outside = _outside()
            for _ in range(50):
                call(x, y)
            torch.cuda.synchronize()
            leaked = _outside() - outside
            assert leaked <= 0, f"{what}: {leaked} bytes more are held outside of torch after 50 calls"
    return f"at most {most} bytes of scratch memory during a call"


def _requested() -> int:
    """Bytes asked of torch's allocator; what it allocates for them may be up to a MiB more."""
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def _outside() -> int:
    """Bytes of the GPU that are in use and not torch's."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


# ---- compute-sanitizer


def _sanitized(tool: str) -> Found:
    script = [sys.executable, str(HERE / "gpu_sanitized.py")]
    if SIMULATED:
        command = script
    elif shutil.which(SANITIZER):
        command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *script]
    else:
        raise NotRunError(f"{SANITIZER} is not present")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_SECONDS, env=os.environ)
    except subprocess.TimeoutExpired:
        raise NotRunError(f"not finished after {SANITIZER_SECONDS} s") from None
    output = (done.stdout + done.stderr).strip()
    print(output, file=sys.stderr)
    assert done.returncode == 0, f"exit status {done.returncode}: {output[-1500:]}"
    if SIMULATED:
        raise NotRunError(f"needs a GPU; in the simulator: {output.splitlines()[-1]}")
    return " ".join(line.lstrip("= ") for line in output.splitlines() if "SUMMARY" in line or "within" in line)


@check("compute-sanitizer memcheck", simulated=True)
def memcheck() -> Found:
    return _sanitized("memcheck")


@check("compute-sanitizer racecheck")
def racecheck() -> Found:
    return _sanitized("racecheck")


@check("compute-sanitizer initcheck")
def initcheck() -> Found:
    return _sanitized("initcheck")
