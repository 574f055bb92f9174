"""Key statistics: the second moment of the MLP keys of many layers, in one partial forward pass over a corpus.

    for each window of documents:  tokenise -> batches of similar length -> forward, stopped inside the deepest layer
                                   -> every layer's keys -> knowedit_kernels.SecondMoment

Nothing above the deepest layer's key runs. A window is the unit of progress: a checkpoint holds the sums after some
number of windows, so an interrupted run goes on and ends with the same bits as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from knowedit_kernels import Covariance, NullSpace, SecondMoment

from . import store
from .errors import StatisticsError
from .model import EditableModel
from .progress import bar
from .store import LayerStatistics, Recipe
from .text import corpus_fingerprint, documents

#: A first-token key this many times longer than the others marks an attention-sink layer.
SINK_RATIO = 10.0
WINDOW = 8_192  # tokens tokenised, sorted and run together
MAX_PADDING = 0.1


class KeyStatistics:
    """Second moments of the keys of some layers of one model.

    Raises:
        StatisticsError: from `check`, for another model or a layer that was not collected.
    """

    def __init__(self, layers: dict[int, LayerStatistics]) -> None:
        self._layers = layers
        self._metrics: dict[int, Covariance] = {}
        self._null_spaces: dict[tuple[int, float], NullSpace] = {}

    @property
    def layers(self) -> list[int]:
        return sorted(self._layers)

    def __getitem__(self, layer: int) -> LayerStatistics:
        if layer not in self._layers:
            raise StatisticsError(f"no statistics of layer {layer} here, only of {self.layers}; collect that layer too")
        return self._layers[layer]

    def moment(self, layer: int) -> Tensor:
        """C = E[k kᵀ], `[d_ff, d_ff]` float64."""
        return self[layer].total / self[layer].count

    def metric(self, layer: int) -> Covariance:
        """C as a solver metric of weight 1, factorised once.

        Raises:
            StatisticsError: too few tokens for a full-rank C.
        """
        if layer not in self._metrics:
            self._check_count(layer)
            try:
                self._metrics[layer] = Covariance(self.moment(layer))
            except ValueError as error:
                raise StatisticsError(f"layer {layer}: {error}") from error
        return self._metrics[layer]

    def null_space(self, layer: int, threshold: float) -> NullSpace:
        """The eigenspace of C with eigenvalues below `threshold`, as a solver metric of weight 1, decomposed once.

        Raises:
            StatisticsError: too few tokens, which would invent null directions; no eigenvalue below `threshold`.
        """
        if (layer, threshold) not in self._null_spaces:
            self._check_count(layer)
            try:
                self._null_spaces[layer, threshold] = NullSpace(self.moment(layer), threshold=threshold)
            except ValueError as error:
                raise StatisticsError(f"layer {layer}: {error}") from error
        return self._null_spaces[layer, threshold]

    def _check_count(self, layer: int) -> None:
        count, size = self[layer].count, self[layer].total.shape[0]
        if count < 2 * size:
            raise StatisticsError(
                f"layer {layer}: {count} tokens are too few for a covariance of size {size}; "
                f"collect at least {2 * size} (10 x {size} or more is better)"
            )

    def sink_ratio(self, layer: int) -> float:
        """Norm of first-token keys over that of the others; above `SINK_RATIO` the layer carries an attention sink."""
        return self[layer].first_norm / max(self[layer].other_norm, 1e-30)

    def is_sink(self, layer: int) -> bool:
        return self.sink_ratio(layer) > SINK_RATIO

    def check(self, model: EditableModel, layers: Sequence[int]) -> None:
        """Raise StatisticsError unless these statistics are of `model` and hold `layers`."""
        for layer in layers:
            if self[layer].recipe.fingerprint != model.fingerprint:
                raise StatisticsError(
                    f"the statistics of layer {layer} are of {self[layer].model} "
                    f"(fingerprint {self[layer].recipe.fingerprint[:12]}), not of {model.name} "
                    f"({model.fingerprint[:12]}): other weights or another dtype; collect them for this model"
                )


def key_statistics(
    model: EditableModel,
    layers: Sequence[int] | None = None,
    corpus: str | Path | Sequence[str | Path] = "wikipedia",
    tokens: int = 100_000,
    *,
    max_length: int = 512,
    skip_first: bool = True,
    seed: int = 0,
    precision: str = "exact",
    directory: str | Path | None = None,
    budget: int = 4096,
    checkpoint_every: float = 120.0,
    progress: bool = True,
) -> KeyStatistics:
    """Collect (or load from the cache) the second moments of the keys of `layers`, all in one pass.

    Args:
        layers: default: those of the model's preset.
        corpus: path(s), a hub data set, "wikipedia", or "self" (the model's own samples); see `text.documents`.
        tokens: keys to sum, exactly.
        max_length: longer documents are cut into pieces of this many tokens.
        skip_first: leave each piece's first token out.
        directory: where files and checkpoints go (default: the cache, under the model's fingerprint).
        budget: padded tokens a batch.
        checkpoint_every: seconds.

    Raises:
        StatisticsError: corpus empty or too short, NaN in a layer, another run holds the files, disk full.
        CorpusError: the corpus cannot be read.
    """
    from .presets import preset_for

    layers = sorted(set(layers if layers is not None else preset_for(model).statistics_layers))
    model.check_layers(layers)
    if tokens < 1 or max_length < 2:
        raise StatisticsError(f"tokens and max_length must be positive, got {tokens} and {max_length}")
    if model.ledger.active:
        raise StatisticsError("statistics describe the unedited model; undo the active edits first")
    recipe = Recipe(
        model.fingerprint, corpus_fingerprint(corpus), tokens, min(max_length, model.max_length), skip_first, seed, precision
    )
    where = Path(directory) if directory else store.folder(model.name, recipe)
    where.mkdir(parents=True, exist_ok=True)
    found, missing = _load(where, layers, recipe)
    if missing:
        lock = FileLock(where / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StatisticsError(f"another run is collecting into {where}; wait for it, or use another folder") from error
        with lock:
            run = _Run(model, missing, recipe, where)
            run.collect(corpus, budget, checkpoint_every, progress)
            found |= run.finish()
        lock.release()
    return KeyStatistics(found)


def _load(where: Path, layers: Sequence[int], recipe: Recipe) -> tuple[dict[int, LayerStatistics], list[int]]:
    """The layers already on disk for this recipe, and those still to collect."""
    found: dict[int, LayerStatistics] = {}
    for layer in layers:
        if (path := store.layer_file(where, layer)).exists():
            here = LayerStatistics.load(path)
            if here.recipe != recipe:
                was, now = asdict(here.recipe), asdict(recipe)
                differs = ", ".join(f"{k}: {was[k]!r}, asked for {now[k]!r}" for k in now if was[k] != now[k])
                raise StatisticsError(f"{path} holds other statistics ({differs}); use another folder")
            found[layer] = here
    return found, [layer for layer in layers if layer not in found]


@dataclass
class _Norms:
    """Running sums of key norms at first tokens and elsewhere."""

    first: float = 0.0
    first_count: int = 0
    other: float = 0.0
    other_count: int = 0


class _Run:
    """One collection: its sums, its place in the corpus, its checkpoint."""

    def __init__(self, model: EditableModel, layers: Sequence[int], recipe: Recipe, where: Path) -> None:
        self.model, self.layers, self.recipe, self.where = model, list(layers), recipe, where
        self.moments = {layer: self._moment(layer) for layer in layers}
        self.norms = {layer: _Norms() for layer in layers}
        self.documents = self.count = self.padded = self.run_tokens = 0
        self.checkpoint = where / f"checkpoint-{'-'.join(map(str, layers))}.safetensors"

    def _moment(self, layer: int) -> SecondMoment:
        return SecondMoment(self.model.d_ff, device=self.model.weight(layer).device, precision=self.recipe.precision)

    def collect(self, corpus: Any, budget: int, checkpoint_every: float, progress: bool) -> None:
        self._resume()
        source = documents(corpus, seed=self.recipe.seed, start=self.documents, model=self.model.samples)
        last, spent = time.monotonic(), 0.0
        title = f"key statistics, layers {', '.join(map(str, self.layers))}"
        with bar(title, self.recipe.tokens, "tokens", show=progress) as advance:
            advance(self.count)
            for taken, pieces in _windows(self.model, source, self.recipe.max_length):
                self._add(pieces, budget, advance)
                self.documents += taken
                if self.count >= self.recipe.tokens:
                    return
                # a checkpoint of large layers takes a while: never spend more than a twentieth of the time on them
                if time.monotonic() - last > max(checkpoint_every, 20 * spent):
                    spent = -time.monotonic()
                    self._save_checkpoint()
                    last = time.monotonic()
                    spent += last
        raise StatisticsError(
            f"the corpus has only {self.count} tokens to count, {self.recipe.tokens} were asked for; "
            "add text, or ask for fewer tokens"
        )

    def _add(self, pieces: Sequence[list[int]], budget: int, advance: Callable[..., None]) -> None:
        """One window: keys of all its pieces, at most as many as are still wanted."""
        first = 1 if self.recipe.skip_first else 0
        for batch in _batches([len(p) for p in pieces], budget):
            rows = [pieces[i] for i in batch]
            ids, mask = self.model.pad(rows)
            keep = mask.clone()
            keep[:, :first] = False
            rest = self.recipe.tokens - self.count
            if int(keep.sum()) > rest:
                keep &= keep.flatten().cumsum(0).view_as(keep) <= rest
            take = partial(self._key, keep=keep, rows=rows)
            self.model.forward_to(max(self.layers), ids, take, self.layers)
            self.count += int(keep.sum())
            advance(int(keep.sum()))
            self.padded, self.run_tokens = self.padded + ids.numel(), self.run_tokens + int(mask.sum())
            if self.count >= self.recipe.tokens:
                break

    def _key(self, layer: int, key: Tensor, keep: Tensor, rows: Sequence[list[int]]) -> None:
        keep = keep.to(key.device)
        norm = torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32)
        try:
            self.moments[layer].update(key, keep)
        except ValueError as error:
            bad = int((~norm.isfinite() & keep).any(1).nonzero()[:1])
            text = self.model.tokenizer.decode(rows[bad])[:80]
            raise StatisticsError(f"layer {layer} has NaN or infinite keys at the text {text!r}: {error}") from error
        sums = self.norms[layer]
        sums.first += float(norm[:, 0].double().sum())
        sums.first_count += len(rows)
        sums.other += float(norm[:, 1:][keep[:, 1:]].double().sum())
        sums.other_count += int(keep[:, 1:].sum())

    def _save_checkpoint(self) -> None:
        tensors = {f"{layer}.{k}": v for layer, m in self.moments.items() for k, v in m.state_dict().items()}
        header = {
            "recipe": asdict(self.recipe), "layers": self.layers, "documents": self.documents, "count": self.count,
            "padded": self.padded, "run_tokens": self.run_tokens, "norms": {k: asdict(v) for k, v in self.norms.items()},
        }  # fmt: skip
        store.write(self.checkpoint, tensors, header)

    def _resume(self) -> None:
        """Go on from the checkpoint of an interrupted run of the same recipe, if there is one."""
        if not self.checkpoint.exists():
            return
        header, tensors = store.read(self.checkpoint)
        if header.get("recipe") != asdict(self.recipe) or header.get("layers") != self.layers:
            return
        for layer, moment in self.moments.items():
            prefix = f"{layer}."
            moment.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
            self.norms[layer] = _Norms(**header["norms"][str(layer)])
        self.documents, self.count = header["documents"], header["count"]
        self.padded, self.run_tokens = header["padded"], header["run_tokens"]

    def finish(self) -> dict[int, LayerStatistics]:
        """Write each layer's file, then drop the checkpoint."""
        result = {}
        for layer, moment in self.moments.items():
            norms, audit = self.norms[layer], moment.audit()
            result[layer] = LayerStatistics(
                layer=layer, module=self.model.layout.projection.format(layer), model=self.model.name, recipe=self.recipe,
                count=moment.count, total=moment.sum().cpu(), first_norm=norms.first / max(norms.first_count, 1),
                other_norm=norms.other / max(norms.other_count, 1),
                extra={"audit": asdict(audit), "padding": 1 - self.run_tokens / max(self.padded, 1)},
            )  # fmt: skip
            result[layer].save(store.layer_file(self.where, layer))
        self.checkpoint.unlink(missing_ok=True)
        return result


def _windows(model: EditableModel, source: Iterable[str], max_length: int) -> Iterator[tuple[int, list[list[int]]]]:
    """Documents taken and their pieces of at most `max_length` tokens, about `WINDOW` tokens at a time."""
    taken, size, pieces = 0, 0, []
    for text in source:
        ids = model.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        taken += 1
        size += len(ids)
        pieces += [ids[i : i + max_length] for i in range(0, len(ids), max_length) if len(ids) - i > 1]
        if size >= WINDOW:
            yield taken, pieces
            taken, size, pieces = 0, 0, []
    if pieces:
        yield taken, pieces


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Pieces of similar length together: within `budget` padded tokens and at most `MAX_PADDING` of padding."""
    batch: list[int] = []
    filled = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        size = (len(batch) + 1) * lengths[i]
        if batch and (size > budget or size - filled - lengths[i] > MAX_PADDING * size):
            yield batch
            batch, filled = [], 0
        batch.append(i)
        filled += lengths[i]
    if batch:
        yield batch
