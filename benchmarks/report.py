"""docs/benchmarks.md and its plots, from the JSON files of benchmarks/results/; and one result beside another.

    python benchmarks/report.py
    python benchmarks/report.py --compare OLD.json NEW.json [--threshold 1.1]

gpu.py and compare.py --json write these files. --compare exits 1 where fastloss takes longer than before by more than
the threshold, or no longer gets through; 2 where the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import record
from record import NOT_MEASURED, OURS, Document, Row

PAGE = record.ROOT / "docs" / "benchmarks.md"
Table = list[list[str]]

INTRODUCTION = """\
# Benchmarks

`make bench-report` writes this page from the files in `benchmarks/results/`, each as a run left it; rows that fastloss
loses stay in. To add a device: `python3 benchmarks/gpu.py OUT_FOLDER` on a machine with an NVIDIA GPU, or
`python benchmarks/compare.py --json FILE` for a CPU, and copy the JSON into that folder.

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
Contenders take turns, each round after a pause. "Of the limit" is GB/s over the speed at which the same machine, in the
same rounds, reads as many bytes and does nothing with them.
"""


def markdown(table: Table) -> str:
    """A table whose first row is its head; none without a second."""
    if len(table) < 2:
        return ""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def measured(document: Document) -> bool:
    return not document["dry_run"]


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
    if not document["complete"]:
        lines.append("- the run was cut off: rows are missing")
    return "\n".join(lines) + "\n"


def _contenders(rows: Sequence[Row]) -> list[str]:
    """Whoever took part beside fastloss, in the order of their first rows."""
    return list(dict.fromkeys(name for row in rows for name in row["results"] if name != OURS))


def rows_table(rows: Sequence[Row], limit: str) -> Table:
    """Work by work: our time, speed and share of the limit, the others' times in ours, goals where there are any."""
    others, goals = _contenders(rows), any(row.get("goal") for row in rows)
    table = [["work", "MB", OURS, "GB/s", limit, *others, *(["goal", "met"] if goals else [])]]
    for row in rows:
        ours = row["results"].get(OURS, {})
        cells = [row["work"], record.figure(row["bytes"] and row["bytes"] / 1e6), record.time_cell(row)]
        cells += [record.figure(ours.get("gbs")), record.figure(ours.get("fraction"))]
        cells += [record.ratio_cell(row, name) for name in others]
        table.append(cells + ([record.goal_text(row), record.verdict(row)] if goals else []))
    return table


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


def section(document: Document, pictures: Sequence[str]) -> str:
    """All of one document."""
    gpu = document["kind"] == "gpu"
    parts = [f"### {document['device']['name']}, {document['date'][:10]}\n", facts(document)]
    for name, title in (("goals", ""), ("sweep", "Sizes and dtypes:\n")):
        rows = [row for row in document["rows"] if row["section"] == name]
        if rows:
            parts += [title, markdown(rows_table(rows, "of copy" if gpu else "of the limit"))]
    parts += [f"![Speed against size, with the limit]({picture})\n" for picture in pictures]
    parts += outcomes(document)
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


def write(results: Path, target: Path) -> None:
    """The page and its plots; plots of results that are gone go with them."""
    documents = []
    old = set(target.parent.glob("benchmarks-*.png"))
    for path in sorted(results.glob("*.json")):
        document = record.load(path)
        picture = target.parent / f"benchmarks-{path.stem}.png"
        drawn = False
        if measured(document):
            from report_plots import plot

            drawn = plot(document, picture)
        else:
            print(f"report.py: {path.name} is a dry run, nothing in it was measured: left out", file=sys.stderr)
        old -= {picture} if drawn else set()
        documents.append((document, [picture.name] if drawn else []))
    for picture in old:
        picture.unlink()
    target.write_text(page(documents))


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
    options = parser.parse_args(arguments)
    try:
        if not options.compare:
            write(options.results, options.page)
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
