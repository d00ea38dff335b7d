"""The tables by which compiled code knows tensors: what stands in which column.

Tensors come as addresses, in tables of 64-bit integers and of float64 values. `cpu` fills them in;
what does not depend on the step comes from `layouts`.
"""

from __future__ import annotations

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
PART, COLUMN, END_COLUMN, PIECE_SIZE = range(4)

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

TILE = 1 << 10
"""Entries that are worked on at once: their updates are still in the first cache when they are
iterated on, after gradient and moments have come through it."""

TURNED = 0.995
"""Cosine between the vector of an update before and after an iteration, below which the update has
turned so far since the last step that it gets one more."""
