"""What the threads of a call share, task by task, and in which order the tasks come.

A call is one parallel region. Its threads take shares of the task at hand. Who ends the last one
begins the next task. So nobody waits for a thread that has taken nothing: one that the system lets
sleep, or starts late, holds nobody up.
"""

from __future__ import annotations

from typing import Any

from numba import float32, njit

from hf_stable.kernels import tables as t
from hf_stable.kernels.pointers import (
    add,
    call,
    doubles,
    integers,
    load,
    pause,
    singles,
    store,
    yield_to_others,
)
from hf_stable.kernels.rows import batch_at, share_at, weight_at
from hf_stable.kernels.settling import BETWEEN, keep_ahead, settle_step, settle_triples

__all__ = ["lead_float32", "lead_float64"]

AWAKE = 1 << 12
"""Looks at what is left before a thread lets others run: about as long as a share takes."""


@njit(**BETWEEN)
def _offer(head: Any, task: Any, first: Any, end: Any) -> None:
    """Let threads take the shares of a task."""
    head[t.TASK], head[t.BEGIN], head[t.END] = task, first, end
    head[t.MORE] = head[t.DONE] = head[t.FRONT] = head[t.BACK] = 0
    store(head, t.LEFT, end - first)


@njit(**BETWEEN)
def _offer_chunks(head: Any, task: Any) -> None:
    batch = batch_at(head, head[t.BATCH])
    _offer(head, task, batch[t.FIRST_OF_CHUNKS], batch[t.END_OF_CHUNKS])


@njit(**BETWEEN)
def _offer_weights(head: Any, task: Any) -> None:
    batch = batch_at(head, head[t.BATCH])
    _offer(head, task, batch[t.FIRST_OF_WEIGHTS], batch[t.END_OF_WEIGHTS])


@njit(**BETWEEN)
def _begin_batch(head: Any, index: Any) -> None:
    """Offer the first task of a batch, or close the call after the last one."""
    head[t.BATCH], head[t.ROUND] = index, 0
    if index == head[t.NUM_BATCHES]:
        store(head, t.LEFT, t.CLOSED)
    elif head[t.KIND] == t.REFRESH_VECTORS:
        _offer_chunks(head, t.ITERATE)
    else:
        batch = batch_at(head, index)
        for weight in range(batch[t.FIRST_WEIGHT], batch[t.END_WEIGHT]):
            singles(weight_at(head, weight)[t.STEP])[0] += float32(1)
        _offer_chunks(head, t.UPDATE)


@njit(**BETWEEN)
def _go_on(head: Any) -> None:
    """Offer what comes after the task that has ended; numbers are lines of Algorithm 1.

    A step: moments and updates (3 to 5), sigma and rates (6 to 9), further iterations with what
    comes after them, the move (10 to 14), and what it has found out for the next step.
    """
    task = head[t.TASK]
    if task in (t.UPDATE, t.ITERATE):
        head[t.ROUND] += 1
        _offer_weights(head, t.SETTLE)
    elif task == t.SETTLE and head[t.MORE]:
        _offer_chunks(head, t.ITERATE)
    elif task == t.SETTLE and head[t.KIND] == t.STEP_WEIGHTS:
        _offer_chunks(head, t.MOVE)
    elif task == t.MOVE:
        _offer_weights(head, t.KEEP)
    else:
        _begin_batch(head, head[t.BATCH] + 1)


@njit(**BETWEEN)
def _do_weights(head: Any, first: Any, end: Any, real: Any) -> None:
    for index in range(first, end):
        weight = weight_at(head, index)
        if head[t.TASK] == t.KEEP:
            if weight[t.GOES_AHEAD]:
                keep_ahead(head, weight, real)
        elif head[t.KIND] == t.STEP_WEIGHTS:
            if settle_step(head, weight, real):
                store(head, t.MORE, 1)
        elif settle_triples(head, weight, real):
            store(head, t.MORE, 1)


@njit(**BETWEEN)
def _take(head: Any, side: Any) -> Any:
    """Return the number of a share of the task at hand, or -1 if none is left.

    Half of the threads take from the front and half from the back, in every task: what a thread has
    written lies in a cache near its core, and is slow to reach from another one.
    """
    if load(head, t.LEFT) <= 0 or add(head, t.LEFT, -1) <= 0:
        return -1
    # A single thread moves the other way round: what it came to last is still in its first cache.
    turns = head[t.TASK] == t.MOVE and head[t.TEAM] == 1
    if (side == 1) != turns:
        return head[t.END] - 1 - add(head, t.BACK, 1)
    return head[t.BEGIN] + add(head, t.FRONT, 1)


@njit(**BETWEEN)
def _lead(head: Any, address: Any, real: Any) -> None:
    """Take shares until the call is closed: what each thread does."""
    looks, side = 0, add(head, t.COME, 1) % 2
    while load(head, t.LEFT) > t.CLOSED // 2:
        taken = _take(head, side)
        if taken < 0:
            looks += 1
            if looks < AWAKE:
                pause()
            else:
                yield_to_others(head[t.YIELD])
            continue
        looks = 0
        share, number = share_at(head, taken), head[t.END] - head[t.BEGIN]
        if head[t.TASK] < t.SETTLE:
            call(head[t.WORKER], address, share[t.FIRST_OF], share[t.END_OF])
        elif head[t.TASK] < t.START:
            _do_weights(head, share[t.FIRST_OF], share[t.END_OF], real)
        if add(head, t.DONE, 1) + 1 == number:  # from here on the next task may have begun
            _go_on(head)


def lead_float32(address: Any) -> None:
    """Do a call whose vectors are float32."""
    _lead(integers(address), address, singles(0))


def lead_float64(address: Any) -> None:
    """Do a call whose vectors are float64."""
    _lead(integers(address), address, doubles(0))
