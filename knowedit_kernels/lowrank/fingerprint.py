"""A fingerprint of a weight's bits: what tells that somebody else wrote to it.

Rows are read as lanes of eight bytes (zeros behind the last), and each row gives two sums mod
2^64:

* of (low + a_j) (high + b_j) over its lanes' halves, mod 2^32 inside the brackets, with fixed
  random keys a, b: two different rows agree by a chance of 2^-32 (NH of UMAC: Black, Halevi,
  Krawczyk, Krovetz, Rogaway, CRYPTO 1999). Being a product, it sees what linear sums are blind to,
  such as the signs of two entries;
* of the lanes themselves: a single changed lane is always seen.

The rows' sums are scrambled (the finaliser of splitmix64) with the row's number, and added up.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from knowedit_kernels import _native
from knowedit_kernels import _ops as _ops  # defines the op

_BLOCK = 1 << 20  # bytes read at a time
_LOW = 0xFFFFFFFF


def fingerprint(weight: Tensor) -> int:
    """A 128-bit hash of the bits of a [..., columns] tensor; the same on every device.

    Any one changed entry is seen, several but by a chance of about 2^-32.
    """
    return number(*sums_of(weight).tolist())


def sums_of(weight: Tensor) -> Tensor:
    """Both halves of a weight's fingerprint, int64 [2]."""
    # not -1 rows: of a weight without columns there is no telling how many
    flat = weight.detach().reshape(math.prod(weight.shape[:-1]), weight.shape[-1])
    sums = _compiled_sums if _compiled(flat) else _sums
    return sums(flat, keys_of(flat).to(flat.device))


def number(first: int, second: int) -> int:
    """The fingerprint whose halves these are."""
    return (first % 2**64) << 64 | second % 2**64


def keys_of(weight: Tensor) -> Tensor:
    """The keys of a matrix's lanes, int64 [lanes], in host memory."""
    return _keys(-(-weight.shape[1] * weight.element_size() // 8))


@functools.lru_cache(maxsize=16)
def _keys(lanes: int) -> Tensor:
    """int64 [lanes]: a_j in the low half, b_j in the high one."""
    return _scrambled(torch.arange(1, lanes + 1, device="cpu") * -0x61C8864680B583EB)


def _scrambled(x: Tensor) -> Tensor:
    """A bijection of int64 in which every bit depends on every bit."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _compiled(flat: Tensor) -> bool:
    dense = flat.shape[1] <= 1 or flat.stride(1) == 1
    return flat.device.type == "cpu" and dense and _native.load().reason is None


def _compiled_sums(flat: Tensor, keys: Tensor) -> Tensor:
    out = torch.empty(2, dtype=torch.int64, device=flat.device)
    torch.ops.knowedit.fingerprint_cpu_(out, flat, keys)
    return out


def _sums(flat: Tensor, keys: Tensor) -> Tensor:
    """Both sums over the scrambled rows, int64 [2]."""
    number = torch.arange(1, len(flat) + 1, device=flat.device)[:, None] * -0x61C8864680B583EB
    return _scrambled(_rows(flat, keys) + number).sum(0)


def _rows(flat: Tensor, keys: Tensor) -> Tensor:
    """Both sums of every row, int64 [rows, 2]."""
    width = flat.shape[1] * flat.element_size()
    step = max(1, _BLOCK // max(1, width))
    sums = [_row_sums(block, keys) for block in flat.split(step)]
    return torch.cat(sums) if sums else flat.new_empty(0, 2, dtype=torch.int64)


def _row_sums(block: Tensor, keys: Tensor) -> Tensor:
    width = block.shape[1] * block.element_size()
    dense = block.clone(memory_format=torch.contiguous_format)  # strides as views by bytes need
    raw = dense.view(-1).view(torch.uint8).view(len(block), width)
    lanes = torch.nn.functional.pad(raw, (0, 8 * len(keys) - width)).view(torch.int64)
    low = ((lanes & _LOW) + (keys & _LOW)) & _LOW
    high = (_shifted(lanes, 32) + _shifted(keys, 32)) & _LOW
    return torch.stack([(low * high).sum(1), lanes.sum(1)], 1)
