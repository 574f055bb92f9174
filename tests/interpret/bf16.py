"""Makes Triton's interpreter compute bf16 as a GPU does (needed in 3.6 to 3.9).

The interpreter stores bf16 as its 16-bit pattern. Left alone, `tl.dot`, arithmetic and comparisons
act on the patterns as integers, and fp32 -> bf16 truncates. `install()` mends dot (of any float
type), casts and elementwise operations to IEEE round-to-nearest-even; tests/interpret/test_bf16.py
holds it to torch.
Reductions of bf16 stay wrong: kernels widen to fp32 before they reduce.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) to fp32 values."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 values to bf16 bit patterns, ties to even, NaN kept."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _values(handle: Any) -> np.ndarray:
    return widen(handle.data) if _is_bf16(handle) else handle.data


def install() -> None:
    """Replaces five methods of the interpreter's builder, for the life of the process."""
    if getattr(InterpreterBuilder, "_knowedit_bf16", False):
        return
    builder: Any = InterpreterBuilder
    plain = {
        name: getattr(builder, name) for name in ("create_dot", "cast_impl", "create_fp_to_fp")
    }
    plain |= {name: getattr(builder, name) for name in ("binary_op", "unary_op")}

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if (
            d.data.dtype != np.float32
            or min(a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth) < 16
        ):
            return plain["create_dot"](self, a, b, d, precision, imprecise)
        # exact products and one rounding per dot: a tensor core's sums, not a sequential float32
        # chain
        product = np.matmul(_values(a).astype(np.float64), _values(b).astype(np.float64))
        return TensorHandle((product + d.data).astype(np.float32), d.dtype.scalar)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kind = target.scalar
        if _is_bf16(source) and kind != tl.bfloat16:
            return TensorHandle(widen(source.data).astype(interpreter._get_np_dtype(target)), kind)
        if kind == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return TensorHandle(narrow(source.data.astype(np.float32)), kind)
        return plain["cast_impl"](self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        touches_bf16 = _is_bf16(source) or target.scalar == tl.bfloat16
        wide = source.dtype.scalar.primitive_bitwidth > 8 and target.scalar.primitive_bitwidth > 8
        if touches_bf16 and wide and "RTZ" not in str(rounding):
            return cast_impl(self, source, target)
        return plain["create_fp_to_fp"](self, source, target, rounding)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (_is_bf16(left) or _is_bf16(right)) or op in _BITWISE:
            return plain["binary_op"](self, left, right, op)
        out = op(_values(left), _values(right))
        return (
            TensorHandle(out, tl.int1)
            if out.dtype == bool
            else TensorHandle(narrow(out), tl.bfloat16)
        )

    def unary_op(self: Any, argument: Any, op: Any) -> Any:
        if not _is_bf16(argument):
            return plain["unary_op"](self, argument, op)
        return TensorHandle(narrow(op(widen(argument.data))), tl.bfloat16)

    for method in (create_dot, cast_impl, create_fp_to_fp, binary_op, unary_op):
        setattr(builder, method.__name__, method)
    builder._knowedit_bf16 = True
