"""Drivers: they run a kernel over one chunk of a task, whose arrays may have any layout.

A kernel sees native memory with one stride only. What is laid out otherwise (strided, broadcast, byte-swapped) passes
through scratch that stays in the nearest caches. A driver is a C function of (block, chunk); the block of 64-bit
integers describes the task (see `records`). It is compiled like a kernel, so that serial calls need no Numba.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from llvmlite import ir

from . import compiler
from .pointwise import SUMS as SUMS_NAMES
from .records import (
    ADDRESS,
    ALIGNMENT,
    ALLOCATE,
    ARRAYS,
    BODY,
    CLASS_STEP,
    DIRECT,
    FREE,
    FUNCTION,
    GRAD,
    INDEX,
    ITEMSIZE,
    LOSSES,
    LSE,
    MASS,
    N_ARRAYS,
    N_CLASSY,
    N_RECORDS,
    N_SOURCES,
    NDIM,
    PARAMETERS,
    PER_CHUNK,
    STRIDES,
    SUMS,
    SWAP,
    TEMPLATE,
    TOTAL,
)
from .values import F64, I8, I16, I32, I64, LANES, SIZE, Value, full, loop, when

FIRST_STEP, FIRST_ROW = ARRAYS.index("logits_step"), ARRAYS.index("logits_row")
FIRST_SAMPLE, CLASSES, SCRATCH = (ARRAYS.index(name) for name in ("index", "classes", "scratch"))
STAGE = 1024  # pointwise elements staged at a time: five float64 operands fill 40 KB
SUM_BYTES = 64  # a chunk's row of sums: a cache line of its own
WORD = 8  # bytes of a field, and of the widest element
WRITTEN = (LOSSES, LSE, MASS)  # of what each sample has one of


def _void(function: Value, *arguments: Value) -> None:
    """Call the C function at an address, which takes 64-bit integers and returns nothing."""
    b = function.b
    type_ = ir.FunctionType(ir.VoidType(), [I64] * len(arguments))
    b.call(b.inttoptr(function.v, type_.as_pointer()), [argument.v for argument in arguments])


class _Block:
    """A task's block, read while the driver runs."""

    def __init__(self, block: Value) -> None:
        self.block = block
        self.zero = Value(block.b, I64(0))
        self.ndim = self.field(NDIM)
        self.extents = block + 8 * BODY
        self.inner = (self.extents + 8 * (self.ndim - 1)).load(I64)

    def field(self, k: int) -> Value:
        return (self.block + 8 * k).load(I64)

    def record(self, k: int | Value) -> _Record:
        """The description of array k."""
        return _Record(self, self.extents + 8 * (self.ndim + (self.ndim + STRIDES) * k))

    def bounds(self, chunk: Value) -> tuple[Value, Value]:
        """The first element of a chunk and the one after its last."""
        start = chunk * self.field(PER_CHUNK)
        return start, (start + self.field(PER_CHUNK)).at_most(self.field(TOTAL))

    def sums(self, chunk: Value) -> Value:
        return self.field(SUMS) + chunk * SUM_BYTES

    def with_memory(self, nbytes: Value, chunk: Value, body: Callable[[Value], None]) -> None:
        """`body(address)` of memory of its own, aligned to a cache line; without it "invalid" is NaN."""
        b = self.block.b
        allocate, free = self.field(ALLOCATE), self.field(FREE)
        type_ = ir.FunctionType(I64, [I64])
        memory = Value(b, b.call(b.inttoptr(allocate.v, type_.as_pointer()), [(nbytes + 64).v]))

        def usable() -> None:
            body((memory + 63) & -64)
            _void(free, memory)

        def none() -> None:
            (self.sums(chunk) + 8 * SUMS_NAMES.index("invalid")).store(full(b, F64, 1, float("nan")))

        when(memory != 0, usable, none)


class _Record:
    """An array of the block."""

    def __init__(self, block: _Block, address: Value) -> None:
        self.block, self.base = block, address
        self.address, self.itemsize, self.direct, self.swap, self.class_step = (
            (address + 8 * k).load(I64) for k in (ADDRESS, ITEMSIZE, DIRECT, SWAP, CLASS_STEP)
        )
        self.strides = address + 8 * STRIDES
        self.step = (self.strides + 8 * (block.ndim - 1)).load(I64)

    def offset(self, index: Value) -> Value:
        """Bytes from the start of the array to its element `index` in C order."""

        def outward(j: Value, index: Value, offset: Value) -> list[Value]:
            k = self.block.ndim - 1 - j
            extent = (self.block.extents + 8 * k).load(I64)
            return [index // extent, offset + index % extent * (self.strides + 8 * k).load(I64)]

        zero = self.block.zero
        return loop(zero, self.block.ndim, 1, [index, zero], outward)[1][1]

    def stage(self, first: Value, start: Value, n: Value, scratch: Value, step: Value, inward: bool) -> None:
        """Copy elements start .. start + n between the array, taken to begin at `first`, and scratch."""
        b = self.block.block.b
        inner = self.block.inner

        def run(done: Value) -> Value:
            index = start + done
            many = (n - done).at_most(inner - index % inner)
            there, here = first + self.offset(index), scratch + done * step
            if inward:
                self.copy(there, self.step, here, step, many)
            else:
                self.copy(here, step, there, self.step, many)
            return done + many

        _while(b, self.block.zero, n, run)

    def copy(self, source: Value, from_step: Value, target: Value, to_step: Value, n: Value) -> None:
        """Copy n elements from stride to stride, reversing their bytes where the array's are reversed."""
        arguments = (source, from_step, target, to_step, n, self.itemsize, self.swap)
        _void(Value(source.b, source.b.ptrtoint(_copier(source.b.module), I64)), *arguments)


def _while(b: ir.IRBuilder, start: Value, stop: Value, body: Callable[[Value], Value]) -> None:
    """`while i < stop: i = body(i)`."""
    before = b.block
    head, inside, after = (b.append_basic_block(name) for name in ("while", "do", "done"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(start.v, before)
    b.cbranch(b.icmp_signed("<", i, stop.v), inside, after)
    b.position_at_end(inside)
    following = body(Value(b, i))
    i.add_incoming(following.v, b.block)
    b.branch(head)
    b.position_at_end(after)


def _copier(module: ir.Module) -> ir.Function:
    """`copy(source, from_step, target, to_step, n, itemsize, swap)`, one function of the driver's module."""
    if "copy" in module.globals:
        return module.globals["copy"]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 7), "copy")
    function.linkage = "internal"
    b = ir.IRBuilder(function.append_basic_block("entry"))
    source, from_step, target, to_step, n, itemsize, swap = (Value(b, argument) for argument in function.args)

    def copy(elem: ir.Type, reverse: bool) -> None:
        def body(i: Value) -> None:
            value = (source + i * from_step).load(elem, align=1)
            value = Value(b, b.bswap(value.v)) if reverse else value
            (target + i * to_step).store(value, align=1)

        loop(Value(b, I64(0)), n, 1, [], body)

    for elem in (I8, I16, I32, I64):

        def both(elem: ir.Type = elem) -> None:
            if elem == I8:
                copy(elem, False)
            else:
                when(swap == 1, lambda: copy(elem, True), lambda: copy(elem, False))

        when(itemsize == SIZE[elem], both)
    b.ret_void()
    return function


def _pointwise(block: Value, chunk: Value) -> None:
    """One chunk of a pointwise loss: all at once where every array is direct, else `STAGE` elements at a time."""
    task, b = _Block(block), block.b
    n_arrays, n_sources, alignment = task.field(N_ARRAYS), task.field(N_SOURCES), task.field(ALIGNMENT)
    start, stop = task.bounds(chunk)
    zero, one = task.zero, task.zero + 1
    _, (direct,) = loop(zero, n_arrays, 1, [one], lambda k, all_: [all_ & task.record(k).direct])

    def work(memory: Value) -> None:
        def piece(start: Value) -> Value:
            n = (stop - start).at_most((direct == 1).select(stop, STAGE))

            def whole_vectors() -> list[Value]:
                # streaming stores: the elements before the first aligned vector go alone
                last = task.record(n_arrays - 1)
                before = (zero - (last.address + start * last.itemsize)) & (alignment - 1)
                before = before // last.itemsize
                return [(before == 0).select(n, before.at_most(n))]

            (n,) = when(alignment != 0, whole_vectors, lambda: [n])

            def scratch(k: Value) -> Value:
                return memory + 8 * (n_arrays + k * STAGE)

            def read(k: Value) -> None:
                record = task.record(k)

                def staged() -> list[Value]:
                    here, step = scratch(k), record.itemsize
                    when(k < n_sources, lambda: record.stage(record.address, start, n, here, step, True))
                    return [scratch(k)]

                (at,) = when(record.direct == 1, lambda: [record.address + start * record.itemsize], staged)
                (memory + 8 * k).store(at)

            def write(k: Value) -> None:
                record = task.record(k)
                when(
                    record.direct == 0,
                    lambda: record.stage(record.address, start, n, scratch(k), record.itemsize, False),
                )

            loop(zero, n_arrays, 1, [], read)
            _void(task.field(FUNCTION), n, memory, task.field(PARAMETERS), task.sums(chunk))
            loop(n_sources, n_arrays, 1, [], write)
            return start + n

        _while(b, start, stop, piece)

    task.with_memory(8 * (n_arrays + (direct == 1).select(zero, n_arrays * STAGE)), chunk, work)


class _Samples:
    """One chunk of a row loss. Kernels with lanes along samples want sixteen at least: what is left over of a chunk, or
    of a dimension, passes through scratch, where there is room for as many."""

    def __init__(self, layout: str, n_records: int, block: Value, chunk: Value) -> None:
        self.task, self.chunk, self.b = _Block(block), chunk, block.b
        # how scratch is laid out: a row for each sample, or for each class
        self.by_row = layout not in ("tile", "planes")
        self.padded = layout != "rows"
        self.template = self.task.field(TEMPLATE)
        self.classes = (self.template + 8 * CLASSES).load(I64)
        self.records = [self.task.record(k) for k in range(n_records)]
        zero, one = self.task.zero, self.task.zero + 1
        present = [record.itemsize != 0 for record in self.records]
        self.present = present
        # whether any array, and whether any with classes, has to be staged throughout
        self.staged = zero
        for here, record in zip(present, self.records, strict=True):
            self.staged = (here & (record.direct == 0)).select(one, self.staged)
        # samples staged at a time
        self.room = (self.staged == 1).select(self.task.field(PER_CHUNK), LANES if self.padded else 1)

    def emit(self) -> None:
        """Write the driver."""
        task = self.task
        start, stop = task.bounds(self.chunk)
        n_staged = task.zero  # arrays with classes that may be staged
        for here, record in zip(self.present[:N_CLASSY], self.records[:N_CLASSY], strict=True):
            n_staged = n_staged + (here if self.padded else here & (record.direct == 0)).zext(I64)
        slots = 8 * len(ARRAYS)
        column = self.room * WORD  # of samples
        columns = len(self.records) - N_CLASSY
        array = self.classes * self.room * WORD
        kernels = (self.template + 8 * SCRATCH).load(I64)
        nbytes = slots + column * columns + array * n_staged + kernels + 2 * 64

        def work(memory: Value) -> None:
            samples = memory + slots
            staged = (samples + column * columns + 63) & -64

            def slot(k: Value) -> None:
                (memory + 8 * k).store((self.template + 8 * k).load(I64))

            loop(task.zero, task.zero + len(ARRAYS), 1, [], slot)
            (memory + 8 * SCRATCH).store((staged + array * n_staged + 63) & -64)

            def piece(start: Value) -> Value:
                left = (stop - start).at_most(task.inner - start % task.inner)  # of the innermost dimension
                # 0: in place, 1: arrays that are not direct in scratch, 2: all of them
                if self.padded:
                    whole = left & -LANES
                    few = whole == 0
                    n = few.select((stop - start).at_most(LANES), whole)
                else:
                    few, n = left < 0, left
                n = (self.staged == 1).select(n.at_most(self.room), n)
                here = staged
                for k in range(len(self.records)):
                    here = self.place(k, start, n, few, memory, samples + (k - N_CLASSY) * column, here)
                _void(task.field(FUNCTION), n, memory, task.field(PARAMETERS), task.sums(self.chunk))
                for k in (*range(GRAD, INDEX), *(k for k in WRITTEN if k < len(self.records))):
                    self.hand_back(k, start, n, few, memory)
                return start + n

            _while(self.b, start, stop, piece)

        task.with_memory(nbytes, self.chunk, work)

    def moved(self, k: int, few: Value) -> Value:
        """Whether array k passes through scratch."""
        return self.present[k] & ((self.records[k].direct == 0) | few)

    def place(self, k: int, start: Value, n: Value, few: Value, memory: Value, column: Value, here: Value) -> Value:
        """Tell the kernel where n samples of array k are, staged at `here` or `column` where they must be; gives where
        the next array may be staged."""
        record, classy = self.records[k], k < N_CLASSY
        slot = memory + 8 * (k if classy else FIRST_SAMPLE + k - N_CLASSY)

        def put(at: Value, step: Value, row: Value) -> list[Value]:
            slot.store(at)
            if classy:
                (memory + 8 * (FIRST_STEP + k)).store(step)
                (memory + 8 * (FIRST_ROW + k)).store(row)
            return []

        def through_scratch() -> list[Value]:
            if not classy:
                put(column, here, here)
                if k not in WRITTEN:
                    record.stage(record.address, start, n, column, record.itemsize, True)
                return [here]
            step, row = self.scratch_steps(k)
            put(here, step, row)
            if k < GRAD:
                self.stage_classes(k, start, n, here, True)
            return [here + self.classes * self.room * WORD]

        def in_place() -> list[Value]:
            if classy:
                put(record.address + record.offset(start), record.class_step, record.step)
            else:
                put(record.address + start * record.itemsize, here, here)
            return [here]

        return when(
            self.present[k], lambda: when(self.moved(k, few), through_scratch, in_place), lambda: [here]
        )[0]

    def scratch_steps(self, k: int) -> tuple[Value, Value]:
        """Bytes from class to class and from sample to sample in scratch."""
        itemsize = self.records[k].itemsize
        return (itemsize, self.classes * itemsize) if self.by_row else (self.room * itemsize, itemsize)

    def stage_classes(self, k: int, start: Value, n: Value, here: Value, inward: bool) -> None:
        """Copy the classes of n samples between array k and scratch."""
        record = self.records[k]
        step, row = self.scratch_steps(k)

        def classwise(c: Value) -> None:
            record.stage(record.address + c * record.class_step, start, n, here + c * step, row, inward)

        def samplewise(i: Value) -> None:
            there, mine = record.address + record.offset(start + i), here + i * row
            if inward:
                record.copy(there, record.class_step, mine, step, self.classes)
            else:
                record.copy(mine, step, there, record.class_step, self.classes)

        if self.by_row:
            loop(self.task.zero, n, 1, [], samplewise)
        else:
            loop(self.task.zero, self.classes, 1, [], classwise)

    def hand_back(self, k: int, start: Value, n: Value, few: Value, memory: Value) -> None:
        """Copy what the kernel wrote to scratch to array k."""
        record = self.records[k]
        slot = memory + 8 * (k if k < N_CLASSY else FIRST_SAMPLE + k - N_CLASSY)

        def back() -> None:
            if k < N_CLASSY:
                self.stage_classes(k, start, n, slot.load(I64), False)
            else:
                record.stage(record.address, start, n, slot.load(I64), record.itemsize, False)

        when(self.moved(k, few), back)


@cache
def driver(layout: str, n_records: int = N_RECORDS) -> int:
    """Address of the driver for "pointwise", or for a layout of `softmax.KERNELS` and so many records."""

    def emit(block: Value, chunk: Value) -> None:
        if layout == "pointwise":
            _pointwise(block, chunk)
        else:
            _Samples(layout, n_records, block, chunk).emit()

    return compiler.compile_function(emit, 2, ("driver", layout, n_records))
