"""Launching the Triton kernel, and the gate it passes on a device before anything relies on it.

The factors are split into bfloat16 parts here and stacked along the rank, small products first, so
that the kernel sees one plain bfloat16 product whose terms are exact in float32: three products
(relative error 2^-16 of the update) for bfloat16 weights, six (2^-24) for float16 and float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from knowedit_kernels import _device, _gate, numerics
from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.lowrank import blocked
from knowedit_kernels.lowrank.call import UpdateCall
from knowedit_kernels.lowrank.reference import grade_update
from knowedit_kernels.lowrank.rounding import ROUNDS

BM, BN, BR = 64, 64, 32  # rows and columns of a tile, step along the rank
TILES = 8  # column tiles a program walks: amortises its sums, keeps probe partials small
WARPS, STAGES = 8, 3
PARTS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 3}
_FIELDS = 7  # pointers per weight: w, base, residual, u, v, probe, error
_PROBES = 64  # keys per launch: more would spill registers


def split(x: Tensor, parts: int) -> list[Tensor]:
    """float32 as a sum of bfloat16 tensors, largest first: 8 bits each."""
    out: list[Tensor] = []
    for _ in range(parts):
        out.append(x.to(torch.bfloat16))
        x = x - out[-1].float()
    return out


def stack(u: Tensor, v: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """a [out, R], b [in, R] bfloat16: a b^T = u v^T up to 2^(-8 parts), small products first; R a
    multiple of BR.
    """
    us, vs = split(u, parts), split(v, parts)
    pairs = [(i, total - i) for total in reversed(range(parts)) for i in range(total + 1)]
    pad = (0, -len(pairs) * u.shape[1] % BR)
    a = torch.cat([us[i] for i, _ in pairs], dim=1)
    b = torch.cat([vs[j] for _, j in pairs], dim=1)
    return torch.nn.functional.pad(a, pad), torch.nn.functional.pad(b, pad)


def update_(call: UpdateCall) -> None:
    """Runs ``low_rank_update_`` of `_ops.py`; weights of one dtype share a launch."""
    call.check_factors()
    if call.sums is not None:
        call.sums.zero_()
    widest = max((keys.shape[1] for keys in call.probe), default=0)
    for start in range(0, max(widest, 1), _PROBES):  # only the last launch writes
        part = replace(
            call,
            probe=[k[:, start : start + _PROBES].float().mT.contiguous() for k in call.probe],
            errors=[error[:, start : start + _PROBES] for error in call.errors],
            write=call.write and start + _PROBES >= widest,
        )
        for dtype in dict.fromkeys(tensor.dtype for tensor in call.w):
            members = [i for i, w in enumerate(call.w) if w.dtype == dtype and w.numel()]
            if members:
                _launch(members, part)
    call.take_prints()


def _launch(members: list[int], call: UpdateCall) -> None:
    """One launch over the weights `members`, of one dtype; probes of `call` are transposed,
    [p, in].
    """
    import triton.language as tl

    from knowedit_kernels.lowrank.triton import update_kernel

    w, probe, measure = call.w, call.probe, call.sums is not None
    base, plane = call.base or w, call.residual or w
    device, dtype = w[members[0]].device, w[members[0]].dtype
    pointers: list[int] = []
    shapes: list[int] = []
    alive, aligned = [], True
    for i in members:
        (M, N), P = w[i].shape, len(probe[i]) if probe else 0
        a, b = stack(call.u[i], call.v[i], PARTS[dtype])
        chunks = _ceil(_ceil(N, BN), TILES)
        partial = torch.empty(chunks, M, P, dtype=torch.float32, device=device)
        tensors = (w[i], base[i], plane[i], a, b, probe[i] if probe else a, partial)
        alive.append((i, tensors, chunks * _ceil(M, BM)))
        pointers += [tensor.data_ptr() for tensor in tensors]
        strides = [tensor.stride(0) for tensor in tensors[:3]]
        aligned = aligned and not any(size % 16 for size in (N, *strides))
        shapes += [M, N, a.shape[1], P, i, *strides]
    tables = _device.tables(device, (torch.int64, pointers), (torch.int32, shapes))
    programs = program_table(tuple(tuple(w[i].shape) for i in members), BM, BN * TILES, device)
    out = torch.empty(len(programs) if measure else 0, 5, dtype=torch.float64, device=device)
    most = max(len(probe[i]) for i in members) if probe else 0
    _device.launch(
        update_kernel, (len(programs),), device, *tables, programs, out, call.seed,
        DT=getattr(tl, str(dtype).removeprefix("torch.")), ROUNDING=call.rounding,
        COMPENSATED=call.rounding == "compensated", WRITE=call.write, MEASURE=measure,
        BP=max(16, 1 << (most - 1).bit_length()) if most else 0, ALIGNED=aligned, ROUNDS=ROUNDS,
        FIELDS=_FIELDS, BM=BM, BN=BN, BR=BR, TILES=TILES, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    first = 0
    for i, tensors, count in alive:
        if call.sums is not None:
            call.sums[i] = out[first : first + count].sum(0)
        if probe:
            call.errors[i].copy_(tensors[-1].sum(0))
        first += count


@functools.lru_cache(maxsize=64)
def program_table(
    shapes: tuple[tuple[int, ...], ...], height: int, width: int, device: torch.device
) -> Tensor:
    """int32 [programs, 3] of (entry, row, column): the blocks [height, width] of weights of these
    shapes. The same for every update of a model's weights, so it is made and copied once.
    """
    parts = []
    for entry, (rows, columns) in enumerate(shapes):
        chunks = _ceil(columns, width)
        program = torch.arange(_ceil(rows, height) * chunks, dtype=torch.int32, device="cpu")
        where = (torch.full_like(program, entry), program // chunks, program % chunks)
        parts.append(torch.stack(where, 1))
    return torch.cat(parts).to(device)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu")


def gate(device: torch.device) -> str | None:
    """Every dtype and rounding on ragged weights, with probe keys, against float64; returns what
    failed, or None.
    """
    generator = torch.Generator().manual_seed(7)
    for (rows, columns), rank in (((70, 600), 3), ((200, 136), 40)):
        U, V = (_draw(generator, size, rank) * 0.1 for size in (rows, columns))
        keys = _draw(generator, columns, 70)
        for dtype in PARTS:
            for rounding in (
                ("nearest", "stochastic", "compensated") if dtype.itemsize == 2 else ("nearest",)
            ):
                W = _draw(generator, rows, columns).to(dtype)
                if failures := _failures(W, U, V, keys, rounding, device):
                    return (
                        f"{rounding} update of {dtype} [{rows}, {columns}], rank {rank}: "
                        f"{'; '.join(failures)}"
                    )
    return None


def _failures(
    W: Tensor, U: Tensor, V: Tensor, keys: Tensor, rounding: str, device: torch.device
) -> list[str]:
    def run(
        implementation: Callable[[UpdateCall], None], where: torch.device, measure: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        w, u, v, k = (x.to(where, copy=True) for x in (W, U, V, keys))
        planes = [torch.zeros_like(w, dtype=torch.bfloat16)] if rounding == "compensated" else []
        sums, error = (
            w.new_empty(1, 5, dtype=torch.float64),
            w.new_empty(len(W), keys.shape[1], dtype=torch.float32),
        )
        seen = ([k], True, sums, [error]) if measure else ([], True, None, [])
        implementation(UpdateCall([w], [], [u], [v], rounding, 3, planes, *seen))
        return w.cpu(), sums.cpu(), error.double().cpu()

    w, sums, error = run(update_, device)
    _, expected_sums, expected_error = run(blocked.update_, torch.device("cpu"))
    budget = (
        numerics.UPDATE_STOCHASTIC if rounding == "stochastic" else numerics.UPDATE_NEAREST[W.dtype]
    )
    failures = grade_update(w, W, U, V).failures(budget)
    plain = run(update_, device, measure=False)[0]
    failures += [f"unmeasured: {x}" for x in grade_update(plain, W, U, V).failures(budget)]
    # of a float32 weight the arithmetic's own rounding is as large as what it is to measure
    tolerance, allowed = (2e-3, 0.1) if W.dtype.itemsize == 2 else (0.05, 2.0)
    if not torch.allclose(sums, expected_sums, rtol=tolerance):
        failures.append(f"sums {sums.tolist()} instead of {expected_sums.tolist()}")
    if not (error - expected_error).norm() <= allowed * expected_error.norm():
        failures.append("what the probe saw differs")
    return failures


def _verify(call: UpdateCall) -> str | None:
    for name, tensors in (("weight", call.w), ("base", call.base), ("residual", call.residual)):
        for tensor in tensors:
            if tensor.dtype not in PARTS:
                return f"no kernel for {tensor.dtype} weights"
            if tensor.stride(1) != 1 or tensor.data_ptr() % 16:
                return f"a {name} has strided or unaligned rows"
    if len({tensor.device for tensor in call.w}) != 1:
        return "the weights are not all on one device"
    if _device.triton_version() is None:
        return "Triton is not installed"
    files = ("lowrank/triton.py", "lowrank/gpu.py", "triton_lib/rounding.py")
    return _gate.unproven("lowrank.triton", files, call.w[0].device, gate)


TRITON = Candidate("triton", update_, _verify, device="cuda")
