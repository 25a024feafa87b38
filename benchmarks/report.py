"""docs/benchmarks.md, its plots and the README's table, from the JSON files of benchmarks/results/; and one result
beside another.

    python benchmarks/report.py
    python benchmarks/report.py --compare OLD.json NEW.json [--threshold 1.1]

gpu.py, and compare.py with --save or --json, write these files. --compare exits 1 where fastloss takes longer than
before by more than the threshold, or no longer gets through; 2 where the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import record
import report_readme
import startup
from record import NOT_MEASURED, OURS, Document, Row, Table, contenders, markdown, measured

PAGE = record.ROOT / "docs" / "benchmarks.md"

INTRODUCTION = """\
# Benchmarks

`make bench-report` writes this page from the files in `benchmarks/results/`, each as a run left it; rows that fastloss
loses stay in. To add a device: `make bench` for a CPU; `python3 benchmarks/gpu.py OUT_FOLDER` on a machine with an
NVIDIA GPU, and copy the JSON into that folder.

Times are medians in milliseconds. A contender's column says how many times as long as fastloss it takes: above 1
fastloss is faster. Bytes count each input read once and each output written once, whatever a contender really moves.
"""
GPU = """\
Device time between CUDA events: batches of calls wait behind a sleeping kernel until all of them are queued, contenders
take turns, and input sets rotate so that none is found in the L2 cache. JAX has streams of its own and is timed on the
host's clock over a batch. "Of copy" is GB/s over the speed of a copy on the same device in the same run, read plus
written.
"""
CPU = """\
Contenders take turns; each turn is a pause (threads of other libraries spin for a while), untimed calls for 15 ms
(the other cores have to wake up), a timed one; who is slow has fewer rounds, and one where a call takes seconds. "Of
the limit" is GB/s over what the same machine reaches in the same rounds without computing anything, on as many
threads: for values it reads as many bytes; for values and gradients of cross-entropy it copies with streaming stores;
for those of pointwise losses it reads two arrays and streams out a third ("triad"). Arrays of less than a megabyte
stay in the caches: their calls are timed back to back for 10 ms a turn, the best round counts, and there is no limit.

All contenders share one pair of arrays, made before. NumPy is the plain formula; torch is eager; torch.compile
(`dynamic=False`) and JAX (`jit`) compile for each shape, and gradients come from `torch.autograd.grad` and
`jax.value_and_grad`, in new memory. fastloss writes gradients into memory that is used again
(`grad_out=`), or where a row says so returns its own.
"""


# ---- one document


def facts(document: Document) -> str:
    """What it was measured on, with what, when and by which command."""
    device = dict(document["device"] or {})
    details = [f"compute capability {device['compute_capability']}"] if "compute_capability" in device else []
    found = document.get("clocks_before") or {}
    if "driver_version" in found:
        details.append(f"driver {found['driver_version']}")
    if "clocks.sm" in found:
        details.append(f"clocks as found {found['clocks.sm']} (SM) and {found['clocks.mem']} (memory)")
    if "threads" in device:
        details.append(f"{device['threads']} threads")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines = [f"- {device['name']}" + "".join(f", {detail}" for detail in details)]
    lines.append(f"- {document['date']}, commit {document['commit'] or 'not recorded'}, `{document['command']}`")
    lines.append(f"- {versions}")
    ceilings = document.get("ceilings")
    if ceilings:
        copy, read = ceilings["copy_gbs"], ceilings["read_gbs"]
        lines.append(f"- limits of this run: copy {copy:,.0f} GB/s (read plus written), read {read:,.0f} GB/s")
    if "rounds" in document:
        lines.append(f"- medians of {document['rounds']} rounds")
    lines += [f"- without {name}: {why}" for name, why in document.get("absent", {}).items()]
    lines += [f"- left out: {work}: {why}" for work, why in document.get("skipped", {}).items()]
    if not document["complete"]:
        lines.append("- the run was cut off: rows are missing")
    return "\n".join(lines) + "\n"


def rows_table(rows: Sequence[Row], limit: str, others: Sequence[str]) -> Table:
    """Work by work: our time, speed and share of the limit, the others' times in ours, goals where there are any."""
    goals = any(row.get("goal") for row in rows)
    table = [["work", "MB", OURS, "GB/s", limit, *others, *(["goal", "met"] if goals else [])]]
    for row in rows:
        ours = row["results"].get(OURS, {})
        cells = [row["work"], record.figure(row["bytes"] and row["bytes"] / 1e6), record.time_cell(row)]
        cells += [record.figure(ours.get("gbs")), record.figure(ours.get("fraction"))]
        cells += [record.ratio_cell(row, name) for name in others]
        table.append(cells + ([record.goal_text(row), record.verdict(row)] if goals else []))
    return table


def startup_tables(document: Document) -> Iterator[str]:
    """Processes to their first result, with their stages; first calls that compile."""
    rows = [row for row in document["rows"] if row["section"] == "startup"]
    if rows:
        cells = ([row["work"], record.time_cell(row), record.goal_text(row), record.verdict(row)] for row in rows)
        yield "Start-up, medians of fresh processes:\n"
        yield markdown([["work", OURS, "goal", "met"], *cells])
        yield "Where that time goes; an import's time is without what it imports of the other packages:\n"
        yield markdown(startup.stages_table(document))
    compiling = startup.compiling_table(document)
    if compiling:
        yield "One process without a cache, call after call; what several need counts for the first:\n"
        yield markdown(compiling)


def outcomes(document: Document) -> Iterator[str]:
    """Tests and checks: counts, then each check, then each test that failed."""
    tests = document.get("pytest")
    if tests:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(tests["counts"].items())) or "nothing run"
        yield f"Tests (tests/gpu): {counts}{'; ' + tests['message'] if tests['message'] else ''}.\n"
        failed = [test for test in tests["tests"] if test["outcome"] == "failed"]
        yield markdown([["failed test", "message"], *([test["name"], _line(test["message"])] for test in failed)])
    checks = document.get("checks") or []
    if checks:
        counts = ", ".join(f"{n} {name}" for name, n in sorted(Counter(check["outcome"] for check in checks).items()))
        yield f"Checks on the hardware: {counts}.\n"
        cells = ([check["name"], check["outcome"], _line(check["message"])] for check in checks)
        yield markdown([["check", "outcome", "found"], *cells])


def _line(message: str | None) -> str:
    """In one cell of a table."""
    return " ".join((message or "").split())[:300]


_CAPTIONS = ("Speed against size, with the limit", "Shares of the limit, work by work")


def section(document: Document, pictures: Sequence[str]) -> str:
    """All of one document."""
    gpu = document["kind"] == "gpu"
    parts = [f"### {document['device']['name']}, {document['date'][:10]}\n", facts(document)]
    for name, title in (("goals", ""), ("sweep", "Sizes and dtypes:\n")):
        rows = [row for row in document["rows"] if row["section"] == name]
        if rows:
            others = contenders(document, rows)
            parts += [title, markdown(rows_table(rows, "of copy" if gpu else "of the limit", others))]
    parts += [f"![{_CAPTIONS['-bars' in picture]}]({picture})\n" for picture in pictures]
    parts += [*startup_tables(document), *outcomes(document)]
    return "\n".join(part for part in parts if part)


# ---- the page


def page(documents: Sequence[tuple[Document, Sequence[str]]]) -> str:
    """The whole of docs/benchmarks.md. Documents come with the names of their plots; dry runs are left out."""
    found = sorted((pair for pair in documents if measured(pair[0])), key=lambda pair: pair[0]["date"], reverse=True)
    found.sort(key=lambda pair: pair[0]["device"]["name"])
    parts = [INTRODUCTION]
    for kind, title, how in (("gpu", "## GPU\n", GPU), ("cpu", "## CPU\n", CPU)):
        sections = [section(document, pictures) for document, pictures in found if document["kind"] == kind]
        nothing = f"{NOT_MEASURED.capitalize()} on a {kind.upper()}.\n"
        parts += [title, *([how, *sections] if sections else [nothing])]
    return "\n".join(parts)


def write(results: Path, target: Path, readme: Path) -> None:
    """The page, its plots, and the README's figures; plots of results that are gone go with them."""
    documents = []
    old = set(target.parent.glob("benchmarks-*.png"))
    for path in sorted(results.glob("*.json")):
        document = record.load(path)
        pictures: list[str] = []
        if measured(document):
            from report_plots import bars, plot

            for draw, end in ((plot, ""), (bars, "-bars")):
                picture = target.parent / f"benchmarks-{path.stem}{end}.png"
                if draw(document, picture):
                    old.discard(picture)
                    pictures.append(picture.name)
        else:
            print(f"report.py: {path.name} is a dry run, nothing in it was measured: left out", file=sys.stderr)
        documents.append((document, pictures))
    text = report_readme.with_figures(readme, [document for document, _ in documents])
    for picture in old:
        picture.unlink()
    target.write_text(page(documents))
    readme.write_text(text)


# ---- comparison


def compare(old: Document, new: Document, threshold: float) -> tuple[list[str], bool]:
    """Lines to print, and whether anything got worse by more than the threshold. Raises ValueError for two documents
    that say nothing about each other."""
    for document in (old, new):
        if not measured(document):
            raise ValueError(f"the result of {document['date']} is a dry run: {NOT_MEASURED}")
    here, there = new["device"]["name"], old["device"]["name"]
    if (old["kind"], there) != (new["kind"], here):
        raise ValueError(f"measured on different devices: {there} and {here}")
    was = {row["work"]: record.time_of(row) for row in old["rows"]}
    lines, worse, compared = [], False, 0
    for row in new["rows"]:
        before, after = was.pop(row["work"], None), record.time_of(row)
        if before is None:
            continue
        compared += 1
        ratio = after / before if after else None
        regressed = ratio is None or ratio > threshold
        worse |= regressed
        change = f"{ratio:.2f}x" if ratio else record.time_cell(row) or NOT_MEASURED
        lines.append(
            f"{'SLOWER' if regressed else 'ok':6}  {row['work']}: "
            f"{record.figure(before)} -> {record.figure(after) or '-'} ms, {change}"
        )
    lines += [f"absent  {work}: {record.figure(ms)} ms before" for work, ms in was.items() if ms]
    if not compared:
        raise ValueError("no work was timed in both results")
    return lines, worse


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD.json", "NEW.json"))
    parser.add_argument("--threshold", type=float, default=1.1, help="as a ratio of times (default 1.1)")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="the folder of JSON files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--readme", type=Path, default=report_readme.README, help="whose figures to write anew")
    options = parser.parse_args(arguments)
    try:
        if not options.compare:
            write(options.results, options.page, options.readme)
            return 0
        old, new = (record.load(path) for path in options.compare)
        lines, worse = compare(old, new, options.threshold)
    except ValueError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
