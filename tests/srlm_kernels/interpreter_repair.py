"""Makes Triton's CPU interpreter compute bf16 as a GPU does.

The interpreter holds bf16 as raw 16-bit integers: unrepaired, `tl.dot` and all arithmetic on bf16
give garbage in silence, and conversion from fp32 truncates where a GPU rounds to nearest even.

A plugin of pytest, `-p interpreter_repair`: it must come before the kernels are imported.
"""

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

# A kernel must cast bf16 to fp32 before any of these.
ARITHMETIC = (
    "binary_op",
    "unary_op",
    "create_fadd",
    "create_fsub",
    "create_fmul",
    "create_fdiv",
    "create_fma",
    "create_exp",
    "create_exp2",
    "create_log",
    "create_log2",
    "create_maxnumf",
    "create_maximumf",
    "create_minnumf",
    "create_minimumf",
)


def widened(data: np.ndarray) -> np.ndarray:
    """bf16 bits as fp32."""
    return (data.astype(np.uint32) << 16).view(np.float32)


def narrowed(data: np.ndarray) -> np.ndarray:
    """fp32 as bf16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, np.uint16(0x7FC0), rounded.astype(np.uint16))


def is_bf16(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return getattr(dtype, "scalar", dtype) == tl.bfloat16


def repair_conversion() -> None:
    original = interpreter._convert_float

    @functools.wraps(original)
    def convert(data: np.ndarray, source: Any, to: Any, rounding: Any) -> np.ndarray:
        if (source, to) == (tl.float32, tl.bfloat16):
            return narrowed(data)
        if (source, to) == (tl.bfloat16, tl.float32):
            return widened(data)
        return original(data, source, to, rounding)

    interpreter._convert_float = convert


def repair_dot() -> None:
    original = InterpreterBuilder.create_dot

    def operand(handle: Any) -> Any:
        return TensorHandle(widened(handle.data), tl.float32) if is_bf16(handle) else handle

    @functools.wraps(original)
    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, operand(a), operand(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def forbid_arithmetic(name: str) -> None:
    original = getattr(InterpreterBuilder, name)

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(is_bf16, args)):
            raise TypeError(f"{name} on bf16, which the interpreter cannot do: cast to fp32 first")
        return original(self, *args, **kwargs)

    setattr(InterpreterBuilder, name, checked)


def repair_range() -> None:
    """`range` over a runtime argument, which Triton 3.6 with numpy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    @functools.wraps(original)
    def patch(tensor: Any, *scope: Any) -> Any:
        result = original(tensor, *scope)
        if scope:
            index = lambda self: int(np.asarray(self.handle.data).item())  # noqa: E731
            scope[0].set_attr(tensor, "__index__", index)
        return result

    interpreter._patch_lang_tensor = patch


def patch_once_per_launch() -> None:
    """The interpreter replaces the language's functions anew in every call within a kernel.

    That took most of the time of these tests.
    """
    original = interpreter._patch_lang
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda kernel: original(language)
    InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


repair_conversion()
repair_dot()
repair_range()
patch_once_per_launch()
for operation in ARITHMETIC:
    forbid_arithmetic(operation)
