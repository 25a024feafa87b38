"""The benchmarks' JSON, its page and comparisons; gpu.py's way around GPUs that are absent and processes that die."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("benchmarks/ is not in a source distribution", allow_module_level=True)
sys.path.append(str(BENCHMARKS))
gpu, gpu_cases, gpu_process, record, report = map(
    importlib.import_module, ("gpu", "gpu_cases", "gpu_process", "record", "report")
)

Document = dict[str, Any]
Row = dict[str, Any]
COPY = 3000.0
NAME = "cross_entropy bfloat16 32,768 x 1,024"
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


def render(tmp_path: Path, **documents: Document) -> str:
    """The page that report.py writes of these."""
    target = tmp_path / "benchmarks.md"
    folder = results(tmp_path / "results", **documents)
    assert report.main(["--results", str(folder), "--page", str(target)]) == 0
    return target.read_text()


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
    pytest.importorskip("matplotlib")
    rows = [row(f"cross_entropy bfloat16 64 x {classes:,}", classes / 1000) for classes in (10, 1_000, 32_000)]
    page = render(tmp_path, few=cpu_document(*rows[:2]), many=gpu_document(*rows))
    assert "![Speed against size, with the limit](benchmarks-many.png)" in page
    assert [path.name for path in tmp_path.glob("*.png")] == ["benchmarks-many.png"]
    assert (tmp_path / "benchmarks-many.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "results" / "many.json").unlink()
    assert "png" not in render(tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_a_panel_holds_every_contender_and_the_limit() -> None:
    pytest.importorskip("matplotlib")
    import report_plots

    rows = [row(f"mse_loss float32 {n}", n / 1e6) for n in (100, 1_000, 10_000)]
    rows += [row("cross_entropy float32 16 x 21 x 256 x 256"), row("cross_entropy float32 9 x 9")]
    rows += [row("mse_loss float32 100", nbytes=1_000), row("mse_loss float32 10", None)]
    (kind,) = panels = report_plots.panels(gpu_document(*rows))
    assert kind == "mse_loss float32"
    assert set(panels[kind]) == {"fastloss", "torch", "torch.compile", "limit"}
    assert panels[kind]["fastloss"] == [(n, pytest.approx(2700 * 1e6 / n)) for n in (100, 1_000, 10_000)]
    assert panels[kind]["limit"] == [(100, COPY), (1_000, COPY), (10_000, COPY)]


def test_a_file_that_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.json").write_text("{}")
    assert report.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 2
    assert "notes.json" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


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


def test_compare_writes_the_same_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "float32 1 x 10", "--json", str(path)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = record.load(path)
    (made,) = document["rows"]
    assert (document["kind"], document["complete"]) == ("cpu", True)
    assert made["work"] == "cross_entropy float32 1 x 10"
    assert all(made["results"][name]["ms"] > 0 for name in ("fastloss", "torch", "numpy"))
    assert document["device"]["threads"] >= 1
    assert "torch" in document["versions"]
    page = render(tmp_path, cpu=document)
    assert cells(page, made["work"])[1] == "4.8e-05"
