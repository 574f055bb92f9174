"""Launching the Triton kernels, and the accuracy gate they pass on a device before anything relies
on them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from knowedit_kernels import _device, _gate, testing
from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.moments import audit as _audit
from knowedit_kernels.moments import reference, schedule, tuned
from knowedit_kernels.moments.call import MomentCall, PackCall
from knowedit_kernels.moments.cpu import panels_
from knowedit_kernels.moments.functional import mirror_
from knowedit_kernels.numerics import MOMENT, MOMENT_FP64, Budget

# The gate's limits: the budget, with room for the scatter of a mean over so few channels.
GATE = Budget(normwise=2.5 * MOMENT.normwise, elementwise=MOMENT.elementwise, bias=MOMENT.bias)
_SOURCES = (
    "moments/triton.py",
    "moments/schedule.py",
    "moments/gpu.py",
    "moments/tuned.py",
    "triton_lib/products.py",
)
VARIANTS = (
    (torch.bfloat16, "exact"),
    (torch.float16, "exact"),
    (torch.float32, "exact"),
    (torch.float32, "fp32"),
    (torch.float64, "exact"),
)


def capability(device: torch.device) -> int:
    """10 major + minor of a CUDA device; 80 elsewhere, for the interpreter."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def accumulate_(call: MomentCall) -> None:
    """c += K^T K on the lower triangle of every layer's c [d, d] float64; layers of one shape share
    a launch.
    """
    precision = call.precision
    wide = [
        key.double()
        if precision == "fp64" or (precision != "fast" and len(key) < schedule.FEW_TOKENS)
        else key
        for key in call.keys
    ]
    for group, rows in groups(call.cs, wide):
        dim, dtype, device = rows[0].shape[1], rows[0].dtype, rows[0].device
        if dtype == torch.float64 and capability(device) >= 100:
            # Triton 3.6 cannot compile a float64 product for sm_100
            panels_(MomentCall(group, rows, precision))
            continue
        aligned = dim * dtype.itemsize % 16 == 0
        config = schedule.config(dtype, precision, capability(device), min(map(len, rows)), aligned)
        config = tuned.refine(config, dtype, dim, device)
        programs = len(schedule.tile_table(dim, len(group), config.tile))
        split_(group, rows, programs, functools.partial(launch_, config=config))


def groups(
    cs: Sequence[torch.Tensor], keys: Sequence[torch.Tensor]
) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Layers that may share a launch: (their c, their keys, dense and starting on 16 bytes);
    without empty ones.
    """
    found: dict[tuple[Any, ...], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for c, key in zip(cs, keys):
        key = key.contiguous()
        key = key.clone() if key.data_ptr() % 16 else key  # the kernels load 16 bytes at a time
        if key.numel():
            some, theirs = found.setdefault((c.shape[0], c.stride(0), key.dtype), ([], []))
            some.append(c)
            theirs.append(key)
    return list(found.values())


def split_(
    cs: list[torch.Tensor],
    keys: list[torch.Tensor],
    programs: int,
    launch: Callable[[list[torch.Tensor], list[torch.Tensor]], None],
) -> None:
    """`launch(cs, keys)`; if its `programs` are too few for the device, over token ranges with sums
    of their own.
    """
    pieces = schedule.splits(programs, min(map(len, keys)), _device.processors(keys[0].device))
    if pieces == 1:
        return launch(cs, keys)
    parts = [torch.zeros_like(c) for c in cs for _ in range(pieces)]
    launch(parts, [cut for key in keys for cut in key.tensor_split(pieces)])
    for i, part in enumerate(parts):  # in a fixed order
        cs[i // pieces] += part


def launch_(
    cs: Sequence[torch.Tensor], keys: Sequence[torch.Tensor], config: schedule.Config
) -> None:
    """One launch over dense `keys` [tokens, d] of one dtype and d, and `cs` [d, d] of one row
    stride.
    """
    import triton
    import triton.language as tl

    from knowedit_kernels.moments.triton import second_moment_kernel

    dim, device = keys[0].shape[1], keys[0].device
    table = schedule.tile_table(dim, len(cs), config.tile, None, device)
    key_addresses, c_addresses, tokens = _device.tables(
        device,
        (torch.int64, [key.data_ptr() for key in keys]),
        (torch.int64, [c.data_ptr() for c in cs]),
        (torch.int32, [len(key) for key in keys]),
    )
    if config.tma and device.type == "cuda":
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
        )
    options: dict[str, Any] = config.constants()
    _device.launch(
        second_moment_kernel, (len(table),), device,
        key_addresses, c_addresses, tokens, table, dim, keys[0].stride(0), cs[0].stride(0),
        KEY=getattr(tl, str(keys[0].dtype).removeprefix("torch.")), EVEN=dim % config.tile == 0,
        **options,
    )  # fmt: skip


def pack_(call: PackCall) -> None:
    """out = keys[rows] with the audit on the way; see `_ops`. Partial sums are added in a fixed
    order.
    """
    from knowedit_kernels.moments.triton import pack_kernel

    out, audit, keys, rows, signs = call.arguments
    count, dim, block = (len(keys) if rows is None else len(rows)), keys.shape[1], 16
    if count == 0:
        return
    programs = -(-count // block)
    partial = torch.empty(programs, 1 + _audit.PROBES, dtype=torch.float64, device=keys.device)
    unused = partial
    _device.launch(
        pack_kernel, (programs,), keys.device,
        unused if out is None else out, partial, keys, unused if rows is None else rows, signs,
        count, dim, keys.stride(0), R=block, W=128, GATHER=rows is not None,
        STORE=out is not None, num_warps=4,
    )  # fmt: skip
    audit += partial.sum(0)


def gate_keys(tokens: int, dim: int) -> torch.Tensor:
    """SiLU-gated activations with a mean, float32 [tokens, dim] on the CPU: the hard case for long
    sums.
    """
    generator = torch.Generator().manual_seed(dim)
    gate, up = (torch.randn(tokens, dim, generator=generator, device="cpu") for _ in range(2))
    return torch.nn.functional.silu(gate) * up + 0.05


def gate(device: torch.device) -> str | None:
    """Runs every variant on small ragged inputs against float64; returns what failed, with figures,
    or None.
    """
    if failure := _gate_tuned(device):
        return failure
    for dim, tokens in ((40, 3), (264, schedule.FEW_TOKENS + 37), (136, schedule.MANY_TOKENS + 5)):
        raw = gate_keys(tokens, dim)
        for dtype, precision in VARIANTS:
            keys = raw.to(dtype)
            few = tokens < schedule.FEW_TOKENS
            seen = reference.two_parts(keys) if precision == "fp32" and not few else keys
            c = torch.zeros(dim, dim, dtype=torch.float64, device=device)
            accumulate_(MomentCall([c], [keys.to(device)], precision))
            graded = testing.grade_moment(mirror_(c.cpu()), reference.second_moment(seen))
            if failures := graded.failures(MOMENT_FP64 if few or dtype == torch.float64 else GATE):
                return (
                    f"{precision} second moment of {dtype} keys [{tokens}, {dim}]: "
                    f"{'; '.join(failures)}"
                )
            if failure := _gate_pack(keys, device):
                return failure
    return None


def _gate_tuned(device: torch.device) -> str | None:
    """Every entry of the device's tuned table."""
    for dtype, entry in itertools.product((torch.bfloat16, torch.float16), tuned.entries(device)):
        keys = gate_keys(schedule.FEW_TOKENS + 37, 264).to(dtype)
        config = entry.sizes(schedule.config(dtype, "exact", capability(device), len(keys)))
        c = torch.zeros(264, 264, dtype=torch.float64, device=device)
        launch_([c], [keys.to(device)], config)
        if failures := testing.grade_moment(
            mirror_(c.cpu()), reference.second_moment(keys)
        ).failures(GATE):
            return f"second moment of {dtype} keys with {entry}: {'; '.join(failures)}"
    return None


def _gate_pack(keys: torch.Tensor, device: torch.device) -> str | None:
    count, dim = keys.shape
    sums = torch.zeros(1 + _audit.PROBES, dtype=torch.float64, device=device)
    out = testing.poisoned_empty(count, dim, dtype=keys.dtype, device=device)
    rows = torch.arange(count - 1, -1, -1, device=device)
    pack_(PackCall(out, sums, keys.to(device), rows, _audit.signs(dim, device)))
    if not torch.equal(out.cpu(), keys.flip(0)):
        return f"packing of {keys.dtype} keys [{count}, {dim}] is not a copy"
    audit = _audit.compare(reference.second_moment(keys), sums.cpu(), count)
    return (
        None if audit.ok(MOMENT_FP64) else f"audit of {keys.dtype} keys [{count}, {dim}]: {audit}"
    )


def _unproven(device: torch.device) -> str | None:
    if _device.triton_version() is None:
        return "Triton is not installed"
    return _gate.unproven("moments.triton", (*_SOURCES, *tuned.sources(device)), device, gate)


def _verify(call: MomentCall) -> str | None:
    if any(c.data_ptr() % 16 for c in call.cs):
        return "c does not start on 16 bytes"
    return _unproven(call.keys[0].device) if call.keys else None


def _verify_pack(call: PackCall) -> str | None:
    return _unproven(call.keys.device)


TRITON = Candidate("triton", accumulate_, _verify, device="cuda")
TRITON_PACK = Candidate("triton", pack_, _verify_pack, device="cuda")
