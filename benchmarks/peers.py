"""What the published code does, restated in plain torch from the description of its hot paths;
fair, and no faster or slower than it has to be.

Sources: MEMIT (Meng et al. 2023) and EasyEdit (Wang et al. 2023) for `layer_stats`, `compute_z`,
    `memit_update`; EMMET
(Gupta et al. 2024); AlphaEdit (Fang et al. 2025); ROME (Meng et al. 2022). What they add around
these lines (tokenising again for every layer, copies between devices, hundreds of prints) is left
out, in their favour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knowedit.facts.fact import Fact
from knowedit.methods.locate.values import ESSENCE, ValueSettings, prompt_rows
from knowedit.models.editable import EditableModel

SORTED = 100  # documents sorted by length and packed together


class _Stop(Exception):
    pass


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# -- statistics


def padded_batches(pieces: Sequence[list[int]], budget: int) -> Iterator[list[list[int]]]:
    """Groups of `SORTED` pieces, each sorted by length and cut into batches of at most `budget`
    padded tokens.
    """
    for start in range(0, len(pieces), SORTED):
        batch: list[list[int]] = []
        for piece in sorted(pieces[start : start + SORTED], key=len, reverse=True):
            if batch and (len(batch) + 1) * len(batch[0]) > budget:
                yield batch
                batch = []
            batch.append(piece)
        if batch:
            yield batch


def layer_stats(
    model: EditableModel, pieces: Sequence[list[int]], layer: int, n_positions: int, skip: int = 1
) -> Tensor:
    """Sum of k kᵀ at one layer, `[d_ff, d_ff]` float32: a pass of its own through the layer's
    projection.

    Batches of 3 x `n_positions` padded tokens with an attention mask; keys of attended tokens are
    gathered and multiplied in float32. `skip` leading tokens of each piece are left out (theirs is
    0; ours 1, so that sums can be compared).
    """
    total = torch.zeros(model.d_ff, model.d_ff, device=model.device)
    kept: list[Tensor] = []

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        kept.append(inputs[0])
        raise _Stop

    with _hooked(model.projection(layer), hook), torch.no_grad():
        for batch in padded_batches(pieces, 3 * n_positions):
            ids, mask = model.pad(batch)
            with suppress(_Stop):
                model.hf(input_ids=ids, attention_mask=mask.long())
            count = mask.clone()
            count[:, :skip] = False
            rows = kept.pop().flatten(0, 1)[count.flatten()].float()
            total += rows.t().mm(rows)
    return total


# -- values


def compute_z(
    model: EditableModel, fact: Fact, layer: int, s: ValueSettings
) -> tuple[Tensor, Tensor]:
    """The value of one fact: `(delta, z0 + delta)`, each `[hidden]`.

    Every step: the whole model over every row, full logits, a second head product for the target
    rows, and the figures fetched to the host for a progress line, as published.
    """
    rows = prompt_rows(model, fact, s.contexts, fact.target)
    essence = model.row(ESSENCE.format(fact.subject), fact.subject)
    answers = [r.ids[r.answer :] for r in rows]
    texts = [r.ids[:-1] for r in rows] + [essence.ids]
    ids, mask = model.pad(texts)
    lookup = [r.subject for r in rows] + [essence.subject]
    labels = torch.full((len(rows), ids.shape[1]), -100, device=ids.device)
    for i, answer in enumerate(answers):
        labels[i, len(texts[i]) - len(answer) : len(texts[i])] = torch.tensor(
            answer, device=ids.device
        )
    if s.lr is None:
        raise ValueError("the published loop needs a learning rate; set ValueSettings.lr")
    delta = torch.zeros(model.hidden, requires_grad=True, device=model.device)
    start: list[Tensor] = []
    final: list[Tensor] = []

    def lift(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not start:
            start.append(hidden[0, lookup[0]].detach().clone())
        for row, at in enumerate(lookup):
            hidden[row, at, :] += delta
        return output

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        final[:] = [output[0] if isinstance(output, tuple) else output]

    head = model.hf.get_output_embeddings()
    optimiser = torch.optim.Adam([delta], lr=s.lr)
    clean = None
    with _hooked(model.layers[layer], lift), _hooked(model.layers[-1], keep):
        for step in range(s.steps):
            optimiser.zero_grad()
            logits = model.hf(input_ids=ids, attention_mask=mask.long()).logits
            now = F.log_softmax(logits[-1, lookup[-1]], dim=0)
            if clean is None:
                clean = now.detach().clone()
            logp = F.log_softmax(head(model.norm(final[0][: len(rows)])), dim=2)
            chosen = logp.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)
            scored = (labels != -100).float()
            nll = (-(chosen * scored).sum(1) / scored.sum(1)).mean()
            kl = s.kl * F.kl_div(clean[None], now[None], log_target=True, reduction="batchmean")
            decay = s.weight_decay * (delta.norm() / start[0].norm() ** 2)
            loss = nll + kl + decay
            _line = f"{loss.item():.3f} = {nll.item():.3f} + {kl.item():.3f} + {decay.item():.3f}"
            if loss < s.stop or step == s.steps - 1:
                break
            loss.backward()
            optimiser.step()
            largest = s.clamp * start[0].norm()
            if delta.norm() > largest:
                with torch.no_grad():
                    delta[...] = delta * largest / delta.norm()
    return delta.detach(), start[0] + delta.detach()


# -- solves


def memit_update(C: Tensor, weight: float, K: Tensor, R: Tensor) -> Tensor:
    """`[d, m]` float64 from C `[m, m]` float32, K `[m, n]`, R `[d, n]`: a dense LU in float64 for
    every call.
    """
    adjusted = torch.linalg.solve(weight * C.double() + K.double() @ K.double().T, K.double())
    return R.double() @ adjusted.T


def emmet_update(C: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """`[d, m]` float64: the same with an equality constraint, through a dense inverse for every
    call.
    """
    inverse = torch.inverse(C.double())
    read_in = K.double().T @ inverse
    return R.double() @ torch.inverse(read_in @ K.double()) @ read_in


def null_space_projector(C: Tensor, threshold: float) -> Tensor:
    """P `[m, m]` float32 onto the singular directions of C below `threshold`."""
    U, singular, _ = torch.linalg.svd(C, full_matrices=False)
    null = U[:, singular < threshold]
    return null @ null.T


def alphaedit_update(P: Tensor, cache: Tensor, beta: float, K: Tensor, R: Tensor) -> Tensor:
    """`[d, m]`, in P's dtype (theirs: float32); `cache` `[m, m]` holds K Kᵀ of earlier batches and
    takes this one's.
    """
    eye = torch.eye(P.shape[0], dtype=P.dtype)
    update = torch.linalg.solve(P @ (K @ K.T + cache) + beta * eye, P @ K @ R.T)
    cache += K @ K.T
    return update.T


def rome_inverse(C: Tensor) -> Tensor:
    """The inverse that ROME keeps to make `C⁻¹ k`, `[m, m]` float32."""
    return torch.inverse(C)
