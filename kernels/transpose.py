"""Sixteen rows of a few classes in memory: a vector for each class, a lane for each row, and back again.

Between the two lie quads, four vectors: lanes 4 q .. 4 q + 3 of the j-th hold four consecutive classes of row 4 q + j.
Sixteen short loads read a quad. All else is shuffles within groups of four lanes: float32 never crosses the 128-bit
halves of a register, and AVX2 transposes 64 numbers with 16 shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from .values import I1, LANES, SIZE, Value, full_of, joined

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


def folded_rows(rows: Sequence[Value]) -> Value:
    """Sixteen vectors to one: lane r has the sum of the lanes of vector r. 15 additions, a select and a shuffle each."""
    distance = LANES // 2
    rows = list(rows)
    while distance:
        lanes = range(LANES)
        upper = full_of(rows[0].b, I1, [k & distance != 0 for k in lanes])
        rows = [
            # of a the lanes that stay, of b those that do; beside them the others, moved to where these are
            upper.select(b, a) + upper.select(a, b).shuffle(None, [k ^ distance for k in lanes])
            for a, b in zip(rows[:distance], rows[distance:], strict=True)
        ]
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


def starts(classes: int) -> list[int]:
    """First classes of the quads that cover a row of at least four; the last one may overlap the one before it."""
    return [*range(0, classes - QUAD, QUAD), classes - QUAD]


def load_classes(address: Value, classes: int, elem: ir.Type, read: Convert) -> list[Value]:
    """A vector for each class of sixteen rows that lie one behind the other; nothing else is read."""
    size = SIZE[elem]
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
