"""Is this a second moment of keys, and of this model? For our files, and for those of the peers,
which say neither.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from knowedit.errors import StatisticsError
from knowedit.facts.sets import load
from knowedit.models.editable import EditableModel
from knowedit.models.experts import Routed, as_keys
from knowedit.models.fingerprint import difference
from knowedit.models.partial import read_keys
from knowedit.statistics.corpus.batching import Piece, batches
from knowedit.statistics.files.store import LayerStatistics
from knowedit_kernels.moments.audit import AuditResult

SYMMETRY = 1e-5  # |C - C'| / |C| that float32 sums in any order stay below
NEGATIVE = 1e-5  # smallest eigenvalue over the largest: below minus this it is no rounding
LEAST_CORRELATION = 5.0  # standard errors of a correlation between unrelated keys


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: its name, whether it holds, and the figure."""

    name: str
    ok: bool
    detail: str


def plausible(total: Tensor, count: int) -> list[Finding]:
    """Whether `total` `[d, d]` can be the sum of k kᵀ over `count` tokens: shape, finiteness,
    symmetry, PSD, count.
    """
    square = total.ndim == 2 and total.shape[0] == total.shape[1]
    findings = [Finding("square", square, f"shape {list(total.shape)}")]
    if not square:
        return findings
    finite = bool(total.isfinite().all())
    findings.append(
        Finding("finite", finite, "no NaN, no infinity" if finite else "NaN or infinite entries")
    )
    findings.append(
        Finding(
            "tokens",
            count > 0,
            f"{count:,} tokens, {count / len(total):.1f} for each of {len(total)} rows",
        )
    )
    if not finite or count < 1:
        return findings
    total = total.double()
    norm = float(total.norm())
    off = float((total - total.T).norm()) / max(norm, 1e-300)
    findings.append(
        Finding("symmetric", off <= SYMMETRY and norm > 0, f"|C - C'| / |C| = {off:.1e}")
    )
    values = torch.linalg.eigvalsh((total + total.T) / 2)
    lowest = float(values[0] / values[-1]) if values[-1] > 0 else float("nan")
    rank = int((values > values[-1] * 1e-12).sum())
    positive = lowest >= -NEGATIVE
    findings.append(
        Finding(
            "positive semidefinite", positive, f"smallest eigenvalue {lowest:.1e} of the largest"
        )
    )
    findings.append(
        Finding("rank", rank <= count, f"{rank} of {len(total)} directions, from {count:,} tokens")
    )
    return findings


def sound(found: LayerStatistics) -> list[Finding]:
    """`plausible`, of routed experts of all together, and for files of ours the accumulation error
    that was measured while collecting.
    """
    total = found.total.sum(0) if found.counts else found.total
    findings = plausible(total, sum(found.counts) or found.count)
    if audit := found.extra.get("audit"):
        result = AuditResult(**audit)
        findings.append(Finding("accumulation error", result.ok(), str(result)))
    return findings


@dataclass(frozen=True)
class KeySample:
    """Keys of one layer on the package's own facts: mean square of each channel `[d_ff]`, and norms
    by place.
    """

    squares: Tensor
    first_norm: float
    other_norm: float


def sample(model: EditableModel, layer: int) -> KeySample:
    """A few hundred keys of the model itself to compare a file with.

    Raises:
        ModelError: there is no such layer.
    """
    texts = [f"{fact.text} {fact.true or fact.target}" for fact in load("embedded")]
    pieces = [
        Piece(ids, 1)
        for ids in model.tokenizer(texts, verbose=False)["input_ids"]
        if 1 < len(ids) <= model.max_length
    ]
    first: list[Tensor] = []
    other: list[Tensor] = []
    for batch in batches(pieces, 4096):
        keys: dict[int, Tensor | Routed] = {}
        read_keys(model, batch.ids.to(model.device), [layer], keys.__setitem__)
        key = as_keys(keys[layer]).double().cpu()
        first.append(key[batch.first])
        other.append(key[batch.keep])
    keys_first, keys_other = torch.cat(first), torch.cat(other)
    return KeySample(
        keys_other.square().mean(0),
        float(keys_first.norm(dim=1).mean()),
        float(keys_other.norm(dim=1).mean()),
    )


def resembles(total: Tensor, count: int, seen: KeySample) -> Finding:
    """Whether the channels' energies go with those of the model's keys: unrelated layers and models
    do not correlate.
    """
    if total.dim() == 3:  # of experts: the wide layer's channels, in the order of the experts
        energies = total.diagonal(dim1=-2, dim2=-1).flatten()
    else:
        energies = total.diagonal()
    if energies.shape != seen.squares.shape:
        return Finding(
            "keys alike",
            False,
            f"size {len(energies)}, the layer's keys have {len(seen.squares)} channels",
        )
    floor = 1e-12 * float(seen.squares.mean())
    ours, theirs = (
        (seen.squares + floor).log(),
        (energies.double() / max(count, 1) + floor).clamp_min(floor).log(),
    )
    correlation = float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])
    errors = correlation * len(ours) ** 0.5
    return Finding(
        "keys alike",
        errors >= LEAST_CORRELATION,
        f"channel energies correlate with the model's at {correlation:.2f}, {errors:.0f} "
        f"standard errors from chance",
    )


def belongs(found: LayerStatistics, model: EditableModel) -> list[Finding]:
    """Whether a file of ours is of `model`: fingerprint, module, and its keys on a few texts."""
    other = difference(model, found.recipe.fingerprint, found.recipe.setup)
    same = other is None
    findings = [
        Finding(
            "same weights",
            same,
            f"fingerprint {found.recipe.fingerprint[:12]}"
            + (
                ""
                if same
                else f" ({found.model}), the model {model.name} has {model.fingerprint[:12]}: "
                f"{other}"
            ),
        )
    ]
    if not 0 <= found.layer < len(model.layers):
        return [
            *findings,
            Finding("layer", False, f"layer {found.layer}, the model has {len(model.layers)}"),
        ]
    module = model.layout.projection(found.layer)
    findings.append(Finding("same module", found.module == module, found.module))
    return [*findings, resembles(found.total, found.count, sample(model, found.layer))]


def require(findings: list[Finding], what: str, remedy: str) -> None:
    """Raise StatisticsError naming everything that does not hold."""
    if wrong := [f"{f.name}: {f.detail}" for f in findings if not f.ok]:
        raise StatisticsError(f"{what} is refused ({'; '.join(wrong)}); {remedy}")


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]
