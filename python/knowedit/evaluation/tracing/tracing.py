"""Causal tracing (Meng et al. 2022, ROME, section 2.1): which states, at which tokens and layers,
carry a fact?

Three kinds of run: *clean*; *corrupted*, where Gaussian noise of `noise` standard deviations lies
on the embeddings of the subject's tokens; and *restored*, the corrupted run with clean states put
back at one token, at one layer (``hidden``: the layer's output) or in a window of layers (``mlp``,
``attention``: what the block adds to the stream). The indirect effect of a place is what the
restoration gives back of the answer's probability, averaged over noise samples.

The published code runs the whole model once a place. But a restoration at (token t, layer l)
changes neither the layers below nor the tokens before t: there the states, keys and values are
those of the corrupted run. So the places of a token go up the stack together: each joins at its
layer, as rows of the tokens from t on, and only the last token meets the head. The numbers are the
published ones; the token-layers are a quarter to a sixth of them (docs/tracing.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from knowedit.errors import EditError
from knowedit.facts.sets import load
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.models.partial import Hook, PartialModel, capture, hooked, recorded

KINDS = ("hidden", "mlp", "attention")
CONFIDENT = 0.2  # a clean probability below it is warned about


@dataclass(frozen=True)
class Trace:
    """One prompt's indirect effects.

    Attributes:
        tokens: the prompt's tokens, as text.
        subject: its first token and the one after its last.
        answer, token: the token whose probability is traced, as text and as its number.
        clean, corrupted: its probability, unharmed and (mean over samples) with the subject
            corrupted.
        effect: `{kind: [tokens, layers]}`, mean gain in probability over the corrupted run,
            float32.
        error: `{kind: [tokens, layers]}`, standard error of that mean over the noise samples.
        window: layers restored together for mlp and attention, centred on the layer.
        deviation: standard deviation of the noise on each coordinate of an embedding.
    """

    model: str
    prompt: str
    tokens: list[str]
    subject: tuple[int, int]
    answer: str
    token: int
    clean: float
    corrupted: float
    effect: dict[str, Tensor]
    error: dict[str, Tensor]
    window: int
    deviation: float
    samples: int
    seed: int
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for `report.plots.trace`: `low` and `high` are 1.96 standard errors from the
        effect.
        """
        plain = {
            name: value for name, value in vars(self).items() if name not in ("effect", "error")
        }
        begin, end = self.subject
        rows = [token + "*" * (begin <= i < end) for i, token in enumerate(self.tokens)]
        tables = {
            name: {
                kind: (effect + sign * 1.96 * self.error[kind]).tolist()
                for kind, effect in self.effect.items()
            }
            for name, sign in (("effect", 0), ("low", -1), ("high", 1))
        }
        return {**plain, "rows": rows, **tables}


@accepts_model
@torch.no_grad()
def trace(
    model: EditableModel,
    prompt: str,
    subject: str,
    answer: str | None = None,
    *,
    noise: float = 3.0,
    samples: int = 10,
    kinds: Sequence[str] = KINDS,
    window: int | None = None,
    deviation: float | None = None,
    seed: int = 0,
    subject_only: bool = False,
    budget: int = 4096,
    progress: Callable[[float], None] = lambda share: None,
) -> Trace:
    """Trace how `prompt` leads to `answer`; the model is not touched.

    Args:
        subject: what is corrupted: its last occurrence in the prompt.
        answer: traced by its first token, with or without a space before it, whichever the model
            finds likelier, but not by a blank (default: the model's own next token).
        noise: standard deviations of noise; one draw a sample, shared by all restorations.
        samples: corrupted runs.
        kinds: of `KINDS`.
        window: layers restored together for mlp and attention; default: ROME's 10 of GPT-2 XL's 48,
            scaled to the depth.
        deviation: one standard deviation of the embeddings; default: over the subjects of the
            embedded facts.
        seed: of the noise.
        subject_only: restore at the subject's last token only, which is much faster; the effects
            of the others are left at 0.
        budget: tokens run together.
        progress: called with the share of the work just done.

    Raises:
        EditError: the subject is not in the prompt, nothing follows it, or an argument is out of
            range.
    """
    _check(noise, samples, kinds, window)
    row = model.row(prompt, subject)
    assert row.start is not None and row.subject is not None
    begin, end, depth = row.start, row.subject + 1, len(model.layers)
    if end == len(row.ids):
        raise EditError(
            f"nothing follows the subject {subject!r} in {prompt!r}, so the token that gives "
            f"the answer would itself be "
            "corrupted; name a part of the prompt as the subject, or write the prompt on"
        )
    width = window or max(1, round(10 * depth / 48))
    deviation = noise * (
        embedding_deviation(model, [f.subject for f in load("embedded")])
        if deviation is None
        else deviation
    )
    ids, _ = model.pad([row.ids])
    embeddings = model.hf.get_input_embeddings()(ids)
    runs = _Runs(
        model, kinds, ids, embeddings, _noise(embeddings, begin, end, deviation, samples, seed)
    )
    token = _answer_token(model, prompt, answer, runs.clean_logits)
    clean, corrupted = (
        _probability(model, states[-1][..., -1, :], token).cpu()
        for states in (runs.clean, runs.corrupted)
    )
    places = _places(kinds, depth, width)
    gain = torch.zeros(len(row.ids), len(places), samples)
    # before the subject nothing is corrupted, so nothing is restored
    restored = range(row.subject, end) if subject_only else range(begin, len(row.ids))
    left = {at: len(row.ids) - at for at in restored}
    for at in restored:
        gain[at] = runs.restored(places, at, token, budget) - corrupted
        progress(left[at] / sum(left.values()))
    of_kind = {kind: gain[:, [place.kind == kind for place in places]] for kind in kinds}
    effect = {kind: found.mean(-1) for kind, found in of_kind.items()}
    error = {kind: found.std(-1) / samples**0.5 for kind, found in of_kind.items()}
    texts = [model.tokenizer.decode([i]) for i in row.ids]
    found = Trace(
        model.name,
        prompt,
        texts,
        (begin, end),
        model.tokenizer.decode([token]),
        token,
        float(clean),
        float(corrupted.mean()),
        effect,
        error,
        width,
        deviation,
        samples,
        seed,
    )
    found.warnings.extend(
        _doubts(
            found, float(corrupted.std() / samples**0.5), int(runs.clean_logits.argmax()) == token
        )
    )
    return found


def embedding_deviation(model: EditableModel, subjects: Sequence[str]) -> float:
    """Standard deviation over all coordinates of the embeddings of all tokens of `subjects`, as
    ROME measures it.
    """
    ids = [
        i for text in subjects for i in model.tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    with torch.no_grad():
        return float(
            model.hf.get_input_embeddings()(torch.tensor(ids, device=model.device)).float().std()
        )


def _check(noise: float, samples: int, kinds: Sequence[str], window: int | None) -> None:
    if not 0 < noise < math.inf:
        raise EditError(f"noise must be positive, got {noise}; ROME uses 3 standard deviations")
    if samples < 2:
        raise EditError(f"samples must be at least 2, got {samples}; the standard error needs them")
    if not kinds or set(kinds) - set(KINDS):
        raise EditError(
            f"kinds must be some of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}"
        )
    if window is not None and window < 1:
        raise EditError(f"window must be at least one layer, got {window}")


def _noise(
    embeddings: Tensor, begin: int, end: int, deviation: float, samples: int, seed: int
) -> Tensor:
    """The corrupted embeddings `[samples, T, hidden]`; drawn on the CPU, so a seed means the same
    everywhere.
    """
    draw = torch.randn(
        samples, end - begin, embeddings.shape[-1], generator=torch.Generator().manual_seed(seed)
    )
    result = embeddings.repeat(samples, 1, 1)
    result[:, begin:end] += (deviation * draw).to(result)
    return result


def _answer_token(model: EditableModel, prompt: str, answer: str | None, logits: Tensor) -> int:
    if answer is None:
        return int(logits.argmax())
    ids, firsts = model.row(prompt).ids, []
    for text in (f" {answer.strip()}", answer.strip()):
        joint = model.tokenizer(prompt + text)["input_ids"]
        if (
            joint[: len(ids)] == ids
            and model.tokenizer.decode(joint[len(ids) : len(ids) + 1]).strip()
        ):
            firsts.append(joint[len(ids)])
    if not firsts:
        raise EditError(
            f"the answer {answer!r} has no token of its own after {prompt!r}; take blanks off "
            f"the prompt's end"
        )
    return max(firsts, key=lambda i: float(logits[i]))


def _doubts(found: Trace, error: float, first: bool) -> Iterator[str]:
    if not first:
        yield f"{found.answer!r} is not the model's most likely next token"
    if found.clean < CONFIDENT:
        yield (
            f"the model is not sure of {found.answer!r} (p = {found.clean:.3f}); there is "
            f"little to trace"
        )
    if found.clean - found.corrupted <= 2 * error:
        yield (
            f"the noise does not lower p({found.answer!r}): {found.clean:.3f}, then "
            f"{found.corrupted:.3f}"
        )


@dataclass(frozen=True)
class _Place:
    """What one run restores: `kind` at the layers of `window`; it differs from the corrupted run
    from `start` on.
    """

    kind: str
    window: range
    start: int


def _places(kinds: Sequence[str], depth: int, width: int) -> list[_Place]:
    """All layers of every kind. A restored layer output is the input of the next layer; a window
    starts with its first.
    """
    found = []
    for kind in kinds:
        for layer in range(depth):
            if kind == "hidden":
                found.append(_Place(kind, range(0), layer + 1))
            else:
                window = range(max(0, layer - width // 2), min(depth, layer - width // 2 + width))
                found.append(_Place(kind, window, window.start))
    return found


class _Runs:
    """The clean and the corrupted runs, and the restored ones on top of them.

    Attributes:
        clean, corrupted: inputs of every layer and the output of the last, `[.., 1 or samples, T,
            hidden]` each.
        parts: what adds to the stream, by kind and layer.
        added: what they add in the clean run, `[T, hidden]` each.
        clean_logits: of the next token, `[vocab]`.
    """

    def __init__(
        self,
        model: EditableModel,
        kinds: Sequence[str],
        ids: Tensor,
        embeddings: Tensor,
        corrupted: Tensor,
    ) -> None:
        self.model, self.samples = model, len(corrupted)
        self.parts = {kind: _modules(model, kind) for kind in kinds if kind != "hidden"}
        parts = {module for found in self.parts.values() for layer in found for module in layer}
        with recorded(model.layers) as outputs, recorded(parts) as added:
            found = capture(model, ids, 0, embeddings)
        self.clean = self._stream(found.states, outputs)
        self.added = {module: output.reshape(ids.shape[1], -1) for module, output in added.items()}
        with recorded(model.layers) as outputs:
            self.run = capture(model, ids.expand(self.samples, -1), 0, corrupted)
        self.corrupted = self._stream(self.run.states, outputs)
        self.clean_logits = model.head(model.finish(self.clean[-1][..., -1:, :])[0, -1])

    def _stream(self, first: Tensor, outputs: Mapping[nn.Module, Tensor]) -> list[Tensor]:
        """Inputs of every layer and the output of the last; what does not run passes them on."""
        found = [first]
        for layer in self.model.layers:
            found.append(outputs.get(layer, found[-1]))
        return found

    def restored(self, places: Sequence[_Place], at: int, token: int, budget: int) -> Tensor:
        """Probabilities of `token`, `[places, samples]` on the CPU, with each of `places` restored
        at the token `at`.
        """
        length = self.clean[0].shape[-2]
        part = PartialModel.behind(self.run, at)
        result = torch.empty(len(places), self.samples)
        order = sorted(range(len(places)), key=lambda i: places[i].start)
        size = max(1, budget // (self.samples * (length - at)))
        for i in range(0, len(order), size):
            states = self._climb([places[j] for j in order[i : i + size]], at, part)
            found = _probability(self.model, states, token).cpu()
            result[order[i : i + size]] = found.unflatten(0, (-1, self.samples))
        return result

    def _climb(self, places: Sequence[_Place], at: int, part: PartialModel) -> Tensor:
        """Outputs of the last layer at the last token, `[.., places * samples, hidden]`; `places`
        in the order they start.
        """
        first = self.corrupted[0][..., at:, :]
        states = first[..., :0, :, :]
        depth = len(self.model.layers)
        for layer in range(places[0].start, depth + 1):
            joining = [place for place in places if place.start == layer]
            new = torch.cat([self.corrupted[layer][..., at:, :]] * max(1, len(joining)), -3)
            new = new.unflatten(-3, (-1, self.samples))[..., : len(joining), :, :, :].clone()
            hidden = [place.kind == "hidden" for place in joining]
            new[..., hidden, :, 0, :] = self.clean[layer][..., :1, None, at, :]
            states = torch.cat([states.to(new.device), new.flatten(-4, -3)], -3)
            if layer < depth:
                count = states.shape[-3] // self.samples
                with self._restoring(layer, places[:count], at):
                    states = part.layer(layer, states)
        return states[..., -1, :]

    def _restoring(
        self, layer: int, places: Sequence[_Place], at: int
    ) -> AbstractContextManager[None]:
        hooks: dict[nn.Module, Hook] = {}
        length = self.clean[0].shape[-2] - at
        for kind, modules in self.parts.items():
            rows = [
                i for i, place in enumerate(places) if place.kind == kind and layer in place.window
            ]
            for module in modules[layer] if rows else ():
                if module in self.added:
                    clean = self.added[module][at]
                    hooks[module] = _overwrite(rows, self.samples, length, clean)
        return hooked(hooks)


def _overwrite(rows: list[int], samples: int, length: int, clean: Tensor) -> Hook:
    """A hook that puts `clean` at the first of `length` tokens of those rows of a module's
    output.
    """

    def hook(_inputs: Any, output: Tensor) -> None:
        output.view(-1, samples, length, output.shape[-1])[rows, :, 0] = clean

    return hook


def _modules(model: EditableModel, kind: str) -> list[tuple[nn.Module, ...]]:
    """What adds to the stream in each layer: what mixes tokens ("attention"), or what does not
    ("mlp"); a layer can have none.
    """
    paths = model.layout.mixers if kind == "attention" else model.layout.mlps
    return [
        tuple(model.hf.get_submodule(path) for path in paths.get(layer, ()))
        for layer in range(len(model.layers))
    ]


def _probability(model: EditableModel, states: Tensor, token: int) -> Tensor:
    """Of `token` after last-layer outputs `[.., n, hidden]`: `[n]` float32."""
    parts = states.unsqueeze(-2).split(256, -3)
    logits = (model.head(model.finish(part)[:, 0]).float() for part in parts)
    return torch.cat([(part[:, token] - part.logsumexp(-1)).exp() for part in logits])
