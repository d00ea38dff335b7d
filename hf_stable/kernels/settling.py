"""What is done for a weight between the passes: sums, sigma, the next vector, and the rate."""

from __future__ import annotations

import math
from typing import Any

from numba import float64, int64, njit

from hf_stable.kernels import tables as t
from hf_stable.kernels.entries import UNWRAPPED
from hf_stable.kernels.pointers import at, cast, doubles, flags
from hf_stable.kernels.rows import (
    chunk_at,
    norm_at,
    option_of,
    part_at,
    piece_at,
    products_of,
    sums_of,
    value_at,
)

__all__ = ["BETWEEN", "keep_ahead", "settle_step", "settle_triples"]

BETWEEN: dict[str, Any] = dict(error_model="numpy") | UNWRAPPED
"""Without the vector code of the passes it is compiled in half the time, and just as fast."""


@njit(**BETWEEN)
def _add(numbers: Any, more: Any, count: Any) -> None:
    for j in range(count):
        numbers[j] += more[j]


@njit(**BETWEEN)
def _gather(head: Any, weight: Any, matrix: Any, wanted: bool, real: Any) -> None:
    """Sum what the chunks of a weight have for each of its parts."""
    for index in range(weight[t.FIRST_PART], weight[t.END_PART]):
        part_at(head, index)[t.SUM] = 0
        value_at(head, index)[t.SQUARES] = 0.0
    for index in range(weight[t.FIRST_CHUNK], weight[t.END_CHUNK]):
        chunk = chunk_at(head, index)
        for place in range(chunk[t.PIECE], chunk[t.END_PIECE]):
            piece = piece_at(head, place)
            part, value = part_at(head, piece[t.PART]), value_at(head, piece[t.PART])
            if wanted and not (part[t.WANTED] >> matrix) & 1:
                continue
            y = at(products_of(head, chunk, matrix, place), real)
            for row in range(chunk[t.END_ROW] - chunk[t.ROW]):
                value[t.SQUARES] += float64(y[row]) * float64(y[row])
            z = sums_of(head, chunk, matrix) + piece[t.COLUMN] * head[t.REAL_SIZE]
            if part[t.SUM]:
                _add(at(part[t.SUM], real), at(z, real), part[t.LENGTH])
            else:
                part[t.SUM] = z


@njit(**BETWEEN)
def _settle(part: Any, value: Any, matrix: Any, old: Any, new: Any, real: Any) -> None:
    """Read sigma off the sums of a part, and write the vector that the iteration leads to.

    What is not finite keeps the old vector. A zero matrix gets a generic one: the old one may be
    orthogonal to all that the matrix has when it leaves zero.
    """
    count, z = part[t.LENGTH], at(part[t.SUM], real)
    square = generic = 0.0
    for j in range(count):
        square += float64(z[j]) * float64(z[j])
    length = math.sqrt(square)
    sigma = length / math.sqrt(value[t.SQUARES]) if value[t.SQUARES] != 0 else 0.0
    value[matrix] = sigma
    value[t.COSINE + matrix] = value[t.SQUARES] / length if 0 < sigma < math.inf else 1.0
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


@njit(**BETWEEN)
def _finish(head: Any, weight: Any, matrix: Any, wanted: bool, real: Any) -> None:
    """End an iteration: set sigma and vector of the parts of a weight, or of those wanted."""
    if weight[t.IS_VECTOR]:
        square = 0.0
        for index in range(weight[t.FIRST_CHUNK], weight[t.END_CHUNK]):
            square += norm_at(head, index)[matrix]
        value_at(head, weight[t.FIRST_PART])[matrix] = math.sqrt(square)
        return
    _gather(head, weight, matrix, wanted, real)
    vectors = weight[t.UPDATE_V] if matrix == t.OF_UPDATE else weight[t.WEIGHT_V]
    for index in range(weight[t.FIRST_PART], weight[t.END_PART]):
        part = part_at(head, index)
        if part[t.SUM]:
            v = at(vectors + part[t.V_AT] * head[t.REAL_SIZE], real)
            _settle(part, value_at(head, index), matrix, v, v, real)


@njit(**BETWEEN)
def _take_ahead(head: Any, weight: Any, real: Any) -> None:
    """Use the iteration on a weight that the last step has made."""
    for index in range(weight[t.FIRST_PART], weight[t.END_PART]):
        part = part_at(head, index)
        start = part[t.V_AT] * head[t.REAL_SIZE]
        v, moved = at(weight[t.WEIGHT_V] + start, real), at(weight[t.AHEAD_V] + start, real)
        for j in range(part[t.LENGTH]):
            v[j] = moved[j]
        value_at(head, index)[t.OF_WEIGHT] = doubles(head[t.AHEAD_SIGMA])[index]


@njit(**BETWEEN)
def keep_ahead(head: Any, weight: Any, real: Any) -> None:
    """Keep the iteration on what a weight has become for the next step, apart from its state."""
    _gather(head, weight, t.OF_WEIGHT, False, real)
    for index in range(weight[t.FIRST_PART], weight[t.END_PART]):
        part, value = part_at(head, index), value_at(head, index)
        start = part[t.V_AT] * head[t.REAL_SIZE]
        v, moved = at(weight[t.WEIGHT_V] + start, real), at(weight[t.AHEAD_V] + start, real)
        _settle(part, value, t.OF_WEIGHT, v, moved, real)
        doubles(head[t.AHEAD_SIGMA])[index] = value[t.OF_WEIGHT]


@njit(**BETWEEN)
def _want(head: Any, weight: Any, done: Any) -> bool:
    """Mark the parts that need a further iteration; say whether there are any.

    An update that has turned gets one more than the options say: nothing keeps it from jumping.
    """
    if weight[t.IS_VECTOR]:
        return False
    found = False
    left = int64(option_of(head, weight)[t.POWER_ITERATIONS]) - done
    for place in range(weight[t.FIRST_PART], weight[t.END_PART]):
        turned = left == 0 and value_at(head, place)[t.COSINE + t.OF_UPDATE] < t.TURNED
        wanted = 0
        if left + weight[t.IS_STALE] > 0:
            wanted |= 1 << t.OF_WEIGHT
        if left > 0 or turned:
            wanted |= 1 << t.OF_UPDATE
        part_at(head, place)[t.WANTED] = wanted
        found = found or wanted > 0
    return found


@njit(**BETWEEN)
def _clip(head: Any, weight: Any, real: Any) -> None:
    """Set the rate of each part, `min(lr, tau * sigma1(W) / sigma1(U))` (Eq. 6).

    A NaN stays a NaN: an update of unknown size must not pass as a small one.
    """
    option, exempt, rates = (
        option_of(head, weight),
        flags(weight[t.EXEMPT]),
        at(weight[t.RATE], real),
    )
    for index in range(weight[t.FIRST_PART], weight[t.END_PART]):
        value, place = value_at(head, index), index - weight[t.FIRST_PART]
        bound = math.inf
        if not exempt[place] and value[t.OF_UPDATE] != 0:
            bound = option[t.TAU] * value[t.OF_WEIGHT] / value[t.OF_UPDATE]
        rates[place] = cast(option[t.LR] if bound >= option[t.LR] else bound, real)
        value[t.CLIPPED] = float64(rates[place])


@njit(**BETWEEN)
def settle_step(head: Any, weight: Any, real: Any) -> bool:
    """End an iteration of a step and set the rates (line 6); say whether it needs one more.

    Paper: prints sigma1 of the last update; its Eq. 6 has that of W_{t-1}, as here.
    """
    done = head[t.ROUND]
    for matrix in (t.OF_WEIGHT, t.OF_UPDATE):
        if done > 1:
            if not weight[t.IS_VECTOR]:
                _finish(head, weight, matrix, True, real)
        elif matrix == t.OF_UPDATE or not weight[t.IS_AHEAD]:
            _finish(head, weight, matrix, False, real)
        elif not weight[t.IS_STALE]:
            _take_ahead(head, weight, real)
    _clip(head, weight, real)
    return _want(head, weight, done)


@njit(**BETWEEN)
def settle_triples(head: Any, weight: Any, real: Any) -> bool:
    """End an iteration of a refresh; after the last one write sigma and left vectors.

    Returns:
        Whether one more is to come.
    """
    _finish(head, weight, t.OF_WEIGHT, True, real)
    if head[t.ROUND] < head[t.ITERATIONS]:
        return True
    sigma = at(weight[t.RATE], real)
    for place in range(weight[t.FIRST_PART], weight[t.END_PART]):
        sigma[place - weight[t.FIRST_PART]] = cast(value_at(head, place)[t.OF_WEIGHT], real)
    _write_left_vectors(head, weight, real)
    return False


@njit(**BETWEEN)
def _write_left_vectors(head: Any, weight: Any, real: Any) -> None:
    """Write `u = W v / |W v|` of each part, unless its sigma is zero or not finite."""
    for index in range(weight[t.FIRST_CHUNK], weight[t.END_CHUNK]):
        chunk = chunk_at(head, index)
        for place in range(chunk[t.PIECE], chunk[t.END_PIECE]):
            part, value = (
                piece_at(head, place)[t.PART],
                value_at(head, piece_at(head, place)[t.PART]),
            )
            if 0 < value[t.OF_WEIGHT] < math.inf:
                length = math.sqrt(value[t.SQUARES])
                start = (part_at(head, part)[t.U_AT] + chunk[t.PART_ROW]) * head[t.REAL_SIZE]
                u = at(weight[t.WEIGHT_U] + start, real)
                y = at(products_of(head, chunk, t.OF_WEIGHT, place), real)
                for row in range(chunk[t.END_ROW] - chunk[t.ROW]):
                    u[row] = cast(float64(y[row]) / length, real)
