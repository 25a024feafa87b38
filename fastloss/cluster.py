"""`fastloss evaluate --scheduler`: the rows of the files shared out over the workers of a Dask cluster.

A task is a range of rows: its worker opens the files, reads these rows in chunks through a Meter of its own and gives
that back. The client merges what comes back in the order of the rows, so that the result does not depend on who did
what when; the tasks of a worker that is lost are done again by others.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastloss.evaluate import Array, Extras, Job, Plan, opened
from fastloss.extras import needed
from fastloss.files import InputError

if TYPE_CHECKING:
    from fastloss import Meter

CONNECT_SECONDS = 10
WORKER_SECONDS = 60  # that a cluster without workers may take to start one


@dataclass(frozen=True)
class Part:
    """What a worker found in a range of rows."""

    meter: Meter
    rows: int
    chunks: list[tuple[Array, Array | None]]  # losses of samples and their classes, where somebody wants them


class _Kept(Extras):
    """Keeps the losses of the samples for the client, who makes of them what was asked for."""

    def __init__(self, job: Job, plan: Plan) -> None:
        super().__init__(job, plan)
        self.chunks: list[tuple[Array, Array | None]] = []

    def add(self, losses: Array | None, target: Array | None) -> None:
        if losses is not None:
            self.chunks.append((losses.copy(), np.array(target) if self._indices else None))


def evaluate_rows(start: int, size: int, job: Job, shapes: dict[str, Any]) -> Part:
    """A worker's task: `size` rows from `start` on, or what is left of them."""
    from fastloss.backends.dask_blocks import one_thread

    try:
        with opened(job) as plan, one_thread():
            for role, expected in shapes.items():
                if plan.shapes[role] != expected:
                    raise InputError(
                        f"{job.files[role]}: has {plan.shapes[role]} on a worker, expected {expected} as here"
                    )
            meter, kept = plan.meter(), _Kept(job, plan)
            stop = min(start + size, plan.rows)
            plan.skip(start)
            for _ in plan.stream(meter, kept, start, stop):
                pass
            return Part(meter, stop - start, kept.chunks)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror} on a worker, which must see it as well") from None


def run(job: Job, plan: Plan, meter: Meter, extras: Extras, progress: Callable[[int, int], None]) -> None:
    """Adds all rows to the meter and the extras; `progress` hears bytes done and all."""
    address, size = str(job.scheduler), _range(plan)
    starts = range(0, max(plan.rows, 1), size)  # no rows are one empty chunk: types are checked
    files = {role: os.path.abspath(spec) for role, spec in job.files.items()}  # workers have folders of their own
    sent = replace(job, files=files, scheduler=None)
    done = 0

    def heard(part: Part) -> None:
        nonlocal done
        done += part.rows
        progress(plan.row_bytes * done, plan.row_bytes * plan.rows)

    with _connected(address) as client, _explained(address):
        progress(0, plan.row_bytes * plan.rows)
        tasks = client.map(evaluate_rows, starts, size=size, job=sent, shapes=plan.shapes, pure=False)
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
        for part in _in_order(client, tasks, heard):
            meter.merge(part.meter)
            for losses, target in part.chunks:
                extras.add(losses, target)


def _range(plan: Plan) -> int:
    """The rows of a task: a chunk in whole pieces of what the input's file decodes at once, at least one of them."""
    grain = plan.streamed["input"].grain
    return max(grain, plan.step // grain * grain)


def _in_order(client: Any, tasks: list[Any], heard: Callable[[Part], None]) -> Iterator[Part]:
    """The tasks' parts in the order of the tasks; `heard` is told of each as it comes."""
    from distributed import as_completed

    numbers = {task.key: number for number, task in enumerate(tasks)}
    found: dict[int, Part | InputError] = {}
    wanted = 0
    for task in as_completed(tasks, loop=client.loop):
        try:
            part = task.result()
            heard(part)
        except InputError as error:  # of several the one of the first row is raised, whoever was faster
            part = error
        found[numbers[task.key]] = part
        task.release()
        while wanted in found:
            part = found.pop(wanted)
            if isinstance(part, InputError):
                raise part
            yield part
            wanted += 1


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """A client of the scheduler at that address."""
    with needed("distributed", by="--scheduler", extra="dask", error=InputError):
        import distributed
    logging.getLogger("distributed").handlers = [logging.NullHandler()]  # an error is one line, and ours
    try:
        distributed.comm.get_address_host_port(address)  # a client would try even what is no address
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--scheduler {address}: no Dask scheduler answers: {reason}") from None
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """What can happen on a cluster, in one line."""
    from distributed import KilledWorker

    try:
        yield
    except InputError as error:  # workers know files by their absolute names
        raise InputError(str(error).replace(os.getcwd() + os.sep, "")) from None
    except KilledWorker:
        raise InputError(
            f"--scheduler {address}: several workers were lost over the same rows, one after the other; with a smaller "
            "--chunk-mb they need less memory"
        ) from None
    except (TimeoutError, CancelledError) as error:
        raise InputError(f"--scheduler {address}: {error}") from None
    except ImportError as error:
        raise InputError(f"--scheduler {address}: a worker lacks a library: {error}") from None
