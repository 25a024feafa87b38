"""The benchmarks' JSON, its page and comparisons; gpu.py's way around GPUs that are absent and processes that die."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("benchmarks/ is not in a source distribution", allow_module_level=True)
sys.path.append(str(BENCHMARKS))
gpu, gpu_cases, gpu_process, record, report, report_readme, startup = map(
    importlib.import_module, ("gpu", "gpu_cases", "gpu_process", "record", "report", "report_readme", "startup")
)

Document = dict[str, Any]
Row = dict[str, Any]
COPY = 3000.0
NAME = "cross_entropy bfloat16 32,768 x 1,024"
POINTWISE = (
    *("l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
)
GOAL = {"fraction": 0.9, "versus": {"torch.compile": 2.0}}


def times(**ms: float | None) -> dict[str, dict[str, Any]]:
    return {name.replace("_", "."): {"ms": value} for name, value in ms.items()}


def gpu_document(*rows: Row, **more: Any) -> Document:
    """As gpu.py would have written it."""
    return record.header("gpu", {"name": "NVIDIA Test 1", "compute_capability": "9.0"}) | {
        "complete": True,
        "ceilings": {"copy_gbs": COPY, "read_gbs": 2900.0},
        "pytest": None,
        "checks": [],
        "rows": list(rows),
        "clocks_before": {"driver_version": "580.1", "clocks.sm": "1980 MHz", "clocks.mem": "2619 MHz"},
        **more,
    }


def cpu_document(*rows: Row, **more: Any) -> Document:
    return record.header("cpu", {"name": "CPU Test", "threads": 2}) | {"complete": True, "rows": list(rows), **more}


def row(work: str = NAME, ours: float | None = 1.0, nbytes: int = 2_700_000_000, **more: Any) -> Row:
    return record.row(work, nbytes, times(fastloss=ours, torch=3.0, torch_compile=2.5), COPY, **more)


def results(folder: Path, **documents: Document) -> Path:
    folder.mkdir(exist_ok=True)
    for name, document in documents.items():
        record.save(document, folder / f"{name}.json")
    return folder


def report_on(tmp_path: Path, **documents: Document) -> int:
    """report.py's exit status for these, with a page and a README of their own."""
    folder = results(tmp_path / "results", **documents)
    readme = tmp_path / "README.md"
    if not readme.exists():
        readme.write_text(f"above\n{report_readme.BEGIN}old\n{report_readme.END}below\n")
    status: int = report.main(
        ["--results", str(folder), "--page", str(tmp_path / "benchmarks.md"), "--readme", str(readme)]
    )
    return status


def render(tmp_path: Path, **documents: Document) -> str:
    """The page that report.py writes of these."""
    assert report_on(tmp_path, **documents) == 0
    return (tmp_path / "benchmarks.md").read_text()


def cells(page: str, work: str) -> list[str]:
    """Of the one line of a table that begins with the work."""
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {work} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---- rows


def test_a_row_follows_from_its_times() -> None:
    made = row(ours=1.0, goal=GOAL)
    assert made["results"]["fastloss"]["gbs"] == pytest.approx(2700)
    assert made["results"]["fastloss"]["fraction"] == pytest.approx(0.9)
    assert made["results"]["torch"]["fraction"] == pytest.approx(0.3)
    assert made["ratios"] == pytest.approx({"torch": 3.0, "torch.compile": 2.5})
    assert (made["met"], record.verdict(made)) == (True, "yes")
    assert record.goal_text(made) == "0.90 of copy, 2x torch.compile"


@pytest.mark.parametrize(
    ("ours", "compiled", "met", "verdict"),
    [
        (1.5, 3.5, False, "no: 0.6 for 0.90 of copy"),
        (0.9, 1.5, False, "no: 1.67 for 2x torch.compile"),
        (0.9, None, None, "but for 2x torch.compile: not yet measured"),
        (1.5, None, False, "no: 0.6 for 0.90 of copy"),
        (None, None, None, "not yet measured"),
    ],
)
def test_a_goal_is_met_missed_or_open(
    ours: float | None, compiled: float | None, met: bool | None, verdict: str
) -> None:
    made = record.row(NAME, 2_700_000_000, times(fastloss=ours, torch_compile=compiled), COPY, GOAL)
    assert (made["met"], record.verdict(made)) == (met, verdict)


def test_a_goal_may_be_that_no_peer_is_faster() -> None:
    goal = {"peers": 1.0}
    won = record.row("mse_loss float32 9", 72, times(fastloss=1.0, torch=1.5, JAX=1.0), goal=goal)
    lost = record.row("mse_loss float32 9", 72, times(fastloss=1.0, torch=1.5, JAX=0.8), goal=goal)
    alone = record.row("mse_loss float32 9", 72, times(fastloss=1.0, JAX=None), goal=goal)
    assert [record.verdict(made) for made in (won, lost, alone)] == [
        "yes",
        "no: 0.8 for no peer faster",
        "not yet measured",
    ]


def test_a_fraction_is_of_the_row_s_own_limit() -> None:
    made = record.row("mse_loss float32 9", 27_000_000, times(fastloss=1.0), 30.0, {"fraction": 0.97}, limit="read")
    assert (record.goal_text(made), record.verdict(made)) == ("0.97 of read", "no: 0.9 for 0.97 of read")


@pytest.mark.parametrize(("ms", "text"), [(0.0015, "1.5 us"), (20.0, "20 ms"), (800.0, "800 ms")])
def test_a_time_is_told_in_its_unit(ms: float, text: str) -> None:
    made = record.row("a 1", None, times(fastloss=2 * ms), goal={"ms": ms})
    number, _ = text.split()
    assert record.goal_text(made) == text
    assert record.verdict(made) == f"no: {2 * float(number):.3g} for {text}".replace("1.6e+03", "1,600")


def test_a_row_without_bytes_or_limit_has_no_speed() -> None:
    made = record.row(gpu_cases.HOST_TIME, None, times(fastloss=0.012, torch=0.02), goal=gpu_cases.HOST_GOAL)
    assert made["results"]["fastloss"]["gbs"] is None
    assert made["results"]["fastloss"]["fraction"] is None
    assert (made["met"], record.goal_text(made)) == (True, "15 us")


def test_only_what_save_wrote_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    document = gpu_document(row())
    record.save(document, path)
    assert record.load(path) == json.loads(json.dumps(document))
    for content in ("", "[]", '{"format": 0, "kind": "gpu"}', '{"format": 1, "kind": "tpu"}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"a\.json"):
            record.load(path)


# ---- the page


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    page = render(tmp_path)
    assert "Not yet measured on a GPU." in page
    assert "Not yet measured on a CPU." in page
    assert not list(tmp_path.glob("*.png"))


def test_tables_keep_losing_rows_and_say_what_is_missing(tmp_path: Path) -> None:
    slow = record.row("cross_entropy float32 8 x 10", 1_000_000, times(fastloss=2.0, torch=0.5), COPY, GOAL)
    failed = {"fastloss": {"ms": None, "error": "out of memory"}, "CuPy": {"ms": 4.0}, "JAX": {"ms": None}}
    other = record.row("mse_loss float32 77", 616, failed, COPY, {"fraction": 0.92})
    page = render(tmp_path, one=gpu_document(row(ours=0.9, goal=GOAL), slow, other))
    assert cells(page, "work") == [
        *("work", "MB", "fastloss", "GB/s", "of copy", "torch", "torch.compile", "CuPy", "JAX", "goal", "met"),
    ]
    goal = "0.90 of copy, 2x torch.compile"
    assert cells(page, NAME) == [NAME, "2,700", "0.9", "3,000", "1", "3.33", "2.78", "", "", goal, "yes"]
    assert cells(page, slow["work"])[5] == "0.25"
    assert cells(page, slow["work"])[-1] == "no: 0.000167 for 0.90 of copy"
    assert cells(page, other["work"])[2] == "out of memory"
    assert cells(page, other["work"])[-4:] == ["4", "not yet measured", "0.92 of copy", "not yet measured"]
    for fact in ("NVIDIA Test 1, compute capability 9.0, driver 580.1", "copy 3,000 GB/s", "1980 MHz (SM)", "numpy "):
        assert fact in page
    assert "Not yet measured on a CPU." in page


def test_tests_and_checks_are_told(tmp_path: Path) -> None:
    bad = {"name": "gpu::test_a", "outcome": "failed", "message": "two\nlines | bar", "seconds": 1.0}
    good = bad | {"name": "gpu::test_b", "outcome": "passed"}
    tests = {"counts": {"passed": 1, "failed": 1}, "tests": [bad, good], "failed": True, "message": None}
    checks = [{"name": "streams", "outcome": "not run", "message": "needs a GPU", "seconds": 0.0}]
    page = render(tmp_path, one=gpu_document(pytest=tests, checks=checks, complete=False))
    assert "Tests (tests/gpu): 1 failed, 1 passed." in page
    assert "| gpu::test_a | two lines \\| bar |" in page
    assert "gpu::test_b" not in page
    assert "| streams | not run | needs a GPU |" in page
    assert "the run was cut off" in page


def test_each_device_has_its_tables_newest_first(tmp_path: Path) -> None:
    old, new = (gpu_document(row(), date=f"2026-01-0{day}T00:00:00+00:00") for day in (1, 2))
    cpu = cpu_document(record.row("l1_loss float32 33", 264, times(fastloss=1.0, torch=0.5), 40.0))
    page = render(tmp_path, a=old, b=new, c=cpu)
    heads = [line for line in page.splitlines() if line.startswith("#")]
    assert heads[:4] == ["# Benchmarks", "## GPU", "### NVIDIA Test 1, 2026-01-02", "### NVIDIA Test 1, 2026-01-01"]
    assert heads[4] == "## CPU"
    assert heads[5].startswith("### CPU Test, ")
    assert cells(page, "l1_loss float32 33")[-1] == "0.5"
    assert "2 threads" in page


def test_a_dry_run_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = render(tmp_path, dry=gpu_document(row(ours=None), dry_run=True))
    assert "Not yet measured on a GPU." in page
    assert NAME not in page
    assert "dry.json is a dry run" in capsys.readouterr().err


def test_plots_come_and_go_with_their_results(tmp_path: Path) -> None:
    rows = [row(f"cross_entropy bfloat16 64 x {classes:,}", classes / 1000) for classes in (10, 1_000, 32_000)]
    page = render(tmp_path, few=cpu_document(*rows[:2]), many=gpu_document(*rows))
    assert "![Speed against size, with the limit](benchmarks-many.png)" in page
    assert "![Shares of the limit, work by work](benchmarks-few-bars.png)" in page
    drawn = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in drawn] == ["benchmarks-few-bars.png", "benchmarks-many.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    (tmp_path / "results" / "many.json").unlink()
    assert "benchmarks-many" not in render(tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["benchmarks-few-bars.png"]


def test_a_panel_holds_every_contender_and_the_limit() -> None:
    import report_plots

    rows = [row(f"mse_loss float32 {n}", n / 1e6) for n in (100, 1_000, 10_000)]
    rows += [row("cross_entropy float32 16 x 21 x 256 x 256"), row("cross_entropy float32 9 x 9")]
    rows += [row("mse_loss float32 100", nbytes=1_000), row("mse_loss float32 10", None)]
    (kind,) = panels = report_plots.panels(gpu_document(*rows))
    assert kind == "mse_loss float32"
    assert set(panels[kind]) == {"fastloss", "torch", "torch.compile", "limit"}
    assert panels[kind]["fastloss"] == [(n, pytest.approx(2700 * 1e6 / n)) for n in (100, 1_000, 10_000)]
    assert panels[kind]["limit"] == [(100, COPY), (1_000, COPY), (10_000, COPY)]


def test_panels_of_a_cpu_are_by_elements_and_keep_what_has_no_limit() -> None:
    import report_plots

    shapes = ("1 x 10", "100 x 10", "1,000,000 x 10")
    rows = [
        record.row(f"cross_entropy float32 {shape}", 1000, times(fastloss=1.0), limit_gbs=30.0 if k == 2 else None)
        for k, shape in enumerate(shapes)
    ]
    rows += [row("cross_entropy float32 9 x 1,000"), row("cross_entropy float32 16 x 10 x 256 x 256")]
    assert report_plots.panels(cpu_document(*rows)) == {
        "cross_entropy float32, 10 classes": {
            "fastloss": [(n, pytest.approx(1e-3)) for n in (10, 1_000, 10_000_000)],
            "limit": [(10_000_000, 30.0)],
        }
    }


def test_a_file_that_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "notes.json").write_text("{}")
    assert report_on(tmp_path) == 2
    assert "notes.json" in capsys.readouterr().err
    assert not (tmp_path / "benchmarks.md").exists()


# ---- what CPUs have more


def test_who_is_absent_keeps_an_empty_column_and_a_reason(tmp_path: Path) -> None:
    made = record.row("mse_loss float32 9", 72, times(fastloss=1.0, torch=2.0), 30.0, {"versus": {"torch.compile": 1}})
    absent, skipped = {"torch.compile": "no C++ compiler"}, {"mse_loss float32 1,000,000,000": "8 GB do not fit"}
    page = render(tmp_path, cpu=cpu_document(made, absent=absent, skipped=skipped, rounds=11))
    assert cells(page, "work")[-4:] == ["torch", "torch.compile", "goal", "met"]
    assert cells(page, made["work"])[-4:] == ["2", "", "1x torch.compile", "not yet measured"]
    for line in (
        "- without torch.compile: no C++ compiler",
        "- left out: mse_loss float32 1,000,000,000: 8 GB do not fit",
    ):
        assert f"\n{line}\n" in page


def test_start_up_has_tables_of_its_own(tmp_path: Path) -> None:
    made = record.row(
        "fresh process", None, times(fastloss=900.0), goal=startup.WARM_GOAL, section="startup", limit=None
    )
    stages = {"stages": ["Python", "import numba"], "ms": {"fresh process": [20.0, 1234.0]}}
    document = cpu_document(made, startup=stages, compiling=[["mse float32", 0.25, 3]])
    page = render(tmp_path, cpu=document)
    assert "| fresh process | 900 | 800 ms | no: 900 for 800 ms |" in page
    assert "| milliseconds | Python | import numba |\n| --- | --- | --- |\n| fresh process | 20 | 1,234 |\n" in page
    assert "| mse float32 | 0.25 | 3 |" in page


def test_the_readme_tells_the_newest_whole_run_and_what_was_lost(tmp_path: Path) -> None:
    def document(day: int, ours: float, **more: Any) -> Document:
        made = record.row("mse_loss float32 9", 27_000_000, times(fastloss=ours, torch=2.0, JAX=3.0), 30.0)
        return cpu_document(made, date=f"2026-01-0{day}T00:00:00+00:00", **more)

    def figures(**documents: Document) -> str:
        render(tmp_path, **documents)
        text = (tmp_path / "README.md").read_text()
        assert text.startswith(f"above\n{report_readme.BEGIN}\n")
        assert text.endswith(f"\n{report_readme.END}below\n")
        return text

    assert "Not yet measured on a CPU." in figures(a=gpu_document(row()), b=document(5, 1.0, partial=True))
    text = figures(
        a=document(1, 1.0), b=document(2, 2.5, absent={"torch.compile": "no compiler"}), c=document(3, 9, partial=True)
    )
    assert "CPU Test, 2 threads" in text
    assert "2026-01-02" in text
    assert "| work | fastloss | torch | JAX | torch.compile | of the limit |" in text
    assert "| mse_loss float32 9 | 2.5 | 2 | 3 |  | 0.36 |" in text
    assert "A peer is faster at 1 of 1:\n\n- mse_loss float32 9: torch\n" in text
    text = figures(d=document(4, 1.0))
    assert "| mse_loss float32 9 | 1 | 2 | 3 | 0.9 |" in text
    assert "no peer is faster at anything" in text


def test_a_readme_without_its_marks_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("nothing here\n")
    assert report_on(tmp_path, cpu=cpu_document()) == 2
    assert "README.md lacks the lines <!-- figures" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "nothing here\n"


def test_this_readme_has_them() -> None:
    assert report_readme.with_figures(report_readme.README, []).count("Not yet measured on a CPU.") == 1


# ---- comparison


def compared(tmp_path: Path, old: Document, new: Document, *more: str) -> int:
    folder = results(tmp_path / "pair", old=old, new=new)
    return report.main(["--compare", str(folder / "old.json"), str(folder / "new.json"), *more])


def test_comparison_flags_what_got_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = gpu_document(row("a 1", 1.0), row("b 2", 1.0), row("c 3", 1.0), row("d 4", None))
    new = gpu_document(row("a 1", 1.05), row("b 2", 1.2), row("d 4", 9.0), row("e 5", 9.0))
    assert compared(tmp_path, old, new) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["ok      a 1: 1 -> 1.05 ms, 1.05x", "SLOWER  b 2: 1 -> 1.2 ms, 1.20x", "absent  c 3: 1 ms before"]
    assert compared(tmp_path, old, new, "--threshold", "1.25") == 0


def test_comparison_knows_every_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def document(ms: float) -> Document:
        sections = [
            record.row(f"{name} 1", 8, times(fastloss=ms), section=name) for name in ("goals", "sweep", "startup")
        ]
        return cpu_document(*sections)

    assert compared(tmp_path, document(1.0), document(1.5)) == 1
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["SLOWER", name] for name in ("goals", "sweep", "startup")
    ]
    assert compared(tmp_path, document(1.5), document(1.0)) == 0


def test_work_that_no_longer_gets_through_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = gpu_document(row(ours=None))
    new["rows"][0]["results"]["fastloss"]["error"] = "out of memory"
    assert compared(tmp_path, gpu_document(row()), new) == 1
    assert "SLOWER" in (out := capsys.readouterr().out)
    assert "out of memory" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dry_run": True}, "dry run: not yet measured"),
        ({"device": {"name": "NVIDIA Test 2"}}, "different devices: NVIDIA Test 1 and NVIDIA Test 2"),
        ({"kind": "cpu"}, "different devices"),
        ({"rows": []}, "no work was timed in both"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    old = gpu_document(row())
    assert compared(tmp_path, old, copy.deepcopy(old) | change) == 2
    assert message in capsys.readouterr().err


# ---- gpu.py


def test_gpu_without_a_gpu_exits_2_with_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), str(out)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu.py: no NVIDIA GPU here; --dry-run walks through everything without one\n"
    assert not out.exists()


def test_a_dry_run_times_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With workers that answer as they do in the simulator; the real walk is in the slow test below."""

    def answers(order: dict[str, Any], names: list[str], *more: Any) -> list[Any]:
        works = gpu_cases.BY_NAME
        contenders = {name: works[name].contenders if name in works else gpu_cases.HOST_CONTENDERS for name in names}
        made = {name: {contender: {"ms": None} for contender in contenders[name]} for name in names}
        return [gpu_process.Item(name, made[name] if name not in ("device", "ceilings") else None) for name in names]

    monkeypatch.setattr(gpu_process, "supervised", answers)
    assert gpu.main([str(tmp_path), "--dry-run", "--only", "benchmarks"]) == 0
    (path,) = tmp_path.glob("*.json")
    document = record.load(path)
    assert document["dry_run"]
    assert document["complete"]
    assert document["ceilings"] is None
    assert len(document["rows"]) == 1 + len(gpu_cases.GOALS) + len(gpu_cases.SWEEP)
    assert all(result["ms"] is None for made in document["rows"] for result in made["results"].values())
    lines = capsys.readouterr().out.splitlines()
    head = next(k for k, line in enumerate(lines) if line.startswith("work  "))
    goals = [line for line in lines[head + 1 :] if not line.startswith("written: ")]
    assert len(goals) == 1 + len(gpu_cases.GOALS)
    assert all(line.endswith(record.NOT_MEASURED) for line in goals)


def test_failures_are_told_from_what_was_not_run() -> None:
    def with_error(error: str | None) -> Document:
        return gpu_document(record.row(NAME, 4, {"fastloss": {"ms": None, "error": error}}))

    assert not gpu.failures(with_error(None))
    assert not gpu.failures(with_error("not run: the time limit"))
    assert not gpu.failures(gpu_document(row(goal={"fraction": 2.0})))  # a goal that was missed
    assert gpu.failures(with_error("wrong value: 1, expected 2"))
    assert gpu.failures(gpu_document(checks=[{"outcome": "failed"}]))
    assert gpu.failures(gpu_document(pytest={"failed": True}))


@pytest.mark.slow
def test_the_dry_run_walks_through_everything(tmp_path: Path) -> None:
    pytest.importorskip("numba.cuda")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), str(tmp_path), "--dry-run", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    document = record.load(path)
    assert {check["outcome"] for check in document["checks"]} == {"passed", "not run"}
    assert not [made for made in document["rows"] for result in made["results"].values() if result.get("error")]


def test_every_work_has_its_own_name_and_its_bytes() -> None:
    works = [*gpu_cases.GOALS, *gpu_cases.SWEEP]
    assert len({work.name for work in works}) == len(works)
    fused = gpu_cases.cross_entropy("bfloat16", 8, 100, gradient=True)
    assert fused.nbytes == 2 * (2 * 800) + 8 * 8 + 2
    assert gpu_cases.Work("mse_loss", "float32", (50,)).nbytes == 2 * 200 + 4


WORKER = """
import json, os, sys, time
for name in json.loads(sys.argv[1])["names"]:
    print(json.dumps({"begin": name}), flush=True)
    if name == "dies":
        os._exit(7)
    if name == "hangs":
        time.sleep(60)
    print(json.dumps({"end": name, "result": name.upper(), "error": None, "seconds": 0.5}), flush=True)
    if name == "context":  # its own result is good, the next process must do the rest
        sys.exit(3)
"""


def supervised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], worker: str = WORKER, seconds: float = 60
) -> list[Any]:
    (tmp_path / "gpu_worker.py").write_text(worker)
    monkeypatch.setattr(gpu_process, "HERE", tmp_path)
    end = time.monotonic() + seconds
    return list(gpu_process.supervised({}, names, dict(os.environ), tmp_path / "log", end, stall=3))


def test_what_kills_a_worker_costs_one_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a", "dies", "b", "context", "c", "hangs", "d"]
    items = supervised(tmp_path, monkeypatch, names)
    assert [item.name for item in items] == names
    assert [item.result for item in items] == ["A", None, "B", "CONTEXT", "C", None, "D"]
    assert items[1].error == "the process died: exit status 7; see log"
    assert items[5].error == "not finished after 3 s"
    assert not any(item.out_of_time for item in items)


def test_a_time_limit_leaves_the_rest_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = supervised(tmp_path, monkeypatch, ["a", "hangs", "b"], seconds=2)
    assert [item.result for item in items] == ["A", None, None]
    assert [item.error for item in items] == [None, *["not run: the time limit"] * 2]
    assert [item.out_of_time for item in items] == [False, True, True]


def test_a_worker_that_never_starts_is_not_tried_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = supervised(tmp_path, monkeypatch, ["a", "b"], worker="import nothing_of_that_name")
    assert [item.error for item in items] == ["the worker process did not start; see log"] * 2


def test_pytest_is_run_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    monkeypatch.setattr(gpu_process, "ROOT", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    code = "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('no GPU')\n"
    (tmp_path / "tests" / "gpu" / "test_x.py").write_text(code)
    found = gpu_process.pytest_run(tmp_path, environment, 120, collect_only=False)
    assert found["counts"] == {"passed": 1, "failed": 1, "not run": 1}
    assert (found["failed"], found["message"]) == (True, None)
    by_name = {test["name"].rpartition("::")[2]: test for test in found["tests"]}
    assert "assert 1 == 2" in by_name["test_b"]["message"]
    assert by_name["test_c"]["message"] == "no GPU"
    (tmp_path / "tests" / "gpu" / "test_x.py").write_text("import time\ndef test_a(): time.sleep(60)\n")
    late = gpu_process.pytest_run(tmp_path, environment, 2, collect_only=False)
    assert (late["failed"], late["message"]) == (False, "not run: the time limit")


def test_without_gpu_tests_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_process, "ROOT", tmp_path)
    found = gpu_process.pytest_run(tmp_path, dict(os.environ), 10, collect_only=False)
    assert (found["failed"], found["message"]) == (False, "no folder tests/gpu")


# ---- compare.py


def test_every_case_has_its_own_name_its_bytes_and_a_limit() -> None:
    cases = importlib.import_module("cases")
    by_name = {case.name: case for case in cases.CASES}
    assert len(by_name) == len(cases.CASES)
    fused = by_name["cross_entropy value and gradient float32 65,536 x 1,000"]
    assert (fused.limit, fused.nbytes) == ("copy", 2 * 4 * 65_536_000 + 8 * 65_536 + 4)
    triad = by_name["huber_loss value and gradient float32 33,554,432"]
    assert (triad.limit, triad.nbytes) == ("triad", 3 * 4 * 33_554_432 + 4)
    assert by_name["cross_entropy probabilities float32 8,192 x 1,000"].limit == "read"
    assert by_name["cross_entropy float32 128 x 1,000"].limit is None
    sizes = {len(str(case.shape)) for case in cases.CASES if case.section == "sweep" and case.loss == "mse_loss"}
    assert len(sizes) == 7


@pytest.mark.parametrize("case", ["cross_entropy", "probabilities", "maps", "halves", *sorted(POINTWISE)])
def test_every_contender_computes_the_same(case: str) -> None:
    cases, contenders = map(importlib.import_module, ("cases", "contenders"))
    made = {
        "cross_entropy": cases.cross_entropy(33, 10, gradient=True),
        "probabilities": cases.cross_entropy(33, 10, probabilities=True),
        "maps": cases.cross_entropy(3, 5, 4, 6, gradient=True),
        "halves": cases.cross_entropy(33, 10, dtype="float16", gradient=True),
    }
    work = made[case] if case in made else cases.Case(case, "float32", (1001,), gradient=True)
    x, y = work.operands()
    assert x.ctypes.data % cases.ALIGNMENT == 0
    ours = contenders.contender("fastloss", work, x, y)()
    for name in ("NumPy", "torch", "JAX"):  # torch.compile takes seconds for each
        try:
            result = contenders.contender(name, work, x, y)()
        except contenders.AbsentError:
            continue
        contenders.check(work, result, ours)
    with pytest.raises(ValueError, match="wrong value"):
        contenders.check(work, (ours[0] * 1.2, ours[1]) if work.gradient else ours * 1.2, ours)
    if work.gradient:
        with pytest.raises(ValueError, match="wrong gradient"):
            contenders.check(work, (ours[0], ours[1] + 0.1), ours)


def test_who_is_slow_has_fewer_rounds_spread_over_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = importlib.import_module("compare")
    order: list[str] = []
    clock = [0.0]

    def taking(name: str, seconds: float) -> Any:
        def call() -> None:
            order.append(name)
            clock[0] += seconds

        return call

    monkeypatch.setattr(compare.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: None)
    short = 2.0**-10
    calls = {"fastloss": taking("fastloss", 0.5), "NumPy": taking("NumPy", 0.3125), "JAX": taking("JAX", short)}
    times = compare.measured(calls, 9, shortest=2e-3)
    assert {name: len(found) for name, found in times.items()} == {"fastloss": 9, "NumPy": 3, "JAX": 9}
    assert times["JAX"] == pytest.approx([short] * 9)
    waking = math.ceil(compare.WAKING / short)
    assert order.count("JAX") == 1 + 9 * (waking + 2)  # untimed ones, and two that take that long
    late = order[len(order) // 2 :]
    assert "NumPy" in late


def test_a_contender_that_fails_costs_its_cell_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cases, compare, contenders = map(importlib.import_module, ("cases", "compare", "contenders"))
    makers = dict(contenders._MAKERS)

    def absent(*arguments: Any) -> Any:
        raise contenders.AbsentError("no compiler")

    def broken(*arguments: Any) -> Any:
        return lambda: 1 / 0

    monkeypatch.setattr(contenders, "_MAKERS", makers | {"torch.compile": absent, "torch": broken, "JAX": absent})
    monkeypatch.setitem(contenders.TEMPORARIES, "NumPy", 1e15)
    why: dict[str, str] = {}
    row = compare.row_of(cases.cross_entropy(4, 3), 3, why)
    assert row["results"]["fastloss"]["ms"] > 0
    assert row["results"]["torch"] == {"ms": None, "error": "division by zero", "gbs": None, "fraction": None}
    assert "GB more" in row["results"]["NumPy"]["error"]
    assert why == {"torch.compile": "no compiler", "JAX": "no compiler"}


def test_limits_move_what_they_say() -> None:
    limits = importlib.import_module("limits")
    for kind, arrays in (("read", 1), ("copy", 2), ("triad", 3)):
        call, nbytes = limits.limit(kind, 3 * arrays * 4 * limits.SHARE + 100)
        assert nbytes == 3 * arrays * 4 * limits.SHARE
        memory = limits._memory()
        memory[: 3 * arrays * limits.SHARE] = np.arange(3 * arrays * limits.SHARE) % 1000
        parts = memory[: 3 * arrays * limits.SHARE].reshape(arrays, -1)
        expected = {"copy": parts[0].copy(), "triad": parts[0] + parts[min(1, arrays - 1)]}
        call()
        if kind in expected:
            np.testing.assert_array_equal(parts[-1], expected[kind])
        memory[: 3 * arrays * limits.SHARE] = 1


def test_compare_writes_the_same_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "float32 1 x 10", "--json", str(path)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = record.load(path)
    (made,) = document["rows"]
    assert (document["kind"], document["complete"], document["partial"]) == ("cpu", True, True)
    assert made["work"] == "cross_entropy float32 1 x 10"
    assert all(made["results"][name]["ms"] > 0 for name in ("fastloss", "torch", "NumPy"))
    assert document["device"]["threads"] >= 1
    assert "torch" in document["versions"]
    page = render(tmp_path, cpu=document)
    assert cells(page, made["work"])[1] == "5.2e-05"


# ---- startup.py


def test_a_process_is_split_into_stages(tmp_path: Path) -> None:
    total, *stages = startup.first_result("mse_loss float32 32 x 10", tmp_path)
    assert len(stages) == len(startup.STAGES)
    assert sum(stages) == pytest.approx(total)
    parts = dict(zip(startup.STAGES, stages, strict=True))
    assert all(parts[stage] > 0 for stage in ("Python", "import numpy", "import fastloss", "kernels and the call"))
    assert list(tmp_path.glob("*.o"))  # in the cache that it was given


def test_start_up_is_measured_warm_cold_and_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    work = "mse_loss float32 32 x 10"
    monkeypatch.setattr(startup, "WORKS", {work: startup.WORKS[work]})
    monkeypatch.setattr(startup, "PROCESSES", 2)
    monkeypatch.setattr(startup, "COLD_PROCESSES", 1)
    monkeypatch.setattr(startup, "COMPILING", startup.COMPILING.replace("items():", "items()[-3:]:"))
    document: Document = {}
    warm, cold = startup.rows(document)
    assert [made["work"] for made in (warm, cold)] == [
        f"fresh process, {how}: {work}" for how in ("warm cache", "empty caches")
    ]
    assert 0 < record.time_of(warm) < record.time_of(cold)  # that one compiles
    assert [made["results"]["fastloss"]["rounds"] for made in (warm, cold)] == [2, 1]
    assert [line[0] for line in startup.stages_table(document)] == ["milliseconds", warm["work"], cold["work"]]
    head, *lines = startup.compiling_table(document)
    assert head == ["first call without a cache", "seconds", "kernels"]
    assert len(lines) == 3
    assert all(int(kernels) > 0 for _, _, kernels in lines)
