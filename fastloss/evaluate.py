"""The engine of `fastloss evaluate`: files in chunks through a Meter, and what is counted on the way."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastloss.files import InputError, Reader, open_reader
from fastloss.outputs import Output
from fastloss.plots import Histogram, draw

if TYPE_CHECKING:
    from fastloss import Meter

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Loss:
    """What the command must know of a loss; its values are the library's business."""

    name: str  # on the command line
    function: str  # in fastloss
    options: tuple[str, ...] = ()
    weight: str | None = None  # one per "class", per "element", or "broadcast" to the input's shape
    over_classes: bool = False  # the input is (N, C, ...): a sample is a row of logits, not an element
    reductions: tuple[str, ...] = ("mean", "sum")


CLASS_OPTIONS = ("ignore_index", "label_smoothing", "lse_square_scale", "softcap")

LOSSES = (
    Loss("cross-entropy", "cross_entropy", CLASS_OPTIONS, weight="class", over_classes=True),
    Loss("nll", "nll_loss", ("ignore_index",), weight="class", over_classes=True),
    Loss("l1", "l1_loss", weight="element"),
    Loss("mse", "mse_loss", weight="element"),
    Loss("bce", "binary_cross_entropy", weight="broadcast"),
    Loss("bce-with-logits", "binary_cross_entropy_with_logits", ("pos_weight",), weight="broadcast"),
    Loss("smooth-l1", "smooth_l1_loss", ("beta",)),
    Loss("huber", "huber_loss", ("delta",), weight="element"),
    Loss("kl-div", "kl_div", ("log_target",), reductions=("mean", "sum", "batchmean")),
)


@dataclass(frozen=True)
class Job:
    """One evaluation, as the user asked for it; inputs are FILE or FILE:MEMBER."""

    loss: Loss
    files: Mapping[str, str]  # input, target and, where given, weight and pos_weight
    options: Mapping[str, Any] = field(default_factory=dict)  # the loss's other options, where given
    chunk_bytes: int = 64 << 20
    by_class: bool = False
    per_sample: str | None = None  # a .npy to write
    plot: str | None = None  # a picture to write
    scheduler: str | None = None  # of a Dask cluster, whose workers read the files and compute


@dataclass(frozen=True)
class Report:
    """What came out, and what it was made of."""

    job: Job
    readers: Mapping[str, Reader]
    value: float
    mean: float | None  # over class indices, whatever the reduction
    perplexity: float | None  # exp(mean) of cross-entropy, where nothing is added to it
    samples: int
    ignored: int
    weight_sum: float
    seconds: float
    nbytes: int
    by_class: ByClass | None = None
    histogram: Histogram | None = None


class ByClass:
    """Count and sum of the losses of every class."""

    def __init__(self, classes: int, weight: Array | None) -> None:
        self.count = np.zeros(classes, np.int64)
        self._sum = np.zeros(classes)
        self._weight: Array = np.ones(classes) if weight is None else weight.astype(np.float64)

    def add(self, target: Array, losses: Array) -> None:
        """Adds samples of these classes, (n,), and their losses, (n,)."""
        index = target.astype(np.int64)
        self.count += np.bincount(index, minlength=len(self.count))
        self._sum += np.bincount(index, weights=losses, minlength=len(self.count))

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """(classes,): what the command prints as mean for the samples of one class alone; nan without any."""
        with np.errstate(divide="ignore", invalid="ignore"):
            mean: npt.NDArray[np.float64] = self._sum / (self.count * self._weight)
        return mean


class Plan:
    """How the files fit together: shapes, which files are read by rows and which whole, rows at once."""

    def __init__(self, job: Job, readers: Mapping[str, Reader]) -> None:
        self.readers = readers
        loss, input, target = job.loss, readers["input"], readers["target"]
        self._loss = loss
        shape = input.shape
        # Without a batch axis there is nothing to stream: logits of one sample, or one number.
        self.single = len(shape) <= (1 if loss.over_classes else 0)
        if loss.over_classes and not shape:
            raise InputError(f"{input.name}: a single number, expected logits of shape (N, C) or (N, C, ...)")
        self.sample_shape = shape
        if loss.over_classes:
            self.sample_shape = () if self.single else (shape[0], *shape[2:])
        _check_target(loss, input, target, self.sample_shape)
        self.indices = loss.over_classes and target.shape == self.sample_shape
        if job.by_class and not self.indices:
            raise InputError(f"{target.name}: class probabilities, but --by-class needs class indices")
        self.classes = shape[0 if self.single else 1] if loss.over_classes else 0
        computed = (input,) if loss.over_classes else (input, target)  # which decide the precision
        double = any(reader.dtype.name == "float64" for reader in computed)
        self.sample_dtype = np.dtype(np.float64 if double else np.float32)

        self.streamed = {"input": input, "target": target}
        self.whole: dict[str, Array] = {}
        for role in ("weight", "pos_weight"):
            if role in readers:
                kind = loss.weight if role == "weight" else "broadcast"
                _check_weight(str(kind), readers[role], input, self.single)
                other = readers[role].shape
                if kind != "class" and len(other) == len(shape) and other[:1] == shape[:1]:
                    self.streamed[role] = readers[role]
                else:
                    self.whole[role] = _whole(readers[role])

        self.options = dict(job.options)  # of the loss
        if loss.weight == "class" and "weight" in self.whole:
            self.options["weight"] = self.whole.pop("weight")

        self.rows = 1 if self.single else shape[0]
        self.row_bytes = sum(reader.row_bytes for reader in self.streamed.values())
        extra = 0
        if job.per_sample or job.by_class or job.plot:  # losses, and copies of them and of their classes
            extra = int(np.prod(self.sample_shape[1:])) * (self.sample_dtype.itemsize + 24)
        self.step = max(1, min(self.rows, job.chunk_bytes // max(1, self.row_bytes + extra)))

    def read(self, rows: int) -> dict[str, Array]:
        """The next chunk: input, target and what else changes from row to row or is the same for all."""
        if self.single:
            chunk = {role: _whole(reader) for role, reader in self.streamed.items()}
        else:
            chunk = {role: reader.read(rows) for role, reader in self.streamed.items()}
        return chunk | self.whole

    def meter(self) -> Meter:
        """A Meter of this loss, which has seen nothing."""
        from fastloss import Meter  # late: a mistyped option is answered without it

        with self.explained():
            return Meter(self._loss.function, **self.options)

    def stream(self, meter: Meter, extras: Extras, start: int, stop: int) -> Iterator[int]:
        """Adds the rows from `start`, where the readers stand, up to `stop`, a chunk a time; gives the row reached."""
        while True:
            rows = min(self.step, stop - start)
            chunk, losses = self.read(rows), extras.losses(rows)
            with self.explained(start, rows):
                meter.update(**chunk, per_sample=losses)
            extras.add(losses, chunk["target"])
            start += rows
            yield start
            if start >= stop:  # no rows are one empty chunk: types are checked
                return

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """What whoever opens the same files must find."""
        return {role: (reader.shape, reader.dtype.name) for role, reader in self.readers.items()}

    def skip(self, rows: int) -> None:
        """Passes over rows of every file that is read by rows."""
        for reader in self.streamed.values():
            reader.skip(rows)

    @contextlib.contextmanager
    def explained(self, start: int = 0, rows: int = 0) -> Iterator[None]:
        """Turns the library's error about a chunk into one about the files, with rows of the files."""
        try:
            yield
        except (ValueError, TypeError, IndexError) as error:
            message = str(error)
            if not self.single and hasattr(error, "relocate"):
                message = error.relocate(start)
            elif start or 0 < rows < self.rows:
                message += f" (in rows {start} to {start + rows - 1})"
            role = message.partition(" ")[0]
            named = [role] if role in self.readers else ["input", "target"]
            names = ", ".join(self.readers[name].name for name in named)
            raise InputError(f"{names}: {message}") from error


class Extras:
    """What was asked for besides the value, made of the losses of the samples as they pass."""

    def __init__(self, job: Job, plan: Plan, per_sample: Output | None = None) -> None:
        self.by_class = ByClass(plan.classes, plan.options.get("weight")) if job.by_class else None
        self.histogram = Histogram() if job.plot else None
        self._per_sample = per_sample
        self._indices, self._ignore_index = plan.indices, plan.options.get("ignore_index", -100)
        self._losses: Array | None = None
        if job.per_sample or job.by_class or job.plot:
            shape = () if plan.single else (plan.step, *plan.sample_shape[1:])
            self._losses = np.empty(shape, plan.sample_dtype)

    def losses(self, rows: int) -> Array | None:
        """Room for the losses of a chunk, the same every time; None where nobody wants them."""
        return self._losses[:rows] if self._losses is not None and self._losses.ndim else self._losses

    def add(self, losses: Array | None, target: Array | None) -> None:
        """Takes in the losses of a chunk; of its target only class indices matter."""
        if losses is None:
            return
        if self._per_sample is not None:
            self._per_sample.write(losses)
        kept = losses.reshape(-1)
        if self._indices and target is not None:
            index = target.reshape(-1)
            keep = index != self._ignore_index
            index, kept = index[keep], kept[keep]
            if self.by_class is not None:
                self.by_class.add(index, kept)
        if self.histogram is not None:
            self.histogram.add(kept)


@contextlib.contextmanager
def opened(job: Job) -> Iterator[Plan]:
    """The files of a job, open."""
    with contextlib.ExitStack() as stack:
        readers = {role: stack.enter_context(contextlib.closing(open_reader(spec))) for role, spec in job.files.items()}
        yield Plan(job, readers)


def evaluate(job: Job, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Streams the files through a Meter, writes what was asked for; `progress` hears bytes done and all."""
    with contextlib.ExitStack() as stack:
        plan = stack.enter_context(opened(job))
        readers = plan.readers
        meter = plan.meter()

        inputs = [path for reader in readers.values() for path in reader.paths]
        outputs = {
            role: stack.enter_context(contextlib.closing(Output(path, inputs)))
            for role, path in (("per_sample", job.per_sample), ("plot", job.plot))
            if path is not None
        }
        if "per_sample" in outputs:
            outputs["per_sample"].write_header(plan.sample_dtype, plan.sample_shape)
        extras = Extras(job, plan, outputs.get("per_sample"))

        began = time.perf_counter()
        if job.scheduler is None:
            for done in plan.stream(meter, extras, 0, plan.rows):
                progress(plan.row_bytes * done, plan.row_bytes * plan.rows)
        else:
            from fastloss import cluster  # needs an extra

            cluster.run(job, plan, meter, extras, progress)
        value = float(meter.compute())
        seconds = time.perf_counter() - began

        mean, perplexity = _mean_and_perplexity(job, plan, meter)
        report = Report(
            job=job,
            readers=readers,
            value=value,
            mean=mean,
            perplexity=perplexity,
            samples=meter.samples,
            ignored=meter.ignored,
            weight_sum=meter.weight_sum,
            seconds=seconds,
            nbytes=plan.row_bytes * plan.rows,
            by_class=extras.by_class,
            histogram=extras.histogram,
        )
        if "plot" in outputs:
            with outputs["plot"].writing() as file:
                draw(report, file, os.path.splitext(str(job.plot))[1][1:].lower())
        for output in outputs.values():
            output.commit()
        return report


def _mean_and_perplexity(job: Job, plan: Plan, meter: Meter) -> tuple[float | None, float | None]:
    """For class indices the mean whatever the reduction, and exp(mean) for cross-entropy with nothing added."""
    if not plan.indices:
        return None, None
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        mean = meter.compute() if meter.reduction == "mean" else float(np.divide(meter.loss_sum, meter.weight_sum))
        if job.loss.function != "cross_entropy":
            return mean, None
        added = job.options.get("label_smoothing") or job.options.get("lse_square_scale")
        return mean, None if added else float(np.exp(mean))


def _whole(reader: Reader) -> Array:
    return reader.read(reader.rows).reshape(reader.shape)


def _check_target(loss: Loss, input: Reader, target: Reader, sample_shape: tuple[int, ...]) -> None:
    """Refuses a target that does not belong to the input; one that would be broadcast is a mistake here."""
    expected = {sample_shape: " of class indices" if loss.over_classes else ""}
    if loss.function == "cross_entropy":
        expected[input.shape] = " of class probabilities"
    if target.shape not in expected:
        if input.shape and target.shape and input.rows != target.rows:
            raise InputError(f"{target.name}: {target.rows} rows, expected {input.rows} as in {input.name}")
        wanted = " or ".join(f"{shape}{what}" for shape, what in expected.items())
        raise InputError(f"{target.name}: shape {target.shape}, expected {wanted} for {input.name} {input.shape}")
    if loss.over_classes and target.shape == sample_shape and target.dtype.kind not in "iu":
        raise InputError(f"{target.name}: has dtype {target.dtype}, expected class indices of an integer dtype")


def _check_weight(kind: str, weight: Reader, input: Reader, single: bool) -> None:
    if kind == "class":
        classes = input.shape[0 if single else 1]
        fits, expected = weight.shape == (classes,), f"({classes},), one weight per class"
    elif kind == "element":
        fits, expected = weight.shape == input.shape, f"{input.shape}, one weight per element of {input.name}"
    else:
        try:
            fits = np.broadcast_shapes(weight.shape, input.shape) == input.shape
        except ValueError:
            fits = False
        expected = f"one that broadcasts to {input.shape} of {input.name}"
    if not fits:
        raise InputError(f"{weight.name}: shape {weight.shape}, expected {expected}")
