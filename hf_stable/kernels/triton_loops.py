"""The passes over weights as Triton kernels: a chunk of rows of one part for each program.

Imports triton: on first use only (`gpu`). Tensors come as addresses in tables of integers, so that
one launch covers all weights whose rows are of about one length. What a chunk adds to
`z = W.T (W v)` is kept apart and summed in the order of the chunks, without atomic operations, so
a run repeats bit for bit. Nothing is read back to the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "clip_parts",
    "iterate_chunks",
    "move_chunks",
    "settle_parts",
    "update_chunks",
    "write_left_vectors",
]

# The table of weights: addresses, then the length of a row in memory, and whether it is a vector.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
FIRST = tl.constexpr(2)
SECOND = tl.constexpr(3)
EXEMPT = tl.constexpr(4)
RATE = tl.constexpr(5)
WEIGHT_V = tl.constexpr(6)
UPDATE_V = tl.constexpr(7)
WEIGHT_U = tl.constexpr(8)
WIDTH = tl.constexpr(9)
IS_VECTOR = tl.constexpr(10)
WEIGHT_SIZE = tl.constexpr(11)

# The table of chunks: a range of rows and of columns, which belong to one part. Where its sums and
# its products are kept, and which row of the part its first row is.
PART = tl.constexpr(0)
ROW = tl.constexpr(1)
END_ROW = tl.constexpr(2)
COLUMN = tl.constexpr(3)
END_COLUMN = tl.constexpr(4)
SUM_AT = tl.constexpr(5)
PRODUCT_AT = tl.constexpr(6)
PART_ROW = tl.constexpr(7)
CHUNK_SIZE = tl.constexpr(8)

# The table of parts: the weight, which of its parts it is, where its vectors start in those of the
# weight, how long the right one is (0 for a weight that is a vector, which has none to move), and
# its chunks.
OWNER = tl.constexpr(0)
PLACE = tl.constexpr(1)
V_AT = tl.constexpr(2)
U_AT = tl.constexpr(3)
LENGTH = tl.constexpr(4)
FIRST_CHUNK = tl.constexpr(5)
END_CHUNK = tl.constexpr(6)
PART_SIZE = tl.constexpr(7)

# The factors of a weight in a step.
SIGN = tl.constexpr(0)
NEW_FIRST = tl.constexpr(1)
KEEP_SECOND = tl.constexpr(2)
NEW_SECOND = tl.constexpr(3)
FIRST_SCALE = tl.constexpr(4)
ROOT_SCALE = tl.constexpr(5)
EPS = tl.constexpr(6)
DECAY = tl.constexpr(7)
LR = tl.constexpr(8)
TAU = tl.constexpr(9)
FACTORS = tl.constexpr(10)

# The values of a part: two sigmas, two squares of `|W v|`, two cosines between the vectors before
# and after an iteration, the rate.
OF_WEIGHT = tl.constexpr(0)
OF_UPDATE = tl.constexpr(1)
SQUARES = tl.constexpr(2)
COSINES = tl.constexpr(4)
CLIPPED = tl.constexpr(6)
VALUES = tl.constexpr(7)

TURNED = tl.constexpr(0.995)


@triton.jit
def _tensor(weights, owner, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(weights + owner * WEIGHT_SIZE + column)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def _offsets(chunk, row, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return offsets of a tile of a chunk from a row on, and which of them are in the chunk."""
    column, rows = tl.load(chunk + COLUMN), row + tl.arange(0, ROWS)
    if ALIGNED:
        column = tl.multiple_of(column, 8)
    columns = column + tl.arange(0, BLOCK)
    inside = (rows < tl.load(chunk + END_ROW))[:, None]
    inside = inside & (columns < tl.load(chunk + END_COLUMN))[None, :]
    starts = rows * width
    if ALIGNED:
        starts = tl.multiple_of(starts, 8)
    return starts[:, None] + columns[None, :], inside


@triton.jit
def _adam(first, second, factors):
    """Return Adam's update from the moments."""
    root = tl.sqrt(second) * tl.load(factors + ROOT_SCALE) + tl.load(factors + EPS)
    return first * tl.load(factors + FIRST_SCALE) / root


@triton.jit
def _v_of(weights, part, columns, MATRIX: tl.constexpr):
    """Return the addresses of the entries of a part's right vector."""
    column = WEIGHT_V if MATRIX == OF_WEIGHT else UPDATE_V
    address = tl.load(weights + tl.load(part + OWNER) * WEIGHT_SIZE + column)
    return address.to(tl.pointer_type(tl.float32)) + tl.load(part + V_AT) + columns


@triton.jit
def _add_rows(tile, v, z, squares, is_vector):
    """Iterate on a tile of rows; for a vector, sum squares."""
    y = tl.sum(tile * v[None, :], 1)
    z += tl.sum(tile * y[:, None], 0)
    square = tl.where(is_vector != 0, tl.sum(tl.sum(tile * tile, 1), 0), tl.sum(y * y, 0))
    return z, squares + square, y


@triton.jit
def _store_sums(sums, squares, chunk, index, matrix, area, z, square, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    length = tl.load(chunk + END_COLUMN) - tl.load(chunk + COLUMN)
    start = sums + matrix * area + tl.load(chunk + SUM_AT)
    tl.store(start + columns, z, mask=columns < length)
    tl.store(squares + 2 * index + matrix, square)


@triton.jit
def update_chunks(
    weights, chunks, parts, factors, sums, squares, begin, area,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Move the moments, and iterate on update and weight (Algorithm 1, lines 3 to 6)."""
    index = begin + tl.program_id(0)
    chunk = chunks + index * CHUNK_SIZE
    part = parts + tl.load(chunk + PART) * PART_SIZE
    owner, columns = tl.load(part + OWNER), tl.arange(0, BLOCK)
    factor = factors + owner * FACTORS
    width = tl.load(weights + owner * WEIGHT_SIZE + WIDTH)
    is_vector = tl.load(weights + owner * WEIGHT_SIZE + IS_VECTOR)
    param = _tensor(weights, owner, PARAM, DTYPE, ALIGNED)
    grad = _tensor(weights, owner, GRAD, DTYPE, ALIGNED)
    first = _tensor(weights, owner, FIRST, DTYPE, ALIGNED)
    second = _tensor(weights, owner, SECOND, DTYPE, ALIGNED)
    known = columns < tl.load(part + LENGTH)
    v = tl.load(_v_of(weights, part, columns, OF_WEIGHT), mask=known, other=0.0)
    update_v = tl.load(_v_of(weights, part, columns, OF_UPDATE), mask=known, other=0.0)
    z, update_z = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    square, update_square = 0.0, 0.0
    for row in range(tl.load(chunk + ROW), tl.load(chunk + END_ROW), ROWS):
        at, inside = _offsets(chunk, row, width, ROWS, BLOCK, ALIGNED)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * tl.load(factor + SIGN)
        m = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
        m = (m + (g - m) * tl.load(factor + NEW_FIRST)).to(DTYPE)
        s = s * tl.load(factor + KEEP_SECOND) + tl.load(factor + NEW_SECOND) * g * g
        s = s.to(DTYPE)
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, s, mask=inside)
        # From the moments as they are stored: the passes behind this one have no others.
        u = tl.where(inside, _adam(m.to(tl.float32), s.to(tl.float32), factor), 0.0)
        update_z, update_square, _ = _add_rows(u, update_v, update_z, update_square, is_vector)
        w = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
        z, square, _ = _add_rows(w, v, z, square, is_vector)
    _store_sums(sums, squares, chunk, index, OF_WEIGHT, area, z, square, BLOCK)
    _store_sums(sums, squares, chunk, index, OF_UPDATE, area, update_z, update_square, BLOCK)


@triton.jit
def iterate_chunks(
    weights, chunks, parts, factors, values, sums, squares, products, begin, area,
    MATRIX: tl.constexpr, TURNED_ONLY: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Iterate once more, on weights or on updates; on updates that have turned, if asked for."""
    index = begin + tl.program_id(0)
    chunk = chunks + index * CHUNK_SIZE
    part = parts + tl.load(chunk + PART) * PART_SIZE
    if TURNED_ONLY:
        if tl.load(values + tl.load(chunk + PART) * VALUES + COSINES + MATRIX) >= TURNED:
            return
    owner, columns = tl.load(part + OWNER), tl.arange(0, BLOCK)
    width = tl.load(weights + owner * WEIGHT_SIZE + WIDTH)
    if tl.load(weights + owner * WEIGHT_SIZE + IS_VECTOR) != 0:
        return
    known = columns < tl.load(part + LENGTH)
    v = tl.load(_v_of(weights, part, columns, MATRIX), mask=known, other=0.0)
    z, square = tl.zeros([BLOCK], tl.float32), 0.0
    begin_row = tl.load(chunk + ROW)
    for row in range(begin_row, tl.load(chunk + END_ROW), ROWS):
        at, inside = _offsets(chunk, row, width, ROWS, BLOCK, ALIGNED)
        if MATRIX == OF_UPDATE:
            first = _tensor(weights, owner, FIRST, DTYPE, ALIGNED)
            second = _tensor(weights, owner, SECOND, DTYPE, ALIGNED)
            m = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
            tile = tl.where(inside, _adam(m, s, factors + owner * FACTORS), 0.0)
        else:
            param = _tensor(weights, owner, PARAM, DTYPE, ALIGNED)
            tile = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
        z, square, y = _add_rows(tile, v, z, square, 0)
        if MATRIX == OF_WEIGHT:
            rows = row + tl.arange(0, ROWS)
            place = products + tl.load(chunk + PRODUCT_AT) + rows - begin_row
            tl.store(place, y, mask=rows < tl.load(chunk + END_ROW))
    _store_sums(sums, squares, chunk, index, MATRIX, area, z, square, BLOCK)


@triton.jit
def settle_parts(
    weights, chunks, parts, values, sums, squares, keep, begin, area,
    MATRIX: tl.constexpr, TURNED_ONLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read sigma of parts off their sums, and move their vectors.

    What is not finite keeps its vector; a zero matrix gets a generic one. Where `keep` is not zero,
    nothing changes.
    """
    index = begin + tl.program_id(0)
    part, value = parts + index * PART_SIZE, values + index * VALUES
    if TURNED_ONLY:
        if tl.load(value + COSINES + MATRIX) >= TURNED:
            return
    if tl.load(keep) != 0:
        return
    owner, columns = tl.load(part + OWNER), tl.arange(0, BLOCK)
    known = columns < tl.load(part + LENGTH)
    z, square = tl.zeros([BLOCK], tl.float32), 0.0
    for each in range(tl.load(part + FIRST_CHUNK), tl.load(part + END_CHUNK)):
        start = sums + MATRIX * area + tl.load(chunks + each * CHUNK_SIZE + SUM_AT)
        z += tl.load(start + columns, mask=known, other=0.0)
        square += tl.load(squares + 2 * each + MATRIX)
    tl.store(value + SQUARES + MATRIX, square)
    if tl.load(weights + owner * WEIGHT_SIZE + IS_VECTOR) != 0:
        tl.store(value + MATRIX, tl.sqrt(square))
        tl.store(value + COSINES + MATRIX, 1.0)
        return
    # Scaled, because the square of sigma squared leaves the range of float32 early.
    largest = tl.max(tl.abs(z), 0)
    scaled = z / tl.where(largest > 0, largest, 1.0)
    length = tl.sqrt(tl.sum(scaled * scaled, 0))
    sigma = tl.where(square == 0, 0.0, largest / tl.sqrt(square) * length)
    sigma = tl.where(square < float("inf"), sigma, float("nan"))  # a maximum loses a NaN
    tl.store(value + MATRIX, sigma)
    usable = (sigma > 0) & (sigma < float("inf"))
    cosine = square / tl.where(usable, largest, 1.0) / tl.where(usable, length, 1.0)
    tl.store(value + COSINES + MATRIX, tl.where(usable, cosine, 1.0))
    address = _v_of(weights, part, columns, MATRIX)
    old = tl.load(address, mask=known, other=0.0)
    numbers = (columns + 1).to(tl.float32)
    generic = tl.where(known, tl.cos(numbers * numbers), 0.0)
    generic = generic / tl.sqrt(tl.sum(generic * generic, 0))
    moved = scaled / tl.where(usable, length, 1.0)
    tl.store(address, tl.where(usable, moved, tl.where(sigma == 0, generic, old)), mask=known)


@triton.jit
def clip_parts(weights, parts, factors, values):
    """Set the rate of each part, `min(lr, tau * sigma1(W) / sigma1(U))` (Eq. 6, lines 7 to 9).

    A NaN stays a NaN.
    """
    index = tl.program_id(0)
    part, value = parts + index * PART_SIZE, values + index * VALUES
    owner, place = tl.load(part + OWNER), tl.load(part + PLACE)
    factor = factors + owner * FACTORS
    exempt = tl.load(weights + owner * WEIGHT_SIZE + EXEMPT).to(tl.pointer_type(tl.int8))
    rates = tl.load(weights + owner * WEIGHT_SIZE + RATE).to(tl.pointer_type(tl.float32))
    sigma, lr = tl.load(value + OF_UPDATE), tl.load(factor + LR)
    bound = tl.load(factor + TAU) * tl.load(value + OF_WEIGHT) / tl.where(sigma == 0, 1.0, sigma)
    free = (tl.load(exempt + place) != 0) | (sigma == 0)
    rate = tl.where(free | (bound >= lr), lr, bound)
    tl.store(rates + place, rate)
    tl.store(value + CLIPPED, rate)


@triton.jit
def move_chunks(
    weights, chunks, parts, factors, values, begin,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Step the weights by the rates of their parts (lines 10 to 14)."""
    chunk = chunks + (begin + tl.program_id(0)) * CHUNK_SIZE
    owner = tl.load(parts + tl.load(chunk + PART) * PART_SIZE + OWNER)
    factor = factors + owner * FACTORS
    rate = tl.load(values + tl.load(chunk + PART) * VALUES + CLIPPED)
    keep = 1 - rate * tl.load(factor + DECAY)
    width = tl.load(weights + owner * WEIGHT_SIZE + WIDTH)
    param = _tensor(weights, owner, PARAM, DTYPE, ALIGNED)
    first = _tensor(weights, owner, FIRST, DTYPE, ALIGNED)
    second = _tensor(weights, owner, SECOND, DTYPE, ALIGNED)
    for row in range(tl.load(chunk + ROW), tl.load(chunk + END_ROW), ROWS):
        at, inside = _offsets(chunk, row, width, ROWS, BLOCK, ALIGNED)
        m = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(second + at, mask=inside, other=1.0).to(tl.float32)
        w = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
        moved = w * keep - rate * _adam(m, s, factor)
        tl.store(param + at, moved.to(DTYPE), mask=inside)


@triton.jit
def write_left_vectors(weights, chunks, parts, values, products, keep, begin, BLOCK: tl.constexpr):
    """Write `u = W v / |W v|` of each part and its sigma, after an iteration on weights."""
    chunk = chunks + (begin + tl.program_id(0)) * CHUNK_SIZE
    index = tl.load(chunk + PART)
    part, value = parts + index * PART_SIZE, values + index * VALUES
    if tl.load(keep) != 0:
        return
    owner, sigma = tl.load(part + OWNER), tl.load(value + OF_WEIGHT)
    stored = tl.load(weights + owner * WEIGHT_SIZE + RATE).to(tl.pointer_type(tl.float32))
    tl.store(stored + tl.load(part + PLACE), sigma)  # every chunk of a part stores the same
    if (sigma > 0) & (sigma < float("inf")):
        length = tl.sqrt(tl.load(value + SQUARES + OF_WEIGHT))
        u = tl.load(weights + owner * WEIGHT_SIZE + WEIGHT_U).to(tl.pointer_type(tl.float32))
        u += tl.load(part + U_AT) + tl.load(chunk + PART_ROW)
        number = tl.load(chunk + END_ROW) - tl.load(chunk + ROW)
        for start in range(0, number, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            y = tl.load(products + tl.load(chunk + PRODUCT_AT) + rows, mask=rows < number)
            tl.store(u + rows, y / length, mask=rows < number)
