"""The README's table of figures: those of the newest whole run on a CPU, between two lines that mark its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import record
from record import NOT_MEASURED, OURS, Document, contenders, markdown, measured

README = record.ROOT / "README.md"
BEGIN, END = "<!-- figures, written by make bench-report -->\n", "<!-- end of figures -->\n"
NAMES = {"fastloss": OURS, "NumPy": "numpy", "torch": "torch", "JAX": "jax", "Numba": "numba", "Python": "python"}


def with_figures(readme: Path, documents: Sequence[Document]) -> str:
    """The file's text with its figures anew. Raises ValueError where their place is not marked."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}\n{_figures(documents)}\n{end}{after}"


def _figures(documents: Sequence[Document]) -> str:
    whole = [d for d in documents if d["kind"] == "cpu" and measured(d) and d["complete"] and not d.get("partial")]
    if not whole:
        return f"{NOT_MEASURED.capitalize()} on a CPU.\n"
    document = max(whole, key=lambda found: str(found["date"]))
    rows = [row for row in document["rows"] if row["section"] == "goals"]
    others = contenders(document, rows)
    table = [["work", OURS, *others, "of the limit"]]
    for row in rows:
        share = record.figure(row["results"].get(OURS, {}).get("fraction"))
        table.append([row["work"], *(record.time_cell(row, name) for name in (OURS, *others)), share])
    return "\n".join([_facts(document), markdown(table), _losses(document)])


def _facts(document: Document) -> str:
    device, versions = document["device"], document["versions"]
    packages = ", ".join(f"{name} {versions[key]}" for name, key in NAMES.items() if key in versions)
    rounds = f", medians of {document['rounds']} interleaved rounds" if "rounds" in document else ""
    return f"""\
Milliseconds{rounds}. {device["name"]}, {device["threads"]} threads,
{document["date"][:10]}, commit {document["commit"] or "not recorded"}:
{packages}; `{document["command"]}`.
"Of the limit" is the share of the speed at which the same memory, in the same rounds, is only read, or copied for a
gradient. [How it was measured](docs/benchmarks.md), with more sizes.
"""


def _losses(document: Document) -> str:
    """Where fastloss is not the fastest."""
    lost = []
    for row in document["rows"]:
        faster = [name for name in row["results"] if name != OURS and (record.ratio(row, name) or 1) < 1]
        lost += [f"- {row['work']}: {', '.join(faster)}"] if faster else []
    if not lost:
        return "Of all that was timed, no peer is faster at anything.\n"
    return "\n".join([f"A peer is faster at {len(lost)} of {len(document['rows'])}:\n", *lost, ""])
