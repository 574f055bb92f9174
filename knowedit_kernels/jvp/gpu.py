"""Launching the Triton kernels of the tangents, and the gate each passes on a device before
anything relies on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from knowedit_kernels import _device, _gate
from knowedit_kernels._dispatch import Call, Candidate
from knowedit_kernels.jvp import reference
from knowedit_kernels.jvp.call import AttentionCall, RmsNormCall, SwigluCall
from knowedit_kernels.numerics import tangent_error

GROUP = 8  # tangents of one program of the elementwise kernels: the primal is read once for them
WIDEST = 16384  # entries of a normalised row, which stays in registers
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SWIGLU_TILE: dict[str, Any] = {"GROUP": GROUP, "BD": 1024, "num_warps": 4}
# queries, keys and the part of a head multiplied at a time, by bytes per entry and largest head:
# what leaves no spills on sm_80, 90 and 100. Only the narrowest has registers for O beside the
# tangent's sums, which one pass for both needs.
ATTENTION_TILES = {
    (2, 64): {"BM": 64, "BN": 32, "BC": 32},
    (2, 128): {"BM": 64, "BN": 32, "BC": 32},
    (2, 256): {"BM": 32, "BN": 16, "BC": 64},
    (4, 64): {"BM": 64, "BN": 16, "BC": 16},
    (4, 128): {"BM": 32, "BN": 16, "BC": 32},
}
ONE_PASS = (2, 64)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def rms_tile(d: int) -> dict[str, Any]:
    """Block size and warps for rows of d entries."""
    return {"GROUP": GROUP, "BD": _power(d, 128), "num_warps": 4 if d <= 2048 else 8}


def _kind(dtype: torch.dtype, d: int) -> tuple[int, int] | None:
    return next((key for key in ATTENTION_TILES if key[0] == dtype.itemsize and d <= key[1]), None)


def attention_tile(dtype: torch.dtype, d: int) -> tuple[dict[str, Any], bool]:
    """Block sizes for heads of d entries, and whether one pass can do the function and a
    tangent.
    """
    kind = _kind(dtype, d)
    assert kind is not None
    tile: dict[str, Any] = {
        **ATTENTION_TILES[kind],
        "BD": _power(d, 16),
        "num_warps": 4,
        "num_stages": 2,
    }
    tile["BC"] = min(tile["BC"], tile["BD"])
    tile["PRECISION"] = "tf32x3" if dtype == torch.float32 else "tf32"
    tile["maxnreg"] = 255  # or the assembler spills a few registers to fit one block more
    return tile, kind == ONE_PASS


def rms_norm(call: RmsNormCall) -> tuple[Tensor, Tensor]:
    """``rms_norm_jvp`` of `_ops.py`."""
    x, weight, tangents, eps = call.arguments
    from knowedit_kernels.jvp.triton import rms_norm_kernel

    (rows, d), count = x.shape, len(tangents)
    y = torch.empty(rows, d, dtype=x.dtype, device=x.device)
    dy = torch.empty(count, rows, d, dtype=x.dtype, device=x.device)
    if x.numel():
        _device.launch(
            rms_norm_kernel, (rows, max(1, _ceil(count, GROUP))), x.device,
            x, weight, tangents, y, dy, count, d, eps,
            x.stride(0), tangents.stride(0), tangents.stride(1), **rms_tile(d),
        )  # fmt: skip
    return y, dy


def swiglu(call: SwigluCall) -> tuple[Tensor, Tensor]:
    """``swiglu_jvp`` of `_ops.py`."""
    gate, up, gate_tangents, up_tangents = call.arguments
    from knowedit_kernels.jvp.triton import swiglu_kernel

    (rows, d), count = gate.shape, len(gate_tangents)
    y = torch.empty(rows, d, dtype=gate.dtype, device=gate.device)
    dy = torch.empty(count, rows, d, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        grid = (rows * _ceil(d, SWIGLU_TILE["BD"]), max(1, _ceil(count, GROUP)))
        strides = [size for t in (gate_tangents, up_tangents) for size in t.stride()[:2]]
        _device.launch(
            swiglu_kernel, grid, gate.device, gate, up, gate_tangents, up_tangents, y, dy,
            count, rows, d, gate.stride(0), up.stride(0), *strides, **SWIGLU_TILE,
        )  # fmt: skip
    return y, dy


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``attention_jvp`` of `_ops.py`. The softmax's statistics first, unless one pass can
    do all.
    """
    q, k, v, tq, tk, tv, spans, causal, scale = call.arguments
    from knowedit_kernels.jvp.triton import attention_kernel

    (batch, heads, queries, d), (shared, keys) = q.shape, k.shape[1:3]
    count = next((len(t) for t in (tq, tk, tv) if t is not None), 0)
    tile, one_pass = attention_tile(q.dtype, d)
    two_passes = count > (1 if one_pass else 0)
    # the second pass multiplies what it reads of o by the mean of s', and must not see it rounded
    o = torch.empty(q.shape, dtype=torch.float32 if two_passes else q.dtype, device=q.device)
    do = torch.empty(count, *q.shape, dtype=q.dtype, device=q.device)
    peaks = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not q.numel():
        return o.to(q.dtype), do
    if (tk is None) != (tv is None):
        tk, tv = (torch.zeros_like(other) if t is None else t for t, other in ((tk, tv), (tv, tk)))
    spans = None if spans is None else spans.to(torch.int32).contiguous()

    def launch(known: bool, tangents: int) -> None:
        moving = (tq, tk, tv) if tangents else (None, None, None)
        strides = [(*x.stride()[:3], 0) for x in (q, k, v)]
        strides += [(0, 0, 0, 0) if t is None else (*t.stride()[1:4], t.stride(0)) for t in moving]
        grid = (_ceil(queries, tile["BM"]) * batch * heads, max(1, tangents))
        _device.launch(
            attention_kernel, grid, q.device, q, k, v, *moving, o, do, peaks, spans, *strides,
            heads, heads // shared, queries, keys,
            keys - (0 if moving[1] is None else moving[1].shape[3]), d, scale, KNOWN=known,
            WITH_TQ=moving[0] is not None, WITH_TKV=moving[1] is not None, CAUSAL=causal,
            SPANS=spans is not None, **tile,
        )  # fmt: skip

    launch(False, 0 if two_passes else count)
    if two_passes:
        launch(True, count)
    return o.to(q.dtype), do


def _draw(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, mean: float = 0.0
) -> Tensor:
    """Normal entries; `mean` adds a direction that all rows share, as keys and values of language
    models do.
    """
    x, row = (torch.randn(size, generator=generator, device="cpu") for size in (shape, shape[-1:]))
    return (x + mean * row).to(dtype)


def _failure(
    device: torch.device, op: str, got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]
) -> str | None:
    for name, value, truth in zip((op, f"tangents of {op}"), got, wanted):
        limit = tangent_error(op, value.dtype)
        if (
            truth.numel()
            and not (off := float((value.double().cpu() - truth).norm() / truth.norm())) <= limit
        ):
            return f"{name} off by {off:.2g} > {limit:.2g}"
    return None


def rms_norm_gate(device: torch.device) -> str | None:
    """Ragged rows, more tangents than a program takes, against float64; returns what failed, or
    None.
    """
    generator = torch.Generator().manual_seed(7)
    for dtype in DTYPES:
        for rows, d, count in ((5, 70, 11), (3, 2100, 2)):
            x, t = (_draw(shape, dtype, generator, 1.0) for shape in ((rows, d), (count, rows, d)))
            w = _draw((d,), dtype, generator)
            wanted = reference.tangents(
                lambda x, w=w: reference.rms_norm(x, w.double(), 0.3), (x,), (t,)
            )
            got = rms_norm(RmsNormCall(x.to(device), w.to(device), t.to(device), 0.3))
            if failure := _failure(device, "rms_norm", got, wanted):
                return f"{dtype} [{count}, {rows}, {d}]: {failure}"
    return None


def swiglu_gate(device: torch.device) -> str | None:
    """As `rms_norm_gate`."""
    generator = torch.Generator().manual_seed(7)
    for dtype in DTYPES:
        for rows, d, count in ((5, 70, 11), (3, 2100, 2)):
            primals = tuple(_draw((rows, d), dtype, generator) * 2 for _ in range(2))
            moved = tuple(_draw((count, rows, d), dtype, generator) for _ in range(2))
            wanted = reference.tangents(reference.swiglu, primals, moved)
            if failure := _failure(
                device,
                "swiglu",
                swiglu(SwigluCall(*(x.to(device) for x in primals + moved))),
                wanted,
            ):
                return f"{dtype} [{count}, {rows}, {d}]: {failure}"
    return None


def attention_cases(generator: torch.Generator) -> Iterator[tuple[str, list[Any]]]:
    """(what, arguments of `AttentionCall`): shared keys, padding, constant prefixes, one tangent
    and several, every tile.
    """
    for dtype in DTYPES:
        for d, count, queries, first, causal, padded in (
            (40, 2, 70, 30, True, True),
            (64, 1, 70, 0, True, False),
            (128, 2, 33, 57, False, True),
            (200, 1, 20, 40, True, False),
        ):
            if _kind(dtype, d) is None:
                continue
            q = _draw((2, 2, queries, d), dtype, generator)
            k, v = (_draw((2, 1, 75, d), dtype, generator, 2.0) for _ in range(2))
            tq, tk, tv = (_draw((count, *x.shape), dtype, generator, 1.0) for x in (q, k, v))
            spans = torch.tensor([[3, 75], [0, 61]], device="cpu") if padded else None
            given = [
                q,
                k,
                v,
                tq,
                tk[..., first:, :],
                tv[..., first:, :],
                spans,
                causal,
                1.5 * d**-0.5,
            ]
            yield f"{dtype}, {count} tangents, heads of {d}", given


def attention_gate(device: torch.device) -> str | None:
    """Every case against float64; returns what failed, or None."""
    for what, given in attention_cases(torch.Generator().manual_seed(7)):
        q, k, v, tq, tk, tv, spans, causal, scale = given
        whole = [torch.nn.functional.pad(t, (0, 0, k.shape[2] - t.shape[3], 0)) for t in (tk, tv)]
        function = functools.partial(reference.attention, causal=causal, scale=scale, spans=spans)
        wanted = reference.tangents(function, (q, k, v), (tq, *whole))
        moved: list[Any] = [x.to(device) if isinstance(x, Tensor) else x for x in given]
        if failure := _failure(device, "attention", attention(AttentionCall(*moved)), wanted):
            return f"{what}: {failure}"
    return None


Run = Callable[[Any], tuple[Tensor, Tensor]]


def _candidate(
    run: Run, gate: Callable[[torch.device], str | None], refuse: Callable[[Tensor], str | None]
) -> Candidate:
    def verify(call: Call) -> str | None:
        first, *others = call.arguments
        if first.dtype not in DTYPES:
            return f"no kernel for {first.dtype}"
        if reason := refuse(first):
            return reason
        tensors = [x for x in (first, *others) if isinstance(x, Tensor) and x.is_floating_point()]
        if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in tensors):
            return "an argument has strided rows"
        if _device.triton_version() is None:
            return "Triton is not installed"
        return _gate.unproven(
            f"{run.__name__}_jvp.triton", ("jvp/triton.py", "jvp/gpu.py"), first.device, gate
        )

    return Candidate("triton", run, verify, device="cuda")


def _too_wide(x: Tensor) -> str | None:
    return (
        f"rows of more than {WIDEST} entries do not fit into registers"
        if x.shape[-1] > WIDEST
        else None
    )


def _no_tile(q: Tensor) -> str | None:
    return (
        f"no tile for heads of {q.shape[-1]} entries in {q.dtype}"
        if _kind(q.dtype, q.shape[-1]) is None
        else None
    )


RMS_NORM = _candidate(rms_norm, rms_norm_gate, _too_wide)
SWIGLU = _candidate(swiglu, swiglu_gate, lambda gate: None)
ATTENTION = _candidate(attention, attention_gate, _no_tile)
