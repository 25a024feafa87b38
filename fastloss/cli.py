"""The command `fastloss`: arguments in, a report or one line of error out."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from fastloss.evaluate import LOSSES, ByClass, Job, Loss, Report, evaluate
from fastloss.files import InputError
from fastloss.plots import check_plot_name

if TYPE_CHECKING:
    from fastloss.warmup import Item

CLASSES_SHOWN = 60  # a table that is longer is read by a program, from --json

EPILOG = f"""\
losses: {", ".join(loss.name for loss in LOSSES)}

INPUT, TARGET and weights are FILE or FILE:MEMBER; the member may be left out if there is only one:
  scores.npy   scores.npz:logits   scores.safetensors:logits   scores.zarr:logits
  scores.parquet:logits   scores.arrow:logits   scores.feather:logits   (numbers, or lists of one length)
A pattern in quotes, 'scores-*.npy', is all files that match as one, along the first axis.
Rows are read in chunks, so that files may be larger than memory. Nothing is ever unpickled.

exit status: 0 done; 2 wrong input, with one line on stderr; 130 interrupted; 143 terminated
"""


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class Stopped(BaseException):
    """A signal asked the command to end."""


def loss_named(name: str) -> Loss:
    """The loss called so on the command line or in Python, with - or _."""
    wanted = name.lower().replace("-", "_")
    for loss in LOSSES:
        if wanted in (loss.name.replace("-", "_"), loss.function):
            return loss
    raise InputError(f"unknown loss '{name}', expected one of: {', '.join(loss.name for loss in LOSSES)}")


def _chunk_bytes(text: str) -> int:
    size = float(text)
    if not 0 < size < 2**40:
        raise ValueError
    return max(1, int(size * 2**20))


_chunk_bytes.__name__ = "size"  # argparse: "invalid size value"


def _jobs(text: str) -> int:
    count = int(text)
    if not 1 <= count <= 1024:
        raise ValueError
    return count


def _classes(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


_jobs.__name__ = _classes.__name__ = "number"

# Options that go to the loss as they are; which loss takes which stands in LOSSES.
OPTIONS: dict[str, dict[str, Any]] = {
    "ignore_index": {"type": int, "metavar": "I", "help": "target class that counts for nothing (-100)"},
    "label_smoothing": {"type": float, "metavar": "E", "help": "0 to 1: share of the uniform distribution"},
    "lse_square_scale": {"type": float, "metavar": "S", "help": "z-loss: adds S * logsumexp(logits)**2 (0)"},
    "softcap": {"type": float, "metavar": "A", "help": "logits become A * tanh(logits / A) first"},
    "beta": {"type": float, "metavar": "B", "help": "where smooth-l1 turns from squared to absolute (1)"},
    "delta": {"type": float, "metavar": "D", "help": "where huber turns from squared to linear (1)"},
    "log_target": {"action": "store_true", "help": "kl-div's target is a logarithm already"},
}

# Of warmup, which makes the arrays itself.
WARMUP_ARRAYS = {
    "probabilities": "cross-entropy: targets are class probabilities",
    "weight": "one weight per class, or per element of the input",
    "pos_weight": "bce-with-logits: factor of the positive part",
}


def _parser() -> Parser:
    parser = Parser(prog="fastloss", description="Losses of model outputs, exact and at memory speed.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    command = commands.add_parser(
        "evaluate",
        help="the loss of predictions in a file against targets in a file",
        description="The loss of INPUT (predictions) against TARGET, streamed from files of any size.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=_evaluate)
    command.add_argument("loss", metavar="LOSS", help="which loss; see below")
    command.add_argument("input", metavar="INPUT", help="logits (N, C, ...), or numbers of any shape")
    command.add_argument("target", metavar="TARGET", help="classes (N, ...), or the input's shape")

    group = command.add_argument_group("options of the loss (one that it does not have is an error)")
    group.add_argument("--reduction", metavar="R", help="mean or sum, for kl-div also batchmean (mean)")
    group.add_argument("--weight", metavar="FILE", help="one weight per class, or per element of the input")
    group.add_argument("--pos-weight", metavar="FILE", help="bce-with-logits: factor of the positive part")
    for name, settings in OPTIONS.items():
        group.add_argument("--" + name.replace("_", "-"), default=None, **settings)

    group = command.add_argument_group("how and what to show")
    group.add_argument("--json", action="store_true", help='a JSON object; what JSON lacks as "nan", "inf", "-inf"')
    group.add_argument("--by-class", action="store_true", help="mean loss and count of every target class")
    group.add_argument("--per-sample", metavar="OUT.npy", help="write the loss of every sample")
    group.add_argument("--plot", metavar="OUT.png", help="draw their distribution (.png, .svg, .pdf)")
    group.add_argument(
        "--chunk-mb", type=_chunk_bytes, default=64 << 20, metavar="MB", dest="chunk_bytes",
        help="megabytes in memory at once (64); one row always fits",
    )  # fmt: skip
    group.add_argument(
        "--scheduler", metavar="ADDRESS",
        help="compute on a Dask cluster (tcp://HOST:8786), whose workers must see the files under the same names",
    )  # fmt: skip

    command = commands.add_parser(
        "warmup",
        help="compile kernels into the disk cache, before they are needed",
        description="Compile what calls of LOSS will need, and keep it in the disk cache; without LOSS what most "
        "programs use: the means and gradients of every loss for float32.",
        epilog=f"losses: {', '.join(loss.name for loss in LOSSES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=_warmup)
    command.add_argument("losses", nargs="*", metavar="LOSS", help="which losses; see below")
    command.add_argument("--dtype", nargs="+", metavar="D", help="of the arrays: float16, bfloat16, float32, float64")
    command.add_argument("--reduction", nargs="+", metavar="R", help="none, mean or sum, for kl-div also batchmean")
    command.add_argument("--grad", action="store_true", help="gradients too")
    help = "how many there will be: each number up to 32 has kernels of its own"
    command.add_argument("--classes", nargs="+", type=_classes, metavar="C", help=help)
    command.add_argument("--jobs", type=_jobs, metavar="N", help="processes that compile (one for each core)")
    group = command.add_argument_group("options of the loss, where calls will have them")
    for name, help in WARMUP_ARRAYS.items():
        group.add_argument("--" + name.replace("_", "-"), action="store_true", help=help)
    for name, settings in OPTIONS.items():
        group.add_argument("--" + name.replace("_", "-"), default=None, **settings)

    command = commands.add_parser("doctor", help="versions, threads, caches, GPUs: for a bug report")
    command.set_defaults(run=_doctor)
    return parser


def _job(args: argparse.Namespace) -> Job:
    """Checks what can be known before a file is opened."""
    loss = loss_named(args.loss)
    takes = set(loss.options) | ({"weight"} if loss.weight else set())
    given = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    for name in (*given, *(name for name in ("weight", "pos_weight") if getattr(args, name) is not None)):
        if name not in takes:
            flags = ", ".join("--" + option.replace("_", "-") for option in (*sorted(takes), "reduction"))
            raise InputError(f"{loss.name} has no --{name.replace('_', '-')}, expected only: {flags}")
    if args.reduction is not None:
        if args.reduction not in loss.reductions:
            expected = " or ".join(loss.reductions)
            raise InputError(f"{loss.name} has no --reduction {args.reduction}, expected {expected}")
        given["reduction"] = args.reduction
    if args.by_class and not loss.over_classes:
        raise InputError(f"{loss.name} has no classes, expected --by-class only with cross-entropy or nll")
    if args.by_class and args.weight and given.get("lse_square_scale"):
        raise InputError("--by-class cannot separate --weight from --lse-square-scale, expected one of them")
    if args.per_sample is not None and not args.per_sample.endswith(".npy"):
        raise InputError(f"{args.per_sample}: unknown kind of file, expected a name that ends in .npy")
    if args.plot is not None:
        check_plot_name(args.plot)
    files = {role: getattr(args, role) for role in ("input", "target", "weight", "pos_weight")}
    return Job(
        loss=loss,
        files={role: spec for role, spec in files.items() if spec is not None},
        options=given,
        chunk_bytes=args.chunk_bytes,
        by_class=args.by_class,
        per_sample=args.per_sample,
        plot=args.plot,
        scheduler=args.scheduler,
    )


def _evaluate(args: argparse.Namespace, signals: Signals) -> int:
    job = _job(args)
    with _progress(signals) as progress:
        report = evaluate(job, progress)
    return _print(_json(report) if args.json else _table(report))


def _warmup(args: argparse.Namespace, signals: Signals) -> int:
    from fastloss import warmup
    from fastloss.kernels.compiler import cache_directory

    chosen = _items(args)
    before = warmup.compiled_kernels()
    start = time.perf_counter()
    jobs = args.jobs or warmup.default_jobs(len(chosen))
    for item, seconds in warmup.run(chosen, jobs):
        signals.check()
        if status := _print(f"{seconds:6.2f} s  {item}"):
            return status
    new = len(warmup.compiled_kernels() - before)
    processes = f", {jobs} processes" if jobs > 1 else ""
    return _print(f"{new} kernels compiled in {time.perf_counter() - start:.1f} s{processes}; in {cache_directory()}")


def _items(args: argparse.Namespace) -> list[Item]:
    """What warmup is to compile; checks what can be known before."""
    from fastloss import warmup

    losses = [loss_named(name) for name in args.losses] or LOSSES
    dtypes, reductions = args.dtype or ["float32"], args.reduction or ["mean"]
    given = {name: getattr(args, name) for name in (*WARMUP_ARRAYS, *OPTIONS)}
    options = {name: value for name, value in given.items() if value is not None and value is not False}
    for dtype in dtypes:
        if dtype not in warmup.DTYPES:
            raise InputError(f"unknown dtype '{dtype}', expected one of: {', '.join(warmup.DTYPES)}")
    for loss in losses:
        for reduction in reductions:
            if reduction not in ("none", *loss.reductions):
                expected = " or ".join(("none", *loss.reductions))
                raise InputError(f"{loss.name} has no --reduction {reduction}, expected {expected}")
        takes = {*loss.options, *(["weight"] if loss.weight else [])}
        takes |= {"probabilities"} if loss.function == "cross_entropy" else set()
        for name in options:
            if name not in takes:
                raise InputError(f"{loss.name} has no --{name.replace('_', '-')}")
    classes = args.classes or warmup.CLASSES
    return warmup.items(losses, dtypes, reductions, args.grad or not args.losses, options, classes)


def _doctor(args: argparse.Namespace, signals: Signals) -> int:
    from fastloss.runtime import show_versions

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        show_versions()
    return _print(text.getvalue().rstrip())


@contextlib.contextmanager
def _progress(signals: Signals) -> Iterator[Callable[[int, int], None]]:
    """A bar with throughput on a terminal, where tqdm is installed; in a pipe nothing."""
    bar: Any = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            tqdm = importlib.import_module("tqdm").tqdm
            bar = tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr, dynamic_ncols=True)

    def progress(done: int, total: int) -> None:
        signals.check()
        if bar is not None:
            bar.total = total
            bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def _number(value: float) -> float | str:
    """A number as JSON can hold it; Python's float() reads all of them."""
    return value if math.isfinite(value) else str(value)


def _json(report: Report) -> str:
    job = report.job
    content: dict[str, Any] = {
        "loss": job.loss.name,
        "reduction": job.options.get("reduction", "mean"),
        "value": _number(report.value),
    }
    if report.perplexity is not None:
        content["perplexity"] = _number(report.perplexity)
    content |= {
        "samples": report.samples,
        "ignored": report.ignored,
        "weight_sum": _number(report.weight_sum),
        "seconds": report.seconds,
        "bytes": report.nbytes,
        "gb_per_s": report.nbytes / report.seconds / 1e9,
        "options": {name: value for name, value in job.options.items() if name != "reduction"},
        "files": {
            role: {"name": reader.name, "shape": reader.shape, "dtype": reader.dtype.name}
            for role, reader in report.readers.items()
        },
    }
    if report.by_class is not None:
        pairs = zip(report.by_class.count.tolist(), report.by_class.mean.tolist(), strict=True)
        content["by_class"] = [
            {"class": index, "count": count, "mean": _number(mean)} for index, (count, mean) in enumerate(pairs)
        ]
    content |= _written(job)
    return json.dumps(content, allow_nan=False)


def _table(report: Report) -> str:
    job = report.job
    digits = 17 if report.readers["input"].dtype.name == "float64" else 9
    rows: dict[str, str] = {"loss": f"{job.loss.name}, {job.options.get('reduction', 'mean')}"}
    rows |= {name: str(value) for name, value in job.options.items() if name != "reduction"}
    rows |= {role: f"{reader.name}  {reader.shape} {reader.dtype.name}" for role, reader in report.readers.items()}
    rows["value"] = f"{report.value:.{digits}g}"
    if report.perplexity is not None:
        rows["perplexity"] = f"{report.perplexity:.6g}"
    rows |= {
        "samples" if job.loss.over_classes else "elements": f"{report.samples:,}",
        "ignored": f"{report.ignored:,}",
        "weight sum": f"{report.weight_sum:,.9g}",
        "seconds": f"{report.seconds:.3g}",
        "GB/s": f"{report.nbytes / report.seconds / 1e9:.3g}",
    }
    rows |= _written(job)
    width = max(map(len, rows)) + 2
    lines = [f"{name.replace('_', ' '):<{width}}{text}" for name, text in rows.items()]
    if report.by_class is not None:
        lines += ["", *_class_lines(report.by_class)]
    return "\n".join(lines)


def _written(job: Job) -> dict[str, str]:
    """The files that were written, by what is in them."""
    paths = {"per_sample": job.per_sample, "plot": job.plot}
    return {name: path for name, path in paths.items() if path is not None}


def _class_lines(by_class: ByClass) -> list[str]:
    count, mean = by_class.count, by_class.mean
    shown = np.arange(len(count))
    note = []
    if len(count) > CLASSES_SHOWN:
        shown = np.argsort(-mean, kind="stable")[:CLASSES_SHOWN]  # nan comes last
        note = [f"the {CLASSES_SHOWN} of {len(count):,} classes with the highest mean; --json has all"]
    lines = [f"{'class':>8}{'count':>15}{'mean':>14}"]
    lines += [f"{index:>8}{count[index]:>15,}{mean[index]:>14.6g}" for index in shown]
    return lines + note


class Signals:
    """Within it SIGINT, SIGTERM and SIGHUP raise Stopped, once: tidying up afterwards is not disturbed."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._stopped: int | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self._stopped = number
        for other in self._before:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    def check(self) -> None:
        """Raises again what was lost: Python drops exceptions from destructors and callbacks of C code."""
        if self._stopped is not None:
            raise Stopped(self._stopped)


def _print(text: str) -> int:
    """Writes to stdout; returns the exit status."""
    try:
        print(text, flush=True)
    except OSError as error:
        # Python would try to write what is left once more on its way out, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + 13  # SIGPIPE: who reads has seen enough
        raise InputError(f"stdout: cannot be written: {error.strerror}") from None
    return 0


def _complain(message: str) -> int:
    print("fastloss: error:", " ".join(message.split()), file=sys.stderr, flush=True)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, by default those of the process; returns the exit status."""
    try:
        with Signals() as signals:
            args = _parser().parse_args(argv)
            if args.version:
                import fastloss

                return _print(f"fastloss {fastloss.__version__}")
            if args.command is None:
                raise InputError("no command, expected evaluate, warmup or doctor; fastloss --help says more")
            return int(args.run(args, signals))
    except Stopped as stopped:
        number = int(stopped.args[0])
        what = "interrupted" if number == signal.SIGINT else "terminated"
        print("fastloss:", what, file=sys.stderr, flush=True)
        return 128 + number
    except InputError as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError:
        return _complain("not enough memory; a smaller --chunk-mb needs less")
    except SystemExit as done:  # --help
        return int(done.code or 0)
