"""Launching the Triton kernels over the groups of a mixture, and the gate they pass first.

Rows are brought into the order of their groups once; then every group is a "layer" of
`triton.second_moment_kernel`, with a packed lower triangle and perhaps weights. Groups of few rows
take shorter chains or float64 (`schedule.grouped_config`), each kind in a launch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from knowedit_kernels import _device, _gate, testing
from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.moments import audit as _audit
from knowedit_kernels.moments import gpu, reference, schedule, triangle, tuned
from knowedit_kernels.moments.call import GroupedCall, RowAuditCall
from knowedit_kernels.moments.cpu import grouped_panels_
from knowedit_kernels.numerics import MOMENT_FP64

_SOURCES = (
    "moments/triton.py",
    "moments/schedule.py",
    "moments/grouped_gpu.py",
    "moments/gpu.py",
    "triton_lib/products.py",
)
_GATE_DIM = 136
_FLOAT64 = schedule.config(torch.float64, "exact", 80, 0)


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop`, all of one group, and the packed triangle they are added to."""

    start: int
    stop: int
    address: int


def accumulate_(call: GroupedCall) -> None:
    """c [groups, d (d + 1) / 2] += the moments of the groups' rows; see `_ops`."""
    keys, weights = _sorted(call)
    device, weighted = keys.device, weights is not None
    bounds = call.offsets.tolist()
    kinds: dict[schedule.Config | None, list[int]] = {}
    for group, rows in enumerate(call.offsets.diff().tolist()):
        if rows:
            found = schedule.grouped_config(
                keys.dtype, call.precision, gpu.capability(device), rows, weighted
            )
            kinds.setdefault(found, []).append(group)
    for config, groups in kinds.items():
        spans = [(bounds[group], bounds[group + 1]) for group in groups]
        if config is None:
            _float64_(call.c, groups, spans, keys, weights)
            continue
        if not weighted:
            config = tuned.refine(config, keys.dtype, keys.shape[1], device)
        _cut_(call.c, groups, spans, keys, weights, config)


def _sorted(call: GroupedCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows in the order of the groups, each starting on 16 bytes, and what is left to multiply
    them by: only the bfloat16 kernel does that, others get their rows multiplied.
    """
    keys, order, weights = call.keys, call.order, call.weights
    if order is not None:
        weights = None if weights is None else weights.index_select(0, order)
        keys = keys.index_select(0, order)
    if weights is not None and keys.dtype != torch.bfloat16:
        wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
        keys, weights = keys.to(wide) * weights.to(wide)[:, None], None
    return _aligned(keys), weights


def _aligned(keys: torch.Tensor) -> torch.Tensor:
    """keys [n, d] with every row on 16 bytes, copied if need be: the kernels load 16 at a time."""
    unit = 16 // keys.element_size()
    if keys.stride(1) == 1 and keys.stride(0) % unit == 0 and keys.data_ptr() % 16 == 0:
        return keys
    n, d = keys.shape
    padded = keys.new_empty(n, -(-d // unit) * unit)[:, :d]
    return padded.copy_(keys)


def _float64_(
    c: torch.Tensor,
    groups: Sequence[int],
    spans: Sequence[tuple[int, int]],
    keys: torch.Tensor,
    weights: torch.Tensor | None,
) -> None:
    """The same in float64, for the rows of `spans` alone."""
    rows = torch.cat([torch.arange(start, stop, device=keys.device) for start, stop in spans])
    wide = keys.index_select(0, rows).double()
    if weights is not None:
        wide *= weights.index_select(0, rows).double()[:, None]
    wide = _aligned(wide)
    sizes = torch.tensor([stop - start for start, stop in spans], device="cpu")
    ends = sizes.cumsum(0).tolist()
    if gpu.capability(keys.device) >= 100:  # Triton 3.6 cannot compile a float64 product there
        part = torch.zeros(len(groups), c.shape[1], dtype=torch.float64, device=c.device)
        offsets = torch.tensor([0, *ends], device="cpu")
        grouped_panels_(GroupedCall(part, wide, None, offsets, None, "fp64"))
        c[list(groups)] += part.to(c.dtype)
        return
    moved = [(end - size, end) for size, end in zip(sizes.tolist(), ends)]
    _cut_(c, groups, moved, wide, None, _FLOAT64)


def _cut_(
    c: torch.Tensor,
    groups: Sequence[int],
    spans: Sequence[tuple[int, int]],
    keys: torch.Tensor,
    weights: torch.Tensor | None,
    config: schedule.Config,
) -> None:
    """One launch, in which groups with far more rows than others are cut; the longest pieces go
    first.
    """
    tiles = len(schedule.tile_table(keys.shape[1], 1, config.tile))
    sizes = [stop - start for start, stop in spans]
    cuts = schedule.cut_rows(sizes, tiles, _device.processors(keys.device))
    extra = torch.zeros(sum(cuts) - len(cuts), c.shape[1], dtype=c.dtype, device=c.device)
    pieces: list[Piece] = []
    owners: list[int] = []
    for group, (start, stop), parts in zip(groups, spans, cuts):
        for i in range(parts):
            to = c[group] if i == 0 else extra[len(owners)]
            if i:
                owners.append(group)
            cut = [start + (stop - start) * k // parts for k in (i, i + 1)]
            pieces.append(Piece(cut[0], cut[1], to.data_ptr()))
    pieces.sort(key=lambda piece: piece.start - piece.stop)
    launch_(c, keys, weights, pieces, config)
    for part, group in zip(extra, owners):  # in a fixed order
        c[group] += part


def launch_(
    c: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor | None,
    pieces: Sequence[Piece],
    config: schedule.Config,
) -> None:
    """One launch over the pieces of aligned `keys` [n, d], with float32 weights [n] if they are
    bfloat16; `c` gives the type of the triangles.
    """
    import triton
    import triton.language as tl

    from knowedit_kernels.moments.triton import second_moment_kernel

    dim, device = keys.shape[1], keys.device
    table = schedule.tile_table(dim, len(pieces), config.tile, None, device)
    pitch = keys.stride(0) * keys.element_size()
    key_addresses, c_addresses, weight_addresses, tokens = _device.tables(
        device,
        (torch.int64, [keys.data_ptr() + piece.start * pitch for piece in pieces]),
        (torch.int64, [piece.address for piece in pieces]),
        (
            torch.int64,
            [] if weights is None else [weights.data_ptr() + piece.start * 4 for piece in pieces],
        ),
        (torch.int32, [piece.stop - piece.start for piece in pieces]),
    )
    if config.tma and device.type == "cuda":
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
        )
    options: dict[str, Any] = config.constants()
    _device.launch(
        second_moment_kernel, (len(table),), device,
        key_addresses, c_addresses, tokens, table, dim, keys.stride(0), dim,
        KEY=getattr(tl, str(keys.dtype).removeprefix("torch.")), EVEN=dim % config.tile == 0,
        weight_table=None if weights is None else weight_addresses,
        PACKED=getattr(tl, str(c.dtype).removeprefix("torch.")), **options,
    )  # fmt: skip


def row_audit_(call: RowAuditCall) -> None:
    """out = keys, with the audit of every row on the way; see `_ops`."""
    from knowedit_kernels.moments.triton import pack_kernel

    out, sums, keys, signs = call.arguments
    (count, dim), block = keys.shape, 16
    if count == 0:
        return
    _device.launch(
        pack_kernel, (-(-count // block),), keys.device,
        sums if out is None else out, sums, keys, sums, signs, count, dim, keys.stride(0),
        R=block, W=128, GATHER=False, STORE=out is not None, EACH=True, num_warps=4,
    )  # fmt: skip


def gate(device: torch.device) -> str | None:
    """Ragged groups of every kind, with and without weights, against float64; returns what failed,
    with figures, or None.
    """
    counts = torch.tensor(
        [0, 3, schedule.FEW_ROWS + 9, schedule.FEW_TOKENS + 5, schedule.FEW_ROWS * 3], device="cpu"
    )
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    n = int(counts.sum())
    order = torch.arange(n, device="cpu").flip(0)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(0), device="cpu")
    for dtype in dict.fromkeys(dtype for dtype, _ in gpu.VARIANTS):
        for gates in (None, weights):
            keys = gpu.gate_keys(n, _GATE_DIM).to(dtype)
            size = triangle.size(_GATE_DIM)
            c = torch.zeros(len(counts), size, dtype=torch.float64, device=device)
            there = None if gates is None else gates.to(device)
            call = GroupedCall(c, keys.to(device), order.to(device), offsets, there, "exact")
            accumulate_(call)
            some = None if gates is None else gates[order]
            exact = reference.grouped_moment(keys[order], offsets, some)
            for group, rows in enumerate(counts.tolist()):
                ours = triangle.symmetric(c[group].cpu(), _GATE_DIM)
                wide = dtype == torch.float64 or rows < schedule.FEW_ROWS
                graded = testing.grade_moment(ours, exact[group])
                if failures := graded.failures(MOMENT_FP64 if wide else gpu.GATE):
                    kind = "" if gates is None else " with weights"
                    return (
                        f"second moment of {rows} of {n} {dtype} keys{kind}: {'; '.join(failures)}"
                    )
    return _gate_rows(device)


def _gate_rows(device: torch.device) -> str | None:
    keys, signs = gpu.gate_keys(37, 136).bfloat16(), _audit.signs(136)
    out = testing.poisoned_empty(37, 136, dtype=keys.dtype, device=device)
    sums = testing.poisoned_empty(37, 1 + _audit.PROBES, dtype=torch.float64, device=device)
    row_audit_(RowAuditCall(out, sums, keys.to(device), signs.to(device)))
    wide = keys.double()
    exact = torch.cat([wide.square().sum(1, keepdim=True), (wide @ signs.T).square()], 1)
    if not torch.equal(out.cpu(), keys) or not torch.allclose(sums.cpu(), exact, rtol=1e-11):
        return "the audit of rows [37, 136] is wrong"
    return None


def _unproven(device: torch.device) -> str | None:
    if _device.triton_version() is None:
        return "Triton is not installed"
    files = (*_SOURCES, *tuned.sources(device))
    return _gate.unproven("moments.grouped", files, device, gate)


TRITON = Candidate("triton", accumulate_, lambda call: _unproven(call.keys.device), device="cuda")
TRITON_ROW_AUDIT = Candidate(
    "triton", row_audit_, lambda call: _unproven(call.keys.device), device="cuda"
)
