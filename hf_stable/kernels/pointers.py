"""Pointers, bfloat16, a shared counter and foreign functions, which numba does not offer."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = [
    "at",
    "call",
    "cast",
    "doubles",
    "flags",
    "halves",
    "integers",
    "narrow",
    "run",
    "singles",
    "take",
    "widen",
]


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
        word = ir.IntType(32)
        bits = builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16))
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
