"""Every kind of GPU kernel, compiled for four architectures without a GPU, and its machine code read."""

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "benchmarks" / "machine_code.py"
PAGE = ROOT / "docs" / "cuda-kernels.md"
sys.path.append(str(TOOL.parent))
machine_code = importlib.import_module("machine_code")
sass = importlib.import_module("sass")

MAX_SHARED = 48 << 10  # bytes that a block has without asking for more


@functools.cache
def facts(arch: int) -> dict[str, Any] | str:
    """Facts by kernel, or why there are none. In a process of its own: in this one numba.cuda may be the simulator."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    environment["PYTHONPATH"] = str(ROOT)
    processes = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "facts.json")
        command = [sys.executable, TOOL, "--arch", str(arch), "--processes", processes, "--json", path]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        return json.loads(path.read_text())[str(arch)] if path.exists() else done.stderr[-2000:]


def variants() -> list[Any]:
    """An architecture's tests run in one worker process, which compiles for it once."""
    return [
        pytest.param(name, arch, id=f"{name}, sm_{arch}", marks=pytest.mark.xdist_group(f"machine code of sm_{arch}"))
        for arch in machine_code.DEVICES
        for name in machine_code.CATALOGUE
    ]


@pytest.mark.parametrize(("name", "arch"), variants())
def test_machine_code(name: str, arch: int, record_property: Callable[[str, object], None]) -> None:
    entry, found = machine_code.CATALOGUE[name], facts(arch)
    assert isinstance(found, dict), f"no machine code could be read:\n{found}"
    read = found[name]
    assert isinstance(read, dict), f"does not compile: {read}"
    assert read["registers"] <= entry.budget, f"an SM does not hold {entry.warps} warps"
    assert (read["spills"], read["stack"]) == (0, 0)
    assert read["shared"] <= MAX_SHARED
    if not entry.float64:
        assert read["float64"] == 0
    if entry.wide_loads:
        assert read["wide_loads"] > 0
        assert all(found["loaded"] % sass.WIDE == 0 for found in read["passes"] if found["kind"].startswith("global"))
    if entry.wide_stores:
        assert read["wide_stores"] > 0
    if entry.loaded:
        assert any(found["kind"].startswith("global") for found in read["passes"]), "no loop over elements was found"
    record_property("cuda", "compiled")


def test_every_kernel_stands_in_the_docs() -> None:
    """`python benchmarks/machine_code.py --write docs/cuda-kernels.md` puts it there."""
    page = PAGE.read_text()
    missing = [name for name in machine_code.CATALOGUE if page.count(f"| {name} |") != len(machine_code.DEVICES)]
    assert not missing


# ---- the reader itself


def code(*lines: str) -> list[Any]:
    """Instructions at 0x0, 0x10, ..."""
    out = []
    for k, line in enumerate(lines):
        predicate, _, rest = line[1:].partition(" ") if line[0] == "@" else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        out.append(sass.Instruction(16 * k, predicate, opcode, operands))
    return out


def test_the_loop_over_elements_is_found() -> None:
    found = sass.passes(
        code(
            "LDC.64 R2, c[0x0][0x210]",
            "LDG.E.128 R4, desc[UR4][R2.64]",  # 0x10: the loop
            "LDG.E.128 R8, desc[UR4][R2.64+0x1000]",
            "FADD R4, R4, R8",
            "@P1 BRA 0x70",
            "CALL.REL.NOINC 0xb0",  # a slow path
            "BRA 0x70",
            "MUFU.RCP R5, R4",  # 0x70
            "STG.E.128 desc[UR4][R2.64], R4",
            "@P0 BRA 0x10",
            "EXIT",
            "DADD R2, R2, R2",  # 0xb0: the routine
            "RET.REL.NODEC R20 0x0",
        ),
        tiled=False,
    )
    pipes = {"lsu": 12, "fma": 1, "xu": 1, "control": 2}
    assert found == (sass.Pass("global > global", 7, 32, 1, pipes, 1, 0),)


def test_waits_are_counted_one_after_the_other() -> None:
    together = ["LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x10]", "FADD R20, R7, R11"]
    apart = ["LDG.E.128 R4, desc[UR4][R2.64]", "FADD R20, R7, R7", "LDG.E R8, desc[UR4][R2.64]", "FADD R20, R8, R8"]
    stored = ["LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4", "LDG.E R9, desc[UR4][R12.64]",
              "FADD R9, R9, R9"]  # fmt: skip
    loops = [sass.passes(code(*body, "@P0 BRA 0x0", "EXIT"), tiled=False) for body in (together, apart, stored)]
    assert [loop[0].waits for loop in loops] == [1, 2, 2]


@pytest.mark.parametrize(
    ("line", "pipe"),
    [
        ("DFMA R2, R4, R6, R8", "f64"),
        ("F2F.F64.F32 R2, R4", "f64"),
        ("MUFU.RCP64H R3, R5", "f64"),
        ("DEPBAR.LE SB0, 0x1", "control"),
        ("MUFU.EX2 R2, R4", "xu"),
        ("FFMA.FTZ R2, R4, R6, R8", "fma"),
        ("IADD3.X R2, R4, R6, RZ, P0, !PT", "alu"),
        ("UIADD3 UR4, UR4, 0x1, URZ", "control"),
    ],
)
def test_where_an_instruction_runs(line: str, pipe: str) -> None:
    assert code(line)[0].pipe == pipe
