"""Sixteen rows of a few classes in memory: a vector for each class, a lane for each row, and back again.

AVX-512 reads whole vectors, moves numbers between them in their lanes, and puts these in order by one shuffle a vector.

Elsewhere quads lie between the two, four vectors: lanes 4 q .. 4 q + 3 of the j-th hold four consecutive classes of row
4 q + j. Sixteen short loads read a quad. All else is shuffles within groups of four lanes: float32 never crosses the
128-bit halves of a register, and AVX2 transposes 64 numbers with 16 shuffles. To turn registers of AVX2 as those of
AVX-512 gained 3% for odd numbers of classes, and lost as much for even ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from llvmlite import ir

from .values import F32, I1, LANES, SIZE, Value, full_of, joined

QUAD = 4  # lanes of a group, vectors of a quad
GROUPS = range(LANES // QUAD)

Convert = Callable[[Value], Value]
Place = tuple[int, int]  # which of some vectors, which lane of a group


def _part(vector: Value, q: int) -> Value:
    """The q-th group of lanes."""
    return vector.shuffle(None, range(QUAD * q, QUAD * (q + 1)))


def _picked(vectors: Sequence[Value], places: Sequence[Place]) -> Value:
    """A vector that has in lane p of every group what lies there at `places[p]`."""

    def merged(out: Value, k: int, offset: int) -> Value:
        """`out` with what comes from vector k put in place; of the two, `offset` tells where k's lanes begin."""
        group = [offset + lane if source == k else p for p, (source, lane) in enumerate(places)]
        return out.shuffle(vectors[k] if offset else None, [p + QUAD * q for q in GROUPS for p in group])

    first, *others = sorted({k for k, _ in places})
    out = merged(vectors[first], first, 0)
    for k in others:
        out = merged(out, k, LANES)
    return out


def transposed(quad: Sequence[Value]) -> list[Value]:
    """Lane i of each group of vector j becomes lane j of vector i: a quad as four classes, or the reverse."""
    halves = [
        _picked(quad[j : j + 2], [(0, i), (1, i), (0, i + 1), (1, i + 1)]) for i in (0, 2) for j in (0, 2)
    ]  # classes i and i + 1 of rows 4 q + j and 4 q + j + 1
    return [_picked(halves[i : i + 2], [(0, k), (0, k + 1), (1, k), (1, k + 1)]) for i in (0, 2) for k in (0, 2)]


def folded(quad: Sequence[Value], combine: Callable[[Value, Value], Value]) -> Value:
    """Each row's four numbers combined pairwise, row r's in lane r."""
    a, b, c, d = transposed(quad)
    return combine(combine(a, b), combine(c, d))


def _neighbours_added(a: Value, b: Value, distance: int) -> Value:
    """Sums of lanes so far apart: those of a stay where a bit of the lane's number is 0, those of b where it is 1."""
    lanes = range(LANES)
    upper = full_of(a.b, I1, [k & distance != 0 for k in lanes])
    # beside them the others, moved to where these are
    return upper.select(b, a) + upper.select(a, b).shuffle(None, [k ^ distance for k in lanes])


def folded_rows(rows: Sequence[Value]) -> Value:
    """Sixteen vectors to one: lane r has the sum of the lanes of vector r. 15 additions, and a shuffle each."""
    distance = LANES // 2
    while distance:
        pairs = zip(rows[:distance], rows[distance:], strict=True)
        rows = [_neighbours_added(a, b, distance) for a, b in pairs]
        distance //= 2
    return rows[0]


def spread(rows: Value) -> list[Value]:
    """Row r's number, from lane r, in all lanes that belong to row r: a quad."""
    return [_picked([rows], [(0, j)] * QUAD) for j in range(QUAD)]


def load_quad(address: Value, step: int | Value, elem: ir.Type, read: Convert) -> list[Value]:
    """Four consecutive elements of each of sixteen rows, which lie `step` bytes apart, the first at `address`.

    `read` turns vectors as they lie in memory into numbers.
    """
    rows = [[(address + (QUAD * q + j) * step).load(elem, QUAD) for q in GROUPS] for j in range(QUAD)]
    return [read(joined(parts)) for parts in rows]


def store_quad(address: Value, step: int | Value, quad: Sequence[Value], write: Convert) -> None:
    """The reverse of `load_quad`."""
    for j, vector in enumerate(quad):
        raw = write(vector)
        for q in GROUPS:
            (address + (QUAD * q + j) * step).store(_part(raw, q))


# ---- without quads: in registers of sixteen float32, which any shuffle crosses

Layout = list[list[tuple[int, int]]]  # of vectors: the row and the class of what lies in each lane


def _packed(classes: int) -> Layout:
    """Sixteen rows, one behind the other."""
    return [[divmod(LANES * v + lane, classes) for lane in range(LANES)] for v in range(classes)]


def _rotated(layout: Layout, width: int) -> list[Layout]:
    """Steps after which each vector has one group of `width` neighbouring classes, the same in all lanes. There is an
    odd number of groups, and vectors of all classes of some rows are neighbours.

    In every lane groups follow one another in the same order from vector to vector, but begin with another one. Numbers
    move through the vectors by as many as their lane is late, by 1, 2, 4, ... in a step. What stays in its lane is only
    blended with another vector: every pipe of a processor does that, and a shuffle one or two.
    """
    lanes, odd = range(LANES), len(layout) // width
    late = [next(v for v in range(odd) if layout[v][lane][1] < width) for lane in lanes]
    steps = [layout]
    for distance in (1 << bit for bit in range((odd - 1).bit_length())):
        layout = [
            [layout[v // odd * odd + (v + (late[lane] & distance)) % odd][lane] for lane in lanes]
            for v in range(len(layout))
        ]
        steps.append(layout)
    return steps


def _steps(classes: int) -> list[Layout]:
    """From packed rows to a vector for each class; of two vectors of a step, at most, is each of the next made."""
    width = classes & -classes
    steps = _rotated(_packed(classes), width)
    while width > 2:  # halve the groups, as if these were all of a row
        layout = sorted(steps[-1], key=lambda places: (places[0][1] // width, places))
        width //= 2
        pairs = [sorted(a + b) for a, b in zip(layout[::2], layout[1::2], strict=True)]
        steps.append([[at for at in pair if at[1] // width % 2 == half] for pair in pairs for half in (0, 1)])
    return [*steps, [[(row, c) for row in range(LANES)] for c in range(classes)]]


def _moved(vectors: Sequence[Value], steps: Sequence[Layout]) -> list[Value]:
    """What lies as in the first step, as in the last."""
    for before, after in pairwise(steps):
        found = {place: (v, lane) for v, places in enumerate(before) for lane, place in enumerate(places)}
        vectors = [_gathered(vectors, [found[place] for place in places]) for places in after]
    return list(vectors)


def _gathered(vectors: Sequence[Value], sources: Sequence[Place]) -> Value:
    """A vector whose lane k is what lies at `sources[k]`, in two vectors at most: which vector, which of its lanes."""
    first, *others = sorted({v for v, _ in sources})
    other = vectors[others[0]] if others else None
    return vectors[first].shuffle(other, [lane if v == first else LANES + lane for v, lane in sources])


def _by_lanes(classes: int, like: Value) -> bool:
    """Whether whole vectors are shuffled rather than quads; of 32 classes sixteen rows are too many for `_steps`."""
    return like.elem == F32 and like.may_use("avx512") and classes < 2 * LANES


def _factor(classes: int) -> int:
    """The least prime factor."""
    return next(k for k in range(2, classes + 1) if classes % k == 0)


def packed_sums(vectors: Sequence[Value]) -> Value:
    """The sum of each of sixteen packed rows, in the order of `row_sums`."""
    rows = list(range(LANES))  # of what lies in the lanes of the first vector, were rows of one class
    while len(vectors) > 1:
        factor = _factor(len(vectors))
        # so many vectors hold sixteen rows of as many classes, all in the same order
        groups = [vectors[v : v + factor] for v in range(0, len(vectors), factor)]
        if factor == 2:
            distance = rows.index(1)  # from row 0
            vectors = [_neighbours_added(a, b, distance) for a, b in groups]
            rows = [(row + (LANES if lane & distance else 0)) // 2 for lane, row in enumerate(rows)]
            continue
        layout = [[divmod(LANES * v + row, factor) for row in rows] for v in range(factor)]
        steps = _rotated(layout, 1)
        rows = [row for row, _ in next(places for places in steps[-1] if places[0][1] == 0)]
        steps.append([[(row, c) for row in rows] for c in range(factor)])
        vectors = [row_sums(_moved(group, steps)) for group in groups]
    return vectors[0].shuffle(None, [rows.index(row) for row in range(LANES)])


def row_sums(classes: Sequence[Value]) -> Value:
    """The sum of a vector for each class."""
    while len(classes) > 1:
        factor = _factor(len(classes))
        classes = [sum(classes[k + 1 : k + factor], classes[k]) for k in range(0, len(classes), factor)]
    return classes[0]


# ---- by either


def starts(classes: int) -> list[int]:
    """First classes of the quads that cover a row of at least four; the last one may overlap the one before it."""
    return [*range(0, classes - QUAD, QUAD), classes - QUAD]


def load_classes(address: Value, classes: int, elem: ir.Type, read: Convert) -> list[Value]:
    """A vector for each class of sixteen rows that lie one behind the other; nothing else is read."""
    size = SIZE[elem]
    whole = [read((address + c * LANES * size).load(elem, LANES)) for c in range(classes)]
    if _by_lanes(classes, whole[0]):
        return _moved(whole, _steps(classes))
    if classes < QUAD:
        chunks = _load_chunks(address, classes, elem, read)
        return [_picked(chunks, [divmod(classes * j + c, QUAD) for j in range(QUAD)]) for c in range(classes)]
    out: list[Value] = []
    for first in starts(classes):
        new = transposed(load_quad(address + first * size, classes * size, elem, read))
        out += new[len(out) - first :]
    return out


def store_classes(address: Value, vectors: Sequence[Value], elem: ir.Type, write: Convert) -> None:
    """The reverse of `load_classes`."""
    classes, size = len(vectors), SIZE[elem]
    if _by_lanes(classes, vectors[0]):
        for c, vector in enumerate(_moved(vectors, _steps(classes)[::-1])):
            (address + c * LANES * size).store(write(vector))
        return
    if classes < QUAD:
        for k in range(classes):
            places = [divmod(QUAD * k + p, classes)[::-1] for p in range(QUAD)]
            raw = write(_picked(vectors, places))
            for q in GROUPS:
                (address + (QUAD * (classes * q + k)) * size).store(_part(raw, q))
        return
    for first in starts(classes):
        quad = transposed(vectors[first : first + QUAD])
        store_quad(address + first * size, classes * size, quad, write)


def _load_chunks(address: Value, classes: int, elem: ir.Type, read: Convert) -> list[Value]:
    """Rows shorter than a quad's: group q of the k-th vector holds the elements 4 k .. 4 k + 3 of rows 4 q .. 4 q + 3,
    counted through."""
    size = SIZE[elem]
    return [
        read(joined([(address + QUAD * (classes * q + k) * size).load(elem, QUAD) for q in GROUPS]))
        for k in range(classes)
    ]
