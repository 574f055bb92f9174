"""Every op of the package: its schema and what it returns for fake tensors. The one page to read
first.

An op is defined here once. A *dispatched* op is a public entry: it goes through `_dispatch`, which
picks an implementation registered by the op's folder. A *compiled* op has its kernel in `csrc`,
which fills in the CPU or CUDA key when the extension is loaded; call it only behind a verifier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from knowedit_kernels import _dispatch

LIBRARY = torch.library.Library("knowedit", "DEF")


def _mutates_only(*args: Any, **kwargs: Any) -> None:
    """The fake of an op that returns nothing: its effect is on its arguments, whose
    metadata stay.
    """


_written: dict[str, tuple[int, ...]] = {}  # of every op, the places of the arguments it writes


def _counted(
    name: str, op: torch._ops.OpOverload, keys: torch._C.DispatchKeySet, *args: Any
) -> Any:
    """Runs an op that writes, and counts the writes in its tensors' versions, as torch's own ops
    do: what autograd has saved of them is then known to be stale.
    """
    with torch._C._AutoDispatchBelowADInplaceOrView():
        result = op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)
    _count_writes(name, args)
    return result


def _count_writes(name: str, args: tuple[Any, ...]) -> None:
    written: list[torch.Tensor] = []
    for place in _written[name]:
        value = args[place]
        written += [value] if isinstance(value, torch.Tensor) else value or ()
    torch.autograd.graph.increment_version([x for x in written if not x.is_inference()])


def run(name: str, tensors: Sequence[torch.Tensor], *args: Any) -> Any:
    """Runs a dispatched op on `args`, among them `tensors`, of which autograd tracks none.

    Nobody listening at torch's dispatcher, the implementation is called straight away: the same
    work and the same count of writes, without what torch's layers of Python cost (as much again).
    """
    if _listened(tensors):
        return getattr(torch.ops.knowedit, name)(*args)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        result = _dispatch.run(name, *args)
    _count_writes(name, args)
    return result


def _listened(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a compiler, a transform (vmap), a mode (fake tensors, a counter of operations) or a
    subclass of Tensor must see the op itself.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(type(tensor) is not torch.Tensor for tensor in tensors)
    )


def _define(
    schema: str,
    fake: Callable[..., Any] = _mutates_only,
    *,
    compiled: bool = False,
    counted: bool = True,
) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    op = getattr(torch.ops.knowedit, name).default
    infos = [argument.alias_info for argument in op._schema.arguments]
    _written[name] = tuple(i for i, info in enumerate(infos) if info and info.is_write)
    if op._schema.is_mutable and counted:
        count = functools.partial(_counted, name, op)
        LIBRARY.impl(name, count, "ADInplaceOrView", with_keyset=True)
    if not compiled:
        LIBRARY.impl(name, functools.partial(_dispatch.run, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"knowedit::{name}", fake, lib=LIBRARY)


# moments: the lower triangle of every c [d, d] float64 += keys^T keys, keys [tokens, d]; several
# layers at once. precision as in moments.PRECISIONS
_define("second_moment_(Tensor(a!)[] c, Tensor[] keys, str precision) -> ()")
# the `SecondMoment`s with these numbers take in keys[i] [..., d] where mask [...] is True (None:
# everywhere). Their state is Python's, so the op writes nothing that a compiler sees; the turns, a
# tensor of each moment, are declared written so that updates are neither dropped nor reordered.
_define("moment_update_(Tensor(a!)[] turns, Tensor[] keys, Tensor? mask, int[] moments) -> ()")
# out = keys[rows] (or only the audit when out is None; all rows when rows is None), and
# audit[0] += sum of squares, audit[1 + p] += sum over rows of (key . signs[p])^2; signs [4, d],
# audit [5], float64
_define(
    "moment_pack_(Tensor(a!)? out, Tensor(b!) audit, Tensor keys, Tensor? rows, Tensor signs) -> ()"
)
# their C++ kernels; arithmetic as in csrc/cpu/syrk.h (0 exact, 1 fast, 2 float64), isa as in isa.h
# (0 generic, 1 AVX2, 2 AVX-512, 3 AVX-512 BF16)
_define("syrk_cpu_(Tensor(a!) c, Tensor keys, int arithmetic, int isa) -> ()", compiled=True)
_define(
    "pack_cpu_(Tensor(a!)? out, Tensor(b!) audit, Tensor keys, Tensor? rows, Tensor signs, int "
    "isa) -> ()",
    compiled=True,
)

# moments of groups of rows (experts): c [groups, d (d + 1) / 2] float64 or float32, each a lower
# triangle row by row, += sum of weights^2 key^T key over the rows of its group, keys [n, d]. order
# int64 [n] lists the rows sorted by group (None: they are), offsets int64 [groups + 1] on the host
# says where each group starts in it
_define(
    "grouped_moment_(Tensor(a!) c, Tensor keys, Tensor? order, Tensor offsets, Tensor? weights, "
    "str precision) -> ()"
)
# out = keys (unless None), and of every row: sums [n, 5] float64 = its square, and the squares of
# its products with signs [4, d] float64
_define("row_audit_(Tensor(a!)? out, Tensor(b!) sums, Tensor keys, Tensor signs) -> ()")

# their C++ kernels
_define(
    "grouped_syrk_cpu_(Tensor(a!) c, Tensor keys, Tensor? order, Tensor offsets, Tensor? weights, "
    "int arithmetic, int isa) -> ()",
    compiled=True,
)
_define(
    "row_audit_cpu_(Tensor(a!)? out, Tensor(b!) sums, Tensor keys, Tensor signs, int isa) -> ()",
    compiled=True,
)

# the CUDA kernel for Hopper, bfloat16 or float16 keys; tiles int32 [programs, 4] of
# schedule.tile_table, chains of first, first, 2 first, ... chain tokens (chain 0: a single
# uncentred one)
_define(
    "syrk_cuda_(Tensor(a!)[] c, Tensor[] keys, Tensor tiles, int chain, int first) -> ()",
    compiled=True,
)

# lowrank: every w = round((base or w) + residual + u v^T), residual = what rounding cut off; w
# [out, in], u [out, r], v [in, r] float32 (float64 if w is), rounding "nearest" | "stochastic" |
# "compensated"; base, residual (bfloat16) and probe [in, p] are parallel to w or empty. Fills,
# where given (probes need it), sums [weights, 5] float64 (ideal^2, applied^2, (applied - ideal)^2,
# changed, not finite) and, per probe, errors [out, p] float32 = (applied - ideal) @ probe; prints
# [weights, 2] int64: the fingerprints (lowrank/fingerprint.py) of what was written
_define(
    "low_rank_update_(Tensor(a!)[] w, Tensor[] base, Tensor[] u, Tensor[] v, str rounding, int "
    "seed, "
    "Tensor(b!)[] residual, Tensor[] probe, bool write, Tensor(c!)? sums, Tensor(d!)[] errors, "
    "Tensor(e!)? prints) -> ()"
)
# its C++ kernel, one weight; rounding 0 nearest, 1 stochastic, 2 compensated; stream numbers the
# weight, and its row of sums [weights, 5] and prints, to which keys belong. Refuses NaN and
# infinity in u and v
_define(
    "low_rank_cpu_(Tensor(a!) w, Tensor base, Tensor u, Tensor v, int rounding, int seed, int "
    "stream, "
    "Tensor(b!)? residual, Tensor? probe, bool write, Tensor(c!)? sums, Tensor(d!)? error, "
    "Tensor(e!)? prints, Tensor? keys, int isa) -> ()",
    compiled=True,
)
_DECLINED = ("CompositeExplicitAutograd", "FuncTorchDynamicLayerFrontMode", "Python", "Negative")
# its C++ kernel for plain updates of one weight (lowrank/direct.py): w += u v^T to nearest, not
# measured, as every argument costs a tenth of a microsecond or more; and with any rounding,
# measured where sums [5] are given. False, and nothing written, for anything out of the ordinary:
# where there is no kernel, where a transform or a mode listens, who then hears the op above, and of
# a view that negates
for schema in (
    "low_rank_add_cpu_(Tensor(a!) w, Tensor u, Tensor v) -> bool",
    "low_rank_add_as_cpu_(Tensor(a!) w, Tensor u, Tensor v, int rounding, int seed, "
    "Tensor(b!)? residual, Tensor(c!)? sums) -> bool",
):
    _define(schema, lambda *args: False, compiled=True, counted=False)
    for key in _DECLINED:
        LIBRARY.impl(schema.partition("(")[0], lambda *args: False, key)
    for key in ("Autograd", "ADInplaceOrView"):  # its caller counts the write
        LIBRARY.impl(schema.partition("(")[0], torch.library.fallthrough_kernel, key)
# whether contiguous float32 tensors hold finite numbers alone
_define("all_finite_cpu(Tensor[] x) -> bool", lambda x: True, compiled=True)
# the sums of lowrank/fingerprint.py over a weight's scrambled rows: out [2], keys [lanes], int64
_define("fingerprint_cpu_(Tensor(a!) out, Tensor weight, Tensor keys) -> ()", compiled=True)


def _target_losses(hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    row, state = hidden.new_empty(hidden.shape[0], dtype=work), torch.empty_like(hidden, dtype=work)
    return row, torch.empty_like(row), state, torch.empty_like(state)


# target_loss: cross-entropy [rows], divergence [rows] and their gradients in hidden [rows, d] (zero
# where not asked for). hidden, ref_hidden [rows, d]; weight [V, d]; targets [rows]; bias [V];
# reference [rows, V] logits; softcap 0: none
_define(
    "target_losses(Tensor hidden, Tensor weight, Tensor? targets, Tensor? bias, Tensor? reference, "
    "Tensor? ref_hidden, "
    "float scale, float softcap, bool reverse, bool gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    _target_losses,
)


def _with_tangents(
    primal: torch.Tensor, tangents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return primal.new_empty(primal.shape), tangents.new_empty(tangents.shape)


def _attention(
    q: torch.Tensor, k: Any, v: Any, *tangents: torch.Tensor | None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    count = next((len(t) for t in tangents[:3] if t is not None), 0)
    return q.new_empty(q.shape), q.new_empty(count, *q.shape)


# jvp: a layer and its tangents in T directions. x, gate, up [rows, d]; weight [d]; tangents [T,
# rows, d]
_define(
    "rms_norm_jvp(Tensor x, Tensor weight, Tensor tangents, float eps) -> (Tensor, Tensor)",
    lambda x, weight, tangents, eps: _with_tangents(x, tangents),
)
_define(
    "swiglu_jvp(Tensor gate, Tensor up, Tensor gate_tangents, Tensor up_tangents) -> (Tensor, "
    "Tensor)",
    lambda gate, up, gate_tangents, up_tangents: _with_tangents(gate, gate_tangents),
)
# q [B, heads, queries, d]; k, v [B, shared heads, keys, d]; tq [T, *q]; tk, tv [T, B, shared heads,
# t, d] of the last t keys (None: zero); spans [B, 2]: a row's keys are first <= j < end. Queries
# are the last positions where causal.
_define(
    "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? "
    "spans, bool causal, "
    "float scale) -> (Tensor, Tensor)",
    _attention,
)
