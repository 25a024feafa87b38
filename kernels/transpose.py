"""Sixteen rows of a few classes in memory: a vector for each class, a lane for each row, and back again.

Between the two lie quads, four vectors: lanes 4 q .. 4 q + 3 of the j-th hold four consecutive classes of row 4 q + j.
Sixteen short loads read a quad. All else is shuffles within groups of four lanes: float32 never crosses the 128-bit
halves of a register, and AVX2 transposes 64 numbers with 16 shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def folded_rows(rows: Sequence[Value]) -> Value:
    """Sixteen vectors to one: lane r has the sum of the lanes of vector r. 15 additions, two shuffles each."""
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


# ---- without quads: one shuffle of AVX-512 takes any lanes of two vectors of float32


def _factor(classes: int) -> int:
    """The least prime factor."""
    return next(k for k in range(2, classes + 1) if classes % k == 0)


def _shuffles(classes: int) -> int:
    """How many shuffles `_unzipped` takes for so many vectors, and `_zipped`."""
    if classes == 1:
        return 0
    factor = _factor(classes)
    return classes * (factor - 1) + factor * _shuffles(classes // factor)


def _by_lanes(classes: int, like: Value) -> bool:
    """Whether whole vectors are shuffled rather than quads: those take 20 shuffles and insertions each, of
    which two are as fast as one of these."""
    if like.elem != F32 or not like.may_use("avx512"):
        return False
    return classes < QUAD or 2 * _shuffles(classes) < 20 * len(starts(classes))


def _gathered(vectors: Sequence[Value], places: Sequence[Place]) -> Value:
    """A vector whose lane k is what lies at `places[k]`: which vector, which of its lanes."""
    first, *others = sorted({v for v, _ in places})
    out = vectors[first].shuffle(None, [lane if v == first else 0 for v, lane in places])
    for k in others:
        out = out.shuffle(vectors[k], [LANES + lane if v == k else at for at, (v, lane) in enumerate(places)])
    return out


def _unzipped(vectors: Sequence[Value]) -> list[Value]:
    """Sixteen rows, one behind the other, as a vector for each class."""
    classes = len(vectors)
    if classes == 1:
        return list(vectors)
    factor = _factor(classes)
    parts = [_unzipped(part) for part in _strided(vectors, factor)]
    return [parts[c % factor][c // factor] for c in range(classes)]


def _zipped(vectors: Sequence[Value]) -> list[Value]:
    """The reverse of `_unzipped`."""
    classes = len(vectors)
    if classes == 1:
        return list(vectors)
    factor = _factor(classes)
    parts = [vector for k in range(factor) for vector in _zipped(vectors[k::factor])]
    each = classes // factor

    def place(element: int) -> Place:
        k, lane = divmod(element // factor, LANES)
        return element % factor * each + k, lane

    return [_gathered(parts, [place(LANES * v + lane) for lane in range(LANES)]) for v in range(classes)]


def _strided(vectors: Sequence[Value], factor: int) -> list[list[Value]]:
    """Rows, one behind the other, as `factor` such arrays: the k-th has every row's classes k, k + factor, ..."""
    each = len(vectors) // factor
    return [
        [
            _gathered(vectors, [divmod((LANES * v + lane) * factor + k, LANES) for lane in range(LANES)])
            for v in range(each)
        ]
        for k in range(factor)
    ]


def packed_sums(vectors: Sequence[Value]) -> Value:
    """The sum of each of sixteen rows that lie one behind the other, in the order of `row_sums`."""
    while len(vectors) > 1:
        parts = _strided(vectors, _factor(len(vectors)))
        vectors = [sum(others, first) for first, *others in zip(*parts, strict=True)]
    return vectors[0]


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


def packed_sums_pay(classes: int, like: Value) -> bool:
    """Whether `packed_sums` of so many vectors takes no more shuffles than quads that are transposed."""
    return like.may_use("avx512") and 2 * _shuffles(classes) <= 20 * len(starts(max(classes, QUAD)))


def load_classes(address: Value, classes: int, elem: ir.Type, read: Convert) -> list[Value]:
    """A vector for each class of sixteen rows that lie one behind the other; nothing else is read."""
    size = SIZE[elem]
    whole = [read((address + c * LANES * size).load(elem, LANES)) for c in range(classes)]
    if _by_lanes(classes, whole[0]):
        return _unzipped(whole)
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
        for c, vector in enumerate(_zipped(vectors)):
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
