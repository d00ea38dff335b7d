"""Pointers, bfloat16, shared numbers and foreign functions, which numba does not offer."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = [
    "add",
    "at",
    "call",
    "cast",
    "doubles",
    "flags",
    "halves",
    "integers",
    "load",
    "narrow",
    "pause",
    "singles",
    "store",
    "widen",
    "yield_to_others",
]

_ON_X86: tuple[Any, ...] = ("llvm.x86.sse2.pause",)
_ON_ARM: tuple[Any, ...] = ("llvm.aarch64.hint", 1)
_PAUSE = {"x86_64": _ON_X86, "amd64": _ON_X86, "aarch64": _ON_ARM, "arm64": _ON_ARM}.get(
    platform.machine().lower()
)
"""LLVM's name of the instruction that eases a loop of looks, and the numbers it takes."""


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
def load(typing_context: Any, numbers: Any, place: Any) -> Any:
    """Return a number that other threads write."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.gep(arguments[0], [arguments[1]]), "acquire", 8)

    return types.int64(numbers, types.intp), generate


@intrinsic
def store(typing_context: Any, numbers: Any, place: Any, value: Any) -> Any:
    """Write a number that other threads read; they see all that was written before it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.gep(arguments[0], [arguments[1]])
        builder.store_atomic(arguments[2], address, "release", 8)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, types.int64), generate


@intrinsic
def add(typing_context: Any, numbers: Any, place: Any, value: Any) -> Any:
    """Add to a number and return what it was; no other thread can come between."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.gep(arguments[0], [arguments[1]])
        return builder.atomic_rmw("add", address, arguments[2], "acq_rel")

    return types.int64(numbers, types.intp, types.int64), generate


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the core that this thread looks at a number until another one changes it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _PAUSE is not None:
            name, *numbers = _PAUSE
            hints = [ir.Constant(ir.IntType(32), number) for number in numbers]
            kind = ir.FunctionType(ir.VoidType(), [hint.type for hint in hints])
            builder.call(builder.module.declare_intrinsic(name, fnty=kind), hints)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call(typing_context: Any, worker: Any, head: Any, first: Any, end: Any) -> Any:
    """Call `worker(head, first, end)`, a compiled function."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word, word])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        builder.call(function, arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def yield_to_others(typing_context: Any, function: Any) -> Any:
    """Call a function of the system that lets other threads run; none if its address is zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        with builder.if_then(builder.icmp_unsigned("!=", arguments[0], arguments[0].type(0))):
            builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate
