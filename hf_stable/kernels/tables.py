"""The tables by which compiled code knows tensors: what stands in which column.

Tensors come as addresses, in tables of 64-bit integers and of float64 values. `cpu` fills them in;
what does not depend on the step comes from `layouts`.
"""

from __future__ import annotations

# The head of a call: addresses and counts, and where the loop that runs has come to.
# Threads count down LEFT and up the others, each in a cache line of its own: shares that are done,
# that were taken from the front and from the back, and threads that have come.
LEFT, DONE, FRONT, BACK, COME = 0, 8, 16, 24, 32
(
    TEAM, TASK, BEGIN, END, BATCH, ROUND, MORE, KIND, WORKER, YIELD, SIZE, REAL_SIZE, ITERATIONS,
    WEIGHTS, CHUNKS, PIECES, PARTS, BATCHES, NUM_BATCHES, SHARES, OPTIONS, VALUES, AHEAD_SIGMA,
    NORMS, UPDATES, SUMS, PRODUCTS, AREA_OF_SUMS, AREA_OF_PRODUCTS, HEAD_SIZE,
) = range(40, 70)  # fmt: skip

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

# A batch: weights that take each pass together, and where the shares of its work stand.
(
    FIRST_WEIGHT, END_WEIGHT, FIRST_OF_CHUNKS, END_OF_CHUNKS, FIRST_OF_WEIGHTS, END_OF_WEIGHTS,
    BATCH_SIZE,
) = range(7)  # fmt: skip

# A share: a range of chunks or of weights, which a thread takes at a time.
FIRST_OF, END_OF, SHARE_SIZE = range(3)

# Options of a group of weights.
LR, BETA1, BETA2, EPS, DECAY, TAU, SIGN, POWER_ITERATIONS, OPTION_SIZE = range(9)

# Values of a part: a sigma for each matrix, the rate, |W v|^2 of the last iteration, and for each
# matrix the cosine between its vectors before and after it.
CLIPPED, SQUARES, COSINE = range(2, 5)
VALUE_SIZE = 7

# Kinds of calls, and the tasks that threads share in them: three chunk by chunk, two weight by
# weight, and one with nothing to do, with which a call begins.
STEP_WEIGHTS, REFRESH_VECTORS = range(2)
UPDATE, ITERATE, MOVE, SETTLE, KEEP, START = range(6)

CLOSED = -(1 << 40)
"""What LEFT is when nothing comes any more; tasks that are taken leave it at zero or little less.
"""

# The matrices that are iterated on, W and U: each has sums, products and a bit in `WANTED`.
OF_WEIGHT, OF_UPDATE = 0, 1

TILE = 1 << 10
"""Entries that are worked on at once: their updates are still in the first cache when they are
iterated on, after gradient and moments have come through it."""

TURNED = 0.995
"""Cosine between the vector of an update before and after an iteration, below which the update has
turned so far since the last step that it gets one more."""
