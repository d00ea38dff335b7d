"""The passes over weights that numba compiles: row by row, on any number of threads.

Longer than other files, because numba's cache of compiled code notices a change in the file of a
function, but not in the files of those that it calls. Importing it takes half a second, so `cpu`
does so on first use.

Tensors come as addresses in tables of integers, which `tables` makes. A chunk is a range of rows of
one weight. What it adds to `z = W.T (W v)` is kept apart and summed in the order of the chunks, so
results depend neither on the number of threads nor on which of them took a chunk.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import float32, float64, int64, njit, types
from numba.extending import intrinsic

__all__ = ["lead_float32", "lead_float64", "work_bfloat16", "work_float32", "work_float64"]

# NaN and infinity have meanings here, so `nnan` and `ninf` are left out.
COMPILED: dict[str, Any] = dict(
    error_model="numpy", fastmath={"nsz", "arcp", "contract", "reassoc"}
)

# The head of a call: addresses and counts, and where the loop that runs has come to.
(
    TICKET, TASK, BEGIN, END, OWN, WORKER, RUNNER, SIZE, REAL_SIZE, ITERATIONS,
    WEIGHTS, CHUNKS, PIECES, PARTS, BATCHES, NUM_BATCHES, OPTIONS, VALUES, AHEAD_SIGMA, NORMS,
    UPDATES, SUMS, PRODUCTS, AREA_OF_SUMS, AREA_OF_PRODUCTS, HEAD_SIZE,
) = range(26)  # fmt: skip

# A weight: addresses of its tensors, and what its memory looks like.
(
    PARAM, GRAD, FIRST, SECOND, STEP, EXEMPT, RATE, WEIGHT_V, UPDATE_V, AHEAD_V, WEIGHT_U,
    WIDTH, UPDATE_AT, FIRST_PART, END_PART, FIRST_CHUNK, END_CHUNK, GROUP,
    IS_VECTOR, GOES_AHEAD, IS_AHEAD, IS_STALE, WEIGHT_SIZE,
) = range(23)  # fmt: skip

# A chunk: a range of rows and what lies in each of them; where its sums and products are kept.
OWNER, ROW, END_ROW, PIECE, END_PIECE, SUM_AT, PRODUCT_AT, PART_ROW, CHUNK_SIZE = range(9)

# A piece of a row: a range of columns that belongs to one part.
PART, COLUMN, END_COLUMN, VECTOR_AT, PIECE_SIZE = range(5)

# A part: one matrix of a weight.
V_AT, LENGTH, U_AT, WANTED, SUM, PART_SIZE = range(6)

# A batch: weights that take each pass together.
FIRST_WEIGHT, END_WEIGHT, THREADS, BATCH_SIZE = range(4)

# Options of a group of weights.
LR, BETA1, BETA2, EPS, DECAY, TAU, SIGN, POWER_ITERATIONS, OPTION_SIZE = range(9)

# Values of a part: a sigma for each matrix, the rate, |W v|^2 of the last iteration, and for each
# matrix the cosine between its vectors before and after it.
CLIPPED, SQUARES, COSINE = range(2, 5)
VALUE_SIZE = 7

# Tasks: those of a call, and what threads share in it.
STEP_WEIGHTS, REFRESH_VECTORS, UPDATE, ITERATE, MOVE = range(5)

# The matrices that are iterated on, W and U: each has sums, products and a bit in `WANTED`.
OF_WEIGHT, OF_UPDATE = 0, 1

BLOCK = 1 << 12
"""Entries that are worked on between two looks at the pieces of a row: they stay in the first
cache."""

TURNED = 0.995
"""Cosine between the vector of an update before and after an iteration, below which the update has
turned so far since the last step that it gets one more."""


def _pointer_maker(kind: types.Type) -> Any:
    @intrinsic
    def make(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return make


integers = _pointer_maker(types.int64)
doubles = _pointer_maker(types.float64)
singles = _pointer_maker(types.float32)
halves = _pointer_maker(types.uint16)
flags = _pointer_maker(types.uint8)


@intrinsic
def at(typing_context: Any, address: Any, like: Any) -> Any:
    """Return an address as a pointer of the kind of `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return like(types.int64, like), generate


@intrinsic
def cast(typing_context: Any, value: Any, like: Any) -> Any:
    """Return a float64 as what a pointer points to."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], types.float64, like.dtype)

    return like.dtype(types.float64, like), generate


@intrinsic
def widen(typing_context: Any, entry: Any) -> Any:
    """Return an entry of a tensor as the number that it is: bfloat16 becomes float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if entry != types.uint16:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return (types.float32 if entry == types.uint16 else entry)(entry), generate


@intrinsic
def narrow(typing_context: Any, value: Any, like: Any) -> Any:
    """Return a number as an entry of what a pointer points to, rounded to the nearest even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like.dtype != types.uint16:
            return arguments[0]
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        high = builder.lshr(bits, ir.Constant(word, 16))
        odd = builder.and_(high, ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        quiet = builder.or_(high, ir.Constant(word, 0x40))  # rounding would carry a NaN to zero
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        chosen = builder.select(is_nan, quiet, builder.lshr(rounded, ir.Constant(word, 16)))
        return builder.trunc(chosen, ir.IntType(16))

    return like.dtype(value, like), generate


@intrinsic
def take(typing_context: Any, counter: Any) -> Any:
    """Return a number and count it up, in one step that no other thread can come between."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", arguments[0], one, "acq_rel")

    return types.int64(counter), generate


@intrinsic
def call(typing_context: Any, worker: Any, head: Any) -> Any:
    """Call `worker(head)`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        builder.call(function, [builder.inttoptr(arguments[1], pointer)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def run(typing_context: Any, runner: Any, worker: Any, head: Any, threads: Any) -> Any:
    """Call `runner(worker, head, threads, 0)`, the signature of GOMP_parallel."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, number, number])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        worker, head = (builder.inttoptr(argument, pointer) for argument in arguments[1:3])
        threads = builder.trunc(arguments[3], number)
        builder.call(function, [worker, head, threads, ir.Constant(number, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


# ---- on entries ----


@njit(**COMPILED)
def _clear(numbers: Any, count: Any) -> None:
    zero = cast(0.0, numbers)
    for j in range(count):
        numbers[j] = zero


@njit(**COMPILED)
def _sum_squares(entries: Any, count: Any, real: Any) -> Any:
    total = cast(0.0, real)
    for j in range(count):
        x = widen(entries[j])
        total += x * x
    return float64(total)


@njit(**COMPILED)
def _move_moments(
    grad: Any, first: Any, second: Any, update: Any, count: Any, factors: Any
) -> None:
    """Move the moments and write Adam's update (Algorithm 1, lines 3 to 5)."""
    sign, new_first, keep_second, new_second, first_scale, root_scale, eps = factors
    for j in range(count):
        g = sign * widen(grad[j])
        m = widen(first[j])
        m += (g - m) * new_first
        s = widen(second[j]) * keep_second + new_second * g * g
        first[j] = narrow(m, first)
        second[j] = narrow(s, second)
        update[j] = m * first_scale / (math.sqrt(s) * root_scale + eps)


@njit(**COMPILED)
def _move_entries(weight: Any, update: Any, count: Any, keep: Any, rate: Any) -> None:
    for j in range(count):
        weight[j] = narrow(widen(weight[j]) * keep - rate * update[j], weight)


@njit(**COMPILED)
def _dot(entries: Any, v: Any, count: Any) -> Any:
    total = cast(0.0, v)
    for j in range(count):
        total += widen(entries[j]) * v[j]
    return total


@njit(**COMPILED)
def _iterate_row(row: Any, count: Any, v: Any, z: Any, y: Any) -> None:
    total = _dot(row, v, count)
    for j in range(count):
        z[j] += total * widen(row[j])
    y[0] = total


@njit(**COMPILED)
def _iterate_four(first: Any, stride: Any, count: Any, v: Any, z: Any, y: Any, like: Any) -> None:
    """As `_iterate_row`, for four rows that read v and z but once."""
    a, b = at(first, like), at(first + stride, like)
    c, d = at(first + 2 * stride, like), at(first + 3 * stride, like)
    y0 = y1 = y2 = y3 = cast(0.0, v)
    for j in range(count):
        x = v[j]
        y0 += widen(a[j]) * x
        y1 += widen(b[j]) * x
        y2 += widen(c[j]) * x
        y3 += widen(d[j]) * x
    for j in range(count):
        z[j] += y0 * widen(a[j]) + y1 * widen(b[j]) + y2 * widen(c[j]) + y3 * widen(d[j])
    y[0] = y0
    y[1] = y1
    y[2] = y2
    y[3] = y3


# ---- on chunks: what the threads share ----


@njit(**COMPILED)
def _weight(head: Any, index: Any) -> Any:
    return integers(head[WEIGHTS] + 8 * WEIGHT_SIZE * index)


@njit(**COMPILED)
def _chunk(head: Any, index: Any) -> Any:
    return integers(head[CHUNKS] + 8 * CHUNK_SIZE * index)


@njit(**COMPILED)
def _piece(head: Any, index: Any) -> Any:
    return integers(head[PIECES] + 8 * PIECE_SIZE * index)


@njit(**COMPILED)
def _part(head: Any, index: Any) -> Any:
    return integers(head[PARTS] + 8 * PART_SIZE * index)


@njit(**COMPILED)
def _option(head: Any, weight: Any) -> Any:
    return doubles(head[OPTIONS] + 8 * OPTION_SIZE * weight[GROUP])


@njit(**COMPILED)
def _value(head: Any, index: Any) -> Any:
    return doubles(head[VALUES] + 8 * VALUE_SIZE * index)


@njit(**COMPILED)
def _norm(head: Any, index: Any) -> Any:
    return doubles(head[NORMS] + 16 * index)


@njit(**COMPILED)
def _sums_of(head: Any, chunk: Any, matrix: Any) -> Any:
    """Return the address of what a chunk adds to `z`: as many numbers as its rows have entries."""
    return head[SUMS] + (matrix * head[AREA_OF_SUMS] + chunk[SUM_AT]) * head[REAL_SIZE]


@njit(**COMPILED)
def _products_of(head: Any, chunk: Any, matrix: Any, index: Any) -> Any:
    """Return the address of `W v`, a number for each row of a chunk, for a piece of its rows."""
    start = chunk[PRODUCT_AT] + (index - chunk[PIECE]) * (chunk[END_ROW] - chunk[ROW])
    return head[PRODUCTS] + (matrix * head[AREA_OF_PRODUCTS] + start) * head[REAL_SIZE]


@njit(**COMPILED)
def _iterate_rows(
    head: Any, chunk: Any, matrix: Any, rows: Any, address: Any, wanted: bool,
    like: Any, real: Any,
) -> None:  # fmt: skip
    """Add rows of a chunk to its sums, piece by piece.

    Args:
        head: of the call.
        chunk: its row in the table.
        matrix: `OF_WEIGHT` or `OF_UPDATE`.
        rows: the first, and the first after them.
        address: of the first row.
        wanted: whether to leave out parts that are not wanted.
        like: a pointer of the kind of the entries.
        real: a pointer of the kind of the vectors.
    """
    weight = _weight(head, chunk[OWNER])
    real_size = head[REAL_SIZE]
    size = real_size if matrix == OF_UPDATE else head[SIZE]
    vectors = weight[UPDATE_V] if matrix == OF_UPDATE else weight[WEIGHT_V]
    stride = weight[WIDTH] * size
    for index in range(chunk[PIECE], chunk[END_PIECE]):
        piece = _piece(head, index)
        if wanted and not (_part(head, piece[PART])[WANTED] >> matrix) & 1:
            continue
        count = piece[END_COLUMN] - piece[COLUMN]
        v = at(vectors + piece[VECTOR_AT] * real_size, real)
        z = at(_sums_of(head, chunk, matrix) + piece[COLUMN] * real_size, real)
        products = _products_of(head, chunk, matrix, index) + (rows[0] - chunk[ROW]) * real_size
        first = address + piece[COLUMN] * size
        row, end = 0, rows[1] - rows[0]
        while row + 4 <= end:
            y = at(products + row * real_size, real)
            _iterate_four(first + row * stride, stride, count, v, z, y, like)
            row += 4
        while row < end:
            y = at(products + row * real_size, real)
            _iterate_row(at(first + row * stride, like), count, v, z, y)
            row += 1


@njit(**COMPILED)
def _rows_from(chunk: Any, weight: Any, row: Any) -> Any:
    """Return the rows of a chunk, from one on, that are worked on at once."""
    return row, min(row + max(1, 1024 // weight[WIDTH] // 4 * 4), chunk[END_ROW])


@njit(**COMPILED)
def _factors(weight: Any, option: Any, real: Any) -> Any:
    """Return what `_move_moments` multiplies with at the step that a weight is at."""
    step = float64(singles(weight[STEP])[0])
    return (
        cast(option[SIGN], real),
        cast(1 - option[BETA1], real),
        cast(option[BETA2], real),
        cast(1 - option[BETA2], real),
        cast(1 / (1 - option[BETA1] ** step), real),
        cast(1 / math.sqrt(1 - option[BETA2] ** step), real),
        cast(option[EPS], real),
    )


@njit(**COMPILED)
def _look(head: Any, chunk: Any, entry: Any, real: Any) -> Any:
    """Return the product of a chunk's first row with the vector, and the square of that row."""
    weight, piece = _weight(head, chunk[OWNER]), _piece(head, chunk[PIECE])
    count = piece[END_COLUMN] - piece[COLUMN]
    first = weight[PARAM] + (chunk[ROW] * weight[WIDTH] + piece[COLUMN]) * head[SIZE]
    v = at(weight[WEIGHT_V] + piece[VECTOR_AT] * head[REAL_SIZE], real)
    row = at(first, entry)
    return float64(_dot(row, v, count)), _sum_squares(row, count, real)


@njit(**COMPILED)
def _update_chunk(head: Any, index: Any, entry: Any, real: Any) -> None:
    """Moments and update of some rows, and an iteration on the update in the same pass.

    Likewise one on the weight, unless the last step has made it ahead.
    """
    chunk, norms = _chunk(head, index), _norm(head, index)
    weight = _weight(head, chunk[OWNER])
    width, size = weight[WIDTH], head[SIZE]
    factors = _factors(weight, _option(head, weight), real)
    if weight[IS_AHEAD]:
        product, square = _look(head, chunk, entry, real)
        if not abs(product - norms[OF_WEIGHT]) <= 1e-5 * math.sqrt(square):
            weight[IS_STALE] = 1  # changed through `.data`, which leaves no other trace
    _clear(at(_sums_of(head, chunk, OF_UPDATE), real), width)
    _clear(at(_sums_of(head, chunk, OF_WEIGHT), real), width)
    square = square_of_update = 0.0
    row = chunk[ROW]
    while row < chunk[END_ROW]:
        rows = _rows_from(chunk, weight, row)
        count, offset = (rows[1] - row) * width, row * width * size
        param = weight[PARAM] + offset
        grad, first = at(weight[GRAD] + offset, entry), at(weight[FIRST] + offset, entry)
        second = at(weight[SECOND] + offset, entry)
        update = head[UPDATES] + (weight[UPDATE_AT] + row * width) * head[REAL_SIZE]
        _move_moments(grad, first, second, at(update, real), count, factors)
        if weight[IS_VECTOR]:
            square_of_update += _sum_squares(at(update, real), count, real)
            square += _sum_squares(at(param, entry), count, real)
        else:
            _iterate_rows(head, chunk, OF_UPDATE, rows, update, False, real, real)
            if not weight[IS_AHEAD]:
                _iterate_rows(head, chunk, OF_WEIGHT, rows, param, False, entry, real)
        row = rows[1]
    if weight[IS_VECTOR]:
        norms[OF_WEIGHT], norms[OF_UPDATE] = square, square_of_update


@njit(**COMPILED)
def _iterate_chunk(head: Any, index: Any, entry: Any, real: Any) -> None:
    """One more iteration on the parts that are wanted, of weights and of updates."""
    chunk = _chunk(head, index)
    weight = _weight(head, chunk[OWNER])
    wanted = 0
    for piece in range(chunk[PIECE], chunk[END_PIECE]):
        wanted |= _part(head, _piece(head, piece)[PART])[WANTED]
    rows, offset = (chunk[ROW], chunk[END_ROW]), chunk[ROW] * weight[WIDTH]
    if wanted >> OF_WEIGHT & 1:
        _clear(at(_sums_of(head, chunk, OF_WEIGHT), real), weight[WIDTH])
        param = weight[PARAM] + offset * head[SIZE]
        _iterate_rows(head, chunk, OF_WEIGHT, rows, param, True, entry, real)
    if wanted >> OF_UPDATE & 1:
        _clear(at(_sums_of(head, chunk, OF_UPDATE), real), weight[WIDTH])
        update = head[UPDATES] + (weight[UPDATE_AT] + offset) * head[REAL_SIZE]
        _iterate_rows(head, chunk, OF_UPDATE, rows, update, True, real, real)


@njit(**COMPILED)
def _move_chunk(head: Any, index: Any, entry: Any, real: Any) -> None:
    """Step some rows (lines 10 to 14), and iterate on what they have become in the same pass."""
    chunk = _chunk(head, index)
    weight = _weight(head, chunk[OWNER])
    width, size, real_size = weight[WIDTH], head[SIZE], head[REAL_SIZE]
    if weight[GOES_AHEAD]:
        _clear(at(_sums_of(head, chunk, OF_WEIGHT), real), width)
    row = chunk[ROW]
    while row < chunk[END_ROW]:
        rows = _rows_from(chunk, weight, row)
        param = weight[PARAM] + row * width * size
        update = head[UPDATES] + (weight[UPDATE_AT] + row * width) * real_size
        _move_rows(head, chunk, rows[1] - row, param, update, entry, real)
        if weight[GOES_AHEAD]:
            _iterate_rows(head, chunk, OF_WEIGHT, rows, param, False, entry, real)
        row = rows[1]
    if weight[GOES_AHEAD]:
        _norm(head, index)[OF_WEIGHT] = _look(head, chunk, entry, real)[0]


@njit(**COMPILED)
def _move_rows(
    head: Any, chunk: Any, rows: Any, param: Any, update: Any, entry: Any, real: Any
) -> None:
    """Step rows of a chunk from an address on, each piece by the rate of its part."""
    weight = _weight(head, chunk[OWNER])
    decay, width = _option(head, weight)[DECAY], weight[WIDTH]
    for index in range(chunk[PIECE], chunk[END_PIECE]):
        piece = _piece(head, index)
        rate = _value(head, piece[PART])[CLIPPED]
        keep, factor = cast(1 - rate * decay, real), cast(rate, real)
        count = piece[END_COLUMN] - piece[COLUMN]
        runs = rows
        if count == width:
            runs, count = 1, rows * width
        for run in range(runs):
            start = run * width + piece[COLUMN]
            to, towards = at(param + start * head[SIZE], entry), at(update + start * head[REAL_SIZE], real)
            _move_entries(to, towards, count, keep, factor)


@njit(**COMPILED)
def _work(head: Any, entry: Any, real: Any) -> None:
    """Take chunks, one after the other, until none is left: what each thread does."""
    while True:
        taken = take(integers(head[OWN] + 8 * TICKET))
        if taken >= head[END] - head[BEGIN]:
            return
        if head[TASK] == UPDATE:
            _update_chunk(head, head[BEGIN] + taken, entry, real)
        elif head[TASK] == ITERATE:
            _iterate_chunk(head, head[BEGIN] + taken, entry, real)
        else:
            # The other way round: what the pass before came to last is still in the cache.
            _move_chunk(head, head[END] - 1 - taken, entry, real)


# ---- between the passes: what one thread does ----


@njit(**COMPILED)
def _share(head: Any, batch: Any, task: Any) -> None:
    """Let threads share the chunks of a batch, and wait for them."""
    head[TICKET], head[TASK] = 0, task
    head[BEGIN] = _weight(head, batch[FIRST_WEIGHT])[FIRST_CHUNK]
    head[END] = _weight(head, batch[END_WEIGHT] - 1)[END_CHUNK]
    if batch[THREADS] == 1:
        call(head[WORKER], head[OWN])
    else:
        run(head[RUNNER], head[WORKER], head[OWN], batch[THREADS])


@njit(**COMPILED)
def _add(numbers: Any, more: Any, count: Any) -> None:
    for j in range(count):
        numbers[j] += more[j]


@njit(**COMPILED)
def _gather(head: Any, weight: Any, matrix: Any, wanted: bool, real: Any) -> None:
    """Sum what the chunks of a weight have for each of its parts."""
    for index in range(weight[FIRST_PART], weight[END_PART]):
        _part(head, index)[SUM] = 0
        _value(head, index)[SQUARES] = 0.0
    for index in range(weight[FIRST_CHUNK], weight[END_CHUNK]):
        chunk = _chunk(head, index)
        for place in range(chunk[PIECE], chunk[END_PIECE]):
            piece = _piece(head, place)
            part, value = _part(head, piece[PART]), _value(head, piece[PART])
            if wanted and not (part[WANTED] >> matrix) & 1:
                continue
            y = at(_products_of(head, chunk, matrix, place), real)
            for row in range(chunk[END_ROW] - chunk[ROW]):
                value[SQUARES] += float64(y[row]) * float64(y[row])
            z = _sums_of(head, chunk, matrix) + piece[COLUMN] * head[REAL_SIZE]
            if part[SUM]:
                _add(at(part[SUM], real), at(z, real), part[LENGTH])
            else:
                part[SUM] = z


@njit(**COMPILED)
def _settle(part: Any, value: Any, matrix: Any, old: Any, new: Any, real: Any) -> None:
    """Read sigma off the sums of a part, and write the vector that the iteration leads to.

    What is not finite keeps the old vector. A zero matrix gets a generic one: the old one may be
    orthogonal to all that the matrix has when it leaves zero.
    """
    count, z = part[LENGTH], at(part[SUM], real)
    square = generic = 0.0
    for j in range(count):
        square += float64(z[j]) * float64(z[j])
    length = math.sqrt(square)
    sigma = length / math.sqrt(value[SQUARES]) if value[SQUARES] != 0 else 0.0
    value[matrix] = sigma
    value[COSINE + matrix] = value[SQUARES] / length if 0 < sigma < math.inf else 1.0
    if sigma == 0:
        for j in range(count):
            generic += math.cos((j + 1.0) * (j + 1.0)) ** 2
    for j in range(count):
        if 0 < sigma < math.inf:
            new[j] = cast(float64(z[j]) / length, real)
        elif sigma == 0:
            new[j] = cast(math.cos((j + 1.0) * (j + 1.0)) / math.sqrt(generic), real)
        else:
            new[j] = old[j]


@njit(**COMPILED)
def _finish(head: Any, weight: Any, matrix: Any, wanted: bool, real: Any) -> None:
    """End an iteration: set sigma and vector of the parts of a weight, or of those wanted."""
    if weight[IS_VECTOR]:
        square = 0.0
        for index in range(weight[FIRST_CHUNK], weight[END_CHUNK]):
            square += _norm(head, index)[matrix]
        _value(head, weight[FIRST_PART])[matrix] = math.sqrt(square)
        return
    _gather(head, weight, matrix, wanted, real)
    vectors = weight[UPDATE_V] if matrix == OF_UPDATE else weight[WEIGHT_V]
    for index in range(weight[FIRST_PART], weight[END_PART]):
        part = _part(head, index)
        if part[SUM]:
            v = at(vectors + part[V_AT] * head[REAL_SIZE], real)
            _settle(part, _value(head, index), matrix, v, v, real)


@njit(**COMPILED)
def _take_ahead(head: Any, weight: Any, real: Any) -> None:
    """Use the iteration on a weight that the last step has made."""
    for index in range(weight[FIRST_PART], weight[END_PART]):
        part = _part(head, index)
        start = part[V_AT] * head[REAL_SIZE]
        v, moved = at(weight[WEIGHT_V] + start, real), at(weight[AHEAD_V] + start, real)
        for j in range(part[LENGTH]):
            v[j] = moved[j]
        _value(head, index)[OF_WEIGHT] = doubles(head[AHEAD_SIGMA])[index]


@njit(**COMPILED)
def _keep_ahead(head: Any, weight: Any, real: Any) -> None:
    """Keep the iteration on what a weight has become for the next step, apart from its state."""
    _gather(head, weight, OF_WEIGHT, False, real)
    for index in range(weight[FIRST_PART], weight[END_PART]):
        part, value = _part(head, index), _value(head, index)
        start = part[V_AT] * head[REAL_SIZE]
        v, moved = at(weight[WEIGHT_V] + start, real), at(weight[AHEAD_V] + start, real)
        _settle(part, value, OF_WEIGHT, v, moved, real)
        doubles(head[AHEAD_SIGMA])[index] = value[OF_WEIGHT]


@njit(**COMPILED)
def _want(head: Any, batch: Any, done: Any) -> bool:
    """Mark the parts that need a further iteration; say whether there are any.

    An update that has turned gets one more than the options say: nothing keeps it from jumping.
    """
    found = False
    for index in range(batch[FIRST_WEIGHT], batch[END_WEIGHT]):
        weight = _weight(head, index)
        left = int64(_option(head, weight)[POWER_ITERATIONS]) - done
        for place in range(weight[FIRST_PART], weight[END_PART]):
            turned = left == 0 and _value(head, place)[COSINE + OF_UPDATE] < TURNED
            wanted = 0
            if left + weight[IS_STALE] > 0:
                wanted |= 1 << OF_WEIGHT
            if left > 0 or turned:
                wanted |= 1 << OF_UPDATE
            if weight[IS_VECTOR]:
                wanted = 0
            _part(head, place)[WANTED] = wanted
            found = found or wanted > 0
    return found


@njit(**COMPILED)
def _clip(head: Any, weight: Any, real: Any) -> None:
    """Set the rate of each part, `min(lr, tau * sigma1(W) / sigma1(U))` (Eq. 6).

    A NaN stays a NaN: an update of unknown size must not pass as a small one.
    """
    option, exempt, rates = _option(head, weight), flags(weight[EXEMPT]), at(weight[RATE], real)
    for index in range(weight[FIRST_PART], weight[END_PART]):
        value, place = _value(head, index), index - weight[FIRST_PART]
        bound = math.inf
        if not exempt[place] and value[OF_UPDATE] != 0:
            bound = option[TAU] * value[OF_WEIGHT] / value[OF_UPDATE]
        rates[place] = cast(option[LR] if bound >= option[LR] else bound, real)
        value[CLIPPED] = float64(rates[place])


@njit(**COMPILED)
def _step_batch(head: Any, batch: Any, real: Any) -> None:
    """Step the weights of a batch; comments name lines of Algorithm 1."""
    weights = range(batch[FIRST_WEIGHT], batch[END_WEIGHT])
    for index in weights:
        singles(_weight(head, index)[STEP])[0] += float32(1)
    # Lines 3 to 5.
    _share(head, batch, UPDATE)
    # Line 6. Paper: prints sigma1 of the last update; its Eq. 6 has that of W_{t-1}, as here.
    for index in weights:
        weight = _weight(head, index)
        for matrix in (OF_WEIGHT, OF_UPDATE):
            if matrix == OF_UPDATE or not weight[IS_AHEAD]:
                _finish(head, weight, matrix, False, real)
            elif not weight[IS_STALE]:
                _take_ahead(head, weight, real)
    done = 1
    while _want(head, batch, done):
        _share(head, batch, ITERATE)
        for index in weights:
            weight = _weight(head, index)
            for matrix in (OF_WEIGHT, OF_UPDATE):
                if not weight[IS_VECTOR]:
                    _finish(head, weight, matrix, True, real)
        done += 1
    # Lines 7 to 9.
    for index in weights:
        _clip(head, _weight(head, index), real)
    # Lines 10 to 14.
    _share(head, batch, MOVE)
    for index in weights:
        if _weight(head, index)[GOES_AHEAD]:
            _keep_ahead(head, _weight(head, index), real)


@njit(**COMPILED)
def _refresh_batch(head: Any, batch: Any, real: Any) -> None:
    """Move the vectors of the weights of a batch, and write sigma and both vectors."""
    weights = range(batch[FIRST_WEIGHT], batch[END_WEIGHT])
    for _ in range(head[ITERATIONS]):
        for index in weights:
            for place in range(_weight(head, index)[FIRST_PART], _weight(head, index)[END_PART]):
                _part(head, place)[WANTED] = 1 << OF_WEIGHT
        _share(head, batch, ITERATE)
        for index in weights:
            _finish(head, _weight(head, index), OF_WEIGHT, True, real)
    for index in weights:
        weight = _weight(head, index)
        sigma = at(weight[RATE], real)
        for place in range(weight[FIRST_PART], weight[END_PART]):
            sigma[place - weight[FIRST_PART]] = cast(_value(head, place)[OF_WEIGHT], real)
        _write_left_vectors(head, weight, real)


@njit(**COMPILED)
def _write_left_vectors(head: Any, weight: Any, real: Any) -> None:
    """Write `u = W v / |W v|` of each part, unless its sigma is zero or not finite."""
    for index in range(weight[FIRST_CHUNK], weight[END_CHUNK]):
        chunk = _chunk(head, index)
        for place in range(chunk[PIECE], chunk[END_PIECE]):
            part, value = _piece(head, place)[PART], _value(head, _piece(head, place)[PART])
            if 0 < value[OF_WEIGHT] < math.inf:
                length = math.sqrt(value[SQUARES])
                start = (_part(head, part)[U_AT] + chunk[PART_ROW]) * head[REAL_SIZE]
                u = at(weight[WEIGHT_U] + start, real)
                y = at(_products_of(head, chunk, OF_WEIGHT, place), real)
                for row in range(chunk[END_ROW] - chunk[ROW]):
                    u[row] = cast(float64(y[row]) / length, real)


@njit(**COMPILED)
def _lead(head: Any, real: Any) -> None:
    """Do the task that the head names, batch by batch."""
    task = head[TASK]
    for index in range(head[NUM_BATCHES]):
        batch = integers(head[BATCHES] + 8 * BATCH_SIZE * index)
        if task == STEP_WEIGHTS:
            _step_batch(head, batch, real)
        else:
            _refresh_batch(head, batch, real)


# ---- what is called from outside, with the address of a head ----


def work_float32(address: Any) -> None:
    """Take chunks of float32 weights."""
    _work(integers(address), singles(0), singles(0))


def work_float64(address: Any) -> None:
    """Take chunks of float64 weights."""
    _work(integers(address), doubles(0), doubles(0))


def work_bfloat16(address: Any) -> None:
    """Take chunks of bfloat16 weights, whose vectors are float32."""
    _work(integers(address), halves(0), singles(0))


def lead_float32(address: Any) -> None:
    """Do a task whose vectors are float32."""
    _lead(integers(address), singles(0))


def lead_float64(address: Any) -> None:
    """Do a task whose vectors are float64."""
    _lead(integers(address), doubles(0))
