"""Key statistics: the second moment of the MLP keys of many layers, in one partial forward pass
over a corpus.

    for each window of documents:  tokenise -> batches of similar length, or packed rows -> forward,
                                   stopped inside the deepest layer -> every layer's keys ->
                                   knowedit_kernels.SecondMoment

Nothing above the deepest layer's key runs. A window is the unit of progress and of sharding
(`windows`, `collect`): a checkpoint holds the sums after some number of windows, so an interrupted
run goes on and ends with the same bits as one that was not, and several processes share the work
without changing what is collected.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from knowedit.errors import CorpusError, StatisticsError
from knowedit.io.files import cache_dir
from knowedit.io.lines import named
from knowedit.io.ranks import Ranks
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import difference
from knowedit.models.load import accepts_model
from knowedit.models.presets import preset_for
from knowedit.models.tokens import start_tokens
from knowedit.statistics.collect import Collection, CollectSettings
from knowedit.statistics.corpus.corpus import Corpus, CorpusLike
from knowedit.statistics.distributed.checkpoints import resumable_layers
from knowedit.statistics.experts import filled, rare
from knowedit.statistics.files import store
from knowedit.statistics.files.store import CollectionRecipe, LayerStatistics
from knowedit_kernels import Covariance, NullSpace
from knowedit_kernels.solver import BlockMetric

logger = logging.getLogger(__name__)

UNTIL = ("tokens", "solve", "converged")
TOLERANCE = 0.3  # relative error at which to stop: what 50 to 60 tokens a dimension give
LOCK_TIMEOUT = 2.0  # seconds: a run that was just killed may hold a lock for a moment
# tokens for each of a key's dimensions: benchmarks/tokens.py finds nothing that more would improve
PER_DIMENSION = 64


class KeyStatistics:
    """Second moments of the keys of some layers of one model.

    Attributes:
        shared: of shared experts that are edited with routed ones, theirs; None: there are none.

    Raises:
        StatisticsError: from `check`, for another model or a layer that was not collected.
    """

    def __init__(
        self, layers: dict[int, LayerStatistics], shared: KeyStatistics | None = None
    ) -> None:
        self._layers, self.shared = layers, shared
        self._metrics: dict[int, Covariance | BlockMetric] = {}
        self._null_spaces: dict[tuple[int, float | None, float], NullSpace | BlockMetric] = {}

    @classmethod
    def load(cls, where: str | Path) -> KeyStatistics:
        """All layers in a folder, or the one in a file: collected or imported; `check` says whether
        a model may use them.

        Raises:
            StatisticsError: none there, or damaged.
        """
        files = store.files(Path(where))
        if not files:
            raise StatisticsError(
                f"{where}: no statistics files here; collect them with `knowedit stats`"
            )
        found = [LayerStatistics.load(path) for path in files]
        if len({layer.layer for layer in found}) < len(found):
            raise StatisticsError(
                f"{where} holds several collections; name one of the folders in it"
            )
        return cls({layer.layer: layer for layer in found})

    def __repr__(self) -> str:
        if not self._layers:
            return "KeyStatistics(no layers)"
        found = self._layers[self.layers[0]]
        return (
            f"KeyStatistics({named('layer', self.layers)} of {found.model}, "
            f"{found.count:,} tokens of {found.recipe.corpus.get('name')}, "
            f"{found.total.shape[-1]} keys a layer"
            f"{f' and expert ({len(found.counts)} experts)' if found.counts else ''})"
        )

    @property
    def layers(self) -> list[int]:
        return sorted(self._layers)

    def __getitem__(self, layer: int) -> LayerStatistics:
        if layer not in self._layers:
            raise StatisticsError(
                f"no statistics of layer {layer} here, only of {self.layers}; collect that "
                f"layer too"
            )
        return self._layers[layer]

    def moment(self, layer: int) -> Tensor:
        """C = E[k kᵀ], `[d_ff, d_ff]` float64; of routed experts `[E, d, d]`, that of each one's
        gated keys over all tokens, rare experts filled up (`statistics.experts`).

        Raises:
            StatisticsError: it is all zeros.
        """
        found = self[layer]
        if not bool(found.total.diagonal(dim1=-2, dim2=-1).any()):
            raise StatisticsError(
                f"layer {layer}: the second moment is all zeros, so every key was; check the "
                "model's weights, and collect statistics again (`knowedit stats`)"
            )
        if not found.counts:
            return found.total / found.count
        return torch.stack(filled(found.total, torch.tensor(found.counts), found.count))

    def rare_experts(self, layer: int) -> list[int]:
        """The experts that were given too few tokens for a moment of their own; none in a dense
        layer.
        """
        found = self[layer]
        return rare(torch.tensor(found.counts), found.total.shape[-1]) if found.counts else []

    def metric(self, layer: int) -> Covariance | BlockMetric:
        """C as a solver metric of weight 1, factorised once; of routed experts block by block, with
        that of a shared expert that is edited with them as the last block.

        Raises:
            StatisticsError: too few tokens for a full-rank C.
        """
        if layer not in self._metrics:
            self._check_count(layer)
            C = self.moment(layer)
            try:
                self._metrics[layer] = (
                    Covariance(C)
                    if C.dim() == 2
                    else BlockMetric({expert: Covariance(block) for expert, block in enumerate(C)})
                )
            except ValueError as error:
                raise StatisticsError(f"layer {layer}: {error}") from error
            if self.shared is not None and layer in self.shared.layers:
                routed = self._metrics[layer]
                assert isinstance(routed, BlockMetric)
                blocks = {**routed.metrics, len(routed.metrics): self.shared.metric(layer)}
                self._metrics[layer] = BlockMetric(blocks)
        return self._metrics[layer]

    def null_space(
        self, layer: int, threshold: float | None = None, relative: float = 1.0
    ) -> NullSpace | BlockMetric:
        """The eigenspace of C with eigenvalues below `threshold` (None: below `relative` times
        their mean, an expert's own), as a solver metric of weight 1, decomposed once.

        Raises:
            StatisticsError: too few tokens, which would invent null directions; no eigenvalue below
                the threshold.
        """
        at = layer, threshold, relative
        if at not in self._null_spaces:
            self._check_count(layer)
            C = self.moment(layer)

            def space(matrix: Tensor) -> NullSpace:
                mean = float(matrix.diagonal().mean())
                return NullSpace(
                    matrix, threshold=relative * mean if threshold is None else threshold
                )

            try:
                self._null_spaces[at] = (
                    space(C)
                    if C.dim() == 2
                    else BlockMetric({expert: space(block) for expert, block in enumerate(C)})
                )
            except ValueError as error:
                raise StatisticsError(f"layer {layer}: {error}") from error
        return self._null_spaces[at]

    def _check_count(self, layer: int) -> None:
        found = self[layer]
        count, size = sum(found.counts) or found.count, found.total.shape[-1]
        if count < 2 * size:
            raise StatisticsError(
                f"layer {layer}: {count} tokens are too few for a covariance of size {size}; "
                f"collect at least {2 * size} (10 x {size} or more is better)"
            )

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """What tells these statistics from others, by layer (a string, as JSON has it): the model's
        fingerprint, the corpus, the tokens and a digest of the sums; see
        `LayerStatistics.identity`. Two with the same identity give the same metrics.
        """
        beside = {} if self.shared is None else self.shared.identity
        return {str(layer): self[layer].identity for layer in self.layers} | {
            f"{layer} shared": one for layer, one in beside.items()
        }

    def check(self, model: EditableModel, layers: Sequence[int]) -> None:
        """Raise StatisticsError unless these statistics are of `model`, of the experts that it is
        seen with, of as many and as wide keys as it has, and hold `layers`.
        """
        if model.experts == "both":
            self._check_both(model, layers)
            return
        for layer in layers:
            recipe = self[layer].recipe
            if recipe.experts != model.experts and layer in model.checkup.layout.shared:
                raise StatisticsError(
                    f"the statistics of layer {layer} are of its {recipe.experts} experts, and its "
                    f"{model.experts} ones are edited; collect those: "
                    f"key_statistics(model.editing({model.experts!r}), [{layer}])"
                )
            if other := difference(model, recipe.fingerprint, recipe.setup):
                raise StatisticsError(
                    f"the statistics of layer {layer} are of {self[layer].model} "
                    f"(fingerprint {recipe.fingerprint[:12]}), not of {model.name} "
                    f"({model.fingerprint[:12]}): {other}; collect them for this model"
                )
            self._check_shape(model, layer)

    def _check_both(self, model: EditableModel, layers: Sequence[int]) -> None:
        """Raise StatisticsError unless they hold what both kinds of experts need."""
        self.check(model.editing("routed"), layers)
        joined = [layer for layer in layers if model.layout.beside(layer) is not None]
        if self.shared is None and joined:
            raise StatisticsError(
                f"the statistics of layer {joined[0]} are of its routed experts alone, and its "
                "shared one is edited with them; collect those of both: "
                f"key_statistics(model.editing('both'), {list(layers)})"
            )
        if self.shared is not None:
            self.shared.check(model.editing("shared"), joined)

    def _check_shape(self, model: EditableModel, layer: int) -> None:
        """Raise StatisticsError for a moment that is not one of the layer's keys."""
        found, part = self[layer], model.layout.part(layer)
        experts = part.experts
        wanted = (
            (part.width, part.width)
            if experts is None
            else (experts.count, experts.width, experts.width)
        )
        routed = 0 if experts is None else experts.count
        if tuple(found.total.shape) != wanted or len(found.counts) != routed:
            raise StatisticsError(
                f"the statistics of layer {layer} are {list(found.total.shape)} with counts of "
                f"{len(found.counts)} experts, and its keys need {list(wanted)} with {routed}; "
                f"collect them again: key_statistics(model, [{layer}])"
            )


@accepts_model
def key_statistics(
    model: EditableModel,
    layers: int | Sequence[int] | None = None,
    corpus: CorpusLike = "wikipedia",
    tokens: int | None = None,
    *,
    until: str = "tokens",
    tolerance: float = TOLERANCE,
    max_length: int = 512,
    skip_first: bool = True,
    seed: int = 0,
    precision: str = "exact",
    directory: str | Path | None = None,
    budget: int | None = None,
    packed: bool | None = None,
    halves: bool = True,
    worker: bool | None = None,
    checkpoint_every: float = 120.0,
    progress: bool = True,
    as_json: bool = False,
) -> KeyStatistics:
    """Collect (or load from the cache) the second moments of the keys of `layers`, all in one pass.

    In several processes with a torch.distributed group (`torchrun`) each takes a share of the
    corpus, rank 0 writes the files, and all return the total: that of one process, to float64
    rounding.

    Args:
        model: of one with shared experts, `model.editing("shared")` to have those' keys, and
            "both" to have both, each collected by itself.
        layers: one or several; default: those of the model's calibration or preset.
        corpus: path(s), a hub data set, "wikipedia", "self" (the model's own samples), or a
            mixture; see `Corpus.parse`.
        tokens: keys to sum, exactly (default: 64 for each of their dimensions; docs/statistics.md
            has what it follows from); with `until` the most to sum (default: ten times as many).
        until: "tokens"; "solve": stop when C^-1 k at real keys is known to `tolerance` (what ROME
            and MEMIT take from C); "converged": also the null space (AlphaEdit). See `convergence`.
        tolerance: relative error, estimated from two halves of the tokens.
        max_length: longer documents are cut into pieces of this many tokens.
        skip_first: leave each piece's first token out: it carries the attention sink's outliers.
        seed: of the order of a hub data set, or of the model's own samples.
        directory: where files and checkpoints go (default: the cache, under the model's
            fingerprint). Several nodes need one that all of them see.
        budget: tokens a batch (default: from the memory that is free); halved when memory runs out.
        packed: several texts a row with block-diagonal attention (default: on GPUs, if the model
            can do it).
        halves: keep two halves apart and estimate the error from them; False halves the memory of
            the sums.
        worker: tokenise ahead in a process of its own and cache the tokens (default: when there are
            many).
        checkpoint_every: seconds.
        progress: show a bar on a terminal, a line a minute elsewhere.
        as_json: JSON lines on stderr instead.

    Raises:
        StatisticsError: corpus empty or too short, NaN in a layer, another run holds the files,
            disk full, another rank died.
        CorpusError: the corpus cannot be read.
    """
    if layers is None:
        layers = preset_for(model).statistics_layers
    layers = list(layers) if isinstance(layers, Iterable) else [layers]
    model.check_layers(layers)
    layers = sorted(set(layers))
    if model.experts == "both":
        collect = partial(
            key_statistics,
            corpus=corpus,
            tokens=tokens,
            until=until,
            tolerance=tolerance,
            max_length=max_length,
            skip_first=skip_first,
            seed=seed,
            precision=precision,
            budget=budget,
            packed=packed,
            halves=halves,
            worker=worker,
            checkpoint_every=checkpoint_every,
            progress=progress,
            as_json=as_json,
        )
        return _of_both(model, layers, collect, directory)
    if tokens is None:
        size = max(map(model.layout.tokens_a_rank, layers))
        tokens = PER_DIMENSION * size * (1 if until == "tokens" else 10)
    for name, number in {"tokens": tokens, "max_length": max_length, "seed": seed}.items():
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise StatisticsError(f"{name} must be a whole number, got {number!r}")
    if tokens < 1 or max_length < 2:
        raise StatisticsError(
            f"tokens and max_length must be positive, got {tokens} and {max_length}"
        )
    if until not in UNTIL or (until != "tokens" and not (halves and 0 < tolerance < math.inf)):
        raise StatisticsError(
            f"until={until!r} must be one of {', '.join(UNTIL)}, with halves=True and a "
            f"positive tolerance"
        )
    if model.ledger.active:
        raise StatisticsError("statistics describe the unedited model; undo the active edits first")
    corpus = Corpus.parse(corpus)
    recipe = CollectionRecipe(
        model.fingerprint,
        corpus.identity,
        tokens,
        min(max_length, model.max_length),
        skip_first,
        seed,
        precision,
        until,
        tolerance if until != "tokens" else None,
        tuple(start_tokens(model.tokenizer)),
        model.setup,
        model.experts,
    )
    ranks = Ranks.current()
    if any(other != recipe for other in ranks.gather(recipe)):
        raise StatisticsError(
            "the ranks were given different models, corpora or settings; start all with the "
            "same command"
        )
    where = Path(directory) if directory else _cached(model, recipe)
    where.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        missing = ranks.first(lambda: _missing(where, layers, recipe, model, held))
        kept = [layer for layer in layers if layer not in missing]
        found = {layer: _load(where, layer, recipe, model) for layer in kept}
        if missing:
            settings = CollectSettings(
                budget, packed, halves, checkpoint_every, worker, progress, as_json
            )
            collection = Collection(model, missing, recipe, where, corpus, settings, ranks)
            collection.run()
            if collection.short:
                recipe = replace(recipe, tokens=collection.state.count)
                if not directory:
                    where = _cached(model, recipe)
                    ranks.first(partial(_lock, where, held))
            found |= collection.finish(recipe, where)
            if collection.short:
                raise StatisticsError(
                    f"the corpus has only {recipe.tokens} tokens to count, {tokens} were asked "
                    f"for; those are kept: ask for "
                    f"{recipe.tokens}, or add text"
                )
    return KeyStatistics(found)


def _of_both(
    model: EditableModel,
    layers: Sequence[int],
    collect: Callable[..., KeyStatistics],
    directory: str | Path | None,
) -> KeyStatistics:
    """Of the routed experts, with those of the shared ones; each in a folder of its own."""
    joined = [layer for layer in layers if model.layout.beside(layer) is not None]
    places = {name: Path(directory) / name if directory else None for name in ("routed", "shared")}
    routed = collect(model.editing("routed"), layers, directory=places["routed"])
    if not joined:
        return routed
    shared = collect(model.editing("shared"), joined, directory=places["shared"])
    return KeyStatistics({layer: routed[layer] for layer in layers}, shared)


def layer_statistics(
    layers: Sequence[int],
    model: EditableModel,
    corpus: Any,
    tokens: int | None,
    where: Path | None = None,
    seed: int = 0,
    pinned: Mapping[str, Any] | None = None,
) -> KeyStatistics:
    """The key statistics of `layers`, collected or read.

    Args:
        corpus: None: Wikipedia; where that cannot be read, and no number of tokens is asked for,
            what the cache holds of this model, with a note.
        seed: of the corpus, as `key_statistics`.
        where: a file or folder of statistics, collected or imported, to take them from instead of
            the corpus.
        pinned: the `KeyStatistics.identity` of those that are wanted. They are taken from the
            cache, whatever they were collected from, and no text is read; only where they are gone,
            and a corpus is named, they are collected again.

    Raises:
        StatisticsError: those at `where` are a peer's, of another model or lack a layer; the pinned
            ones are gone, or of another text than the corpus is now; or as `key_statistics`.
    """
    if pinned is not None and where is None:
        if (kept := _pinned(model, pinned)) is not None:
            return kept
        if not corpus:
            raise StatisticsError(
                f"the statistics that were pinned ({_told(pinned)}) are not in the cache any more "
                f"({cache_dir('statistics')}); bring them back, or begin anew"
            )
    found = _found(layers, model, corpus, tokens, where, seed)
    if pinned is not None and _texts(found.identity) != _texts(pinned):
        raise StatisticsError(
            f"the statistics of {where or corpus} are now {_told(found.identity)}, and not those "
            f"that were pinned ({_told(pinned)}): bring the text of then back, or begin anew"
        )
    return found


def _found(
    layers: Sequence[int],
    model: EditableModel,
    corpus: Any,
    tokens: int | None,
    where: Path | None,
    seed: int,
) -> KeyStatistics:
    """What `layer_statistics` collects or reads, nothing being pinned."""
    if where is None:
        try:
            return key_statistics(model, layers, corpus or "wikipedia", tokens, seed=seed)
        except CorpusError as error:
            found = None if corpus or tokens else _at_hand(model, layers)
            if found is None:
                raise
            logger.warning("%s. Used instead, as they are in the cache: %r", error, found)
            return found
    if where.suffix == ".npz":
        raise StatisticsError(
            f"{where} is a peer's file: `knowedit stats import MODEL {where} -o FOLDER`, then "
            f"name FOLDER"
        )
    found = KeyStatistics.load(where)
    found.check(model, layers)
    return found


def _at_hand(model: EditableModel, layers: Sequence[int]) -> KeyStatistics | None:
    """Of the collections in the cache that hold these layers of this model, the one of the most
    tokens; None where there is none.
    """
    return next(_in_cache(model, layers), None)


def _in_cache(
    model: EditableModel,
    layers: Sequence[int],
    fits: Callable[[int, Mapping[str, Any]], bool] = lambda layer, header: True,
) -> Iterator[KeyStatistics]:
    """The collections in the cache that hold these layers of this model, and whose headers fit;
    those of the most tokens first.
    """
    sizes: dict[Path, int] = {}
    for folder in cache_dir("statistics").glob(f"*-{model.fingerprint[:12]}/*"):
        with suppress(StatisticsError, LookupError, TypeError):  # damaged, or of other layers
            heads = {n: store.header(store.layer_file(folder, n)) for n in layers}
            if all(fits(layer, head) for layer, head in heads.items()):
                sizes[folder] = min(int(head["count"]) for head in heads.values())
    for folder in sorted(sizes, key=lambda one: -sizes[one]):
        with suppress(StatisticsError):  # damaged, or of other experts or settings
            files = {layer: store.layer_file(folder, layer) for layer in layers}
            found = KeyStatistics({n: LayerStatistics.load(file) for n, file in files.items()})
            found.check(model, layers)
            if all(found[layer].layer == layer for layer in layers):
                yield found


def _pinned(model: EditableModel, identity: Mapping[str, Any]) -> KeyStatistics | None:
    """The statistics in the cache that have this identity; None where they are gone."""

    def of(model: EditableModel, wanted: Mapping[int, Any]) -> KeyStatistics | None:
        def fits(layer: int, header: Mapping[str, Any]) -> bool:
            told = wanted[layer]
            of = header["recipe"]["corpus"], header["count"]
            return bool(of == (told["corpus"], told["tokens"]))

        same = {str(layer): one for layer, one in wanted.items()}
        return next((f for f in _in_cache(model, list(wanted), fits) if f.identity == same), None)

    parts: dict[str, dict[int, Any]] = {"": {}, "shared": {}}
    for key, one in identity.items():
        layer, _, part = key.partition(" ")
        parts[part][int(layer)] = one
    if not parts["shared"]:
        return of(model, parts[""])
    routed, shared = (
        of(model.editing("routed"), parts[""]),
        of(model.editing("shared"), parts["shared"]),
    )
    if routed is None or shared is None:
        return None
    return KeyStatistics({layer: routed[layer] for layer in routed.layers}, shared)


def _texts(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity but for the digests, which rounding changes where the text is the same."""
    return {k: {**one, "digest": None} for k, one in identity.items()}


def _told(identity: Mapping[str, Any]) -> str:
    """`98,304 tokens of wikimedia/wikipedia`."""
    one = next(iter(identity.values()))
    return f"{one['tokens']:,} tokens of {one['corpus'].get('name')}"


def _missing(
    where: Path,
    layers: Sequence[int],
    recipe: CollectionRecipe,
    model: EditableModel,
    held: ExitStack,
) -> list[int]:
    """The layers still to collect; if there are any, the folder's lock is `held`."""

    def absent() -> list[int]:
        return [layer for layer in layers if not store.layer_file(where, layer).exists()]

    if absent():
        _lock(where, held)
        for pattern in (".layer-*.part", ".checkpoint-*.part"):  # of a run killed while it wrote
            for part in where.glob(pattern):
                part.unlink(missing_ok=True)
    missing = absent()  # another run may have written them before it let go of the lock
    if missing:
        missing = resumable_layers(where, layers, missing, recipe)
    for layer in set(layers) - set(missing):
        _load(where, layer, recipe, model)
    return missing


def _lock(where: Path, held: ExitStack) -> None:
    """Lock a folder. Raises StatisticsError when another run has done so."""
    try:
        held.enter_context(FileLock(where / "lock").acquire(timeout=LOCK_TIMEOUT))
    except Timeout as error:
        raise StatisticsError(
            f"another run is collecting into {where}; wait for it, or use another folder"
        ) from error


def _cached(model: EditableModel, recipe: CollectionRecipe) -> Path:
    """The folder of the cache for what this recipe collects from `model`."""
    return store.folder(
        model.name, recipe, lambda setup: bool(difference(model, model.fingerprint, setup))
    )


def _load(
    where: Path, layer: int, recipe: CollectionRecipe, model: EditableModel
) -> LayerStatistics:
    """A layer's file, which must hold what this recipe would collect from `model`."""
    path = store.layer_file(where, layer)
    here = LayerStatistics.load(path)
    if here.layer != layer:
        raise StatisticsError(
            f"{path} holds the statistics of layer {here.layer}: somebody moved it here; remove "
            "it, or use another folder"
        )
    if here.recipe != recipe:
        was, now = asdict(here.recipe), asdict(recipe)
        differs = ", ".join(
            f"{k}: {was[k]!r}, asked for {now[k]!r}" for k in now if was[k] != now[k]
        )
        raise StatisticsError(f"{path} holds other statistics ({differs}); use another folder")
    if difference(model, recipe.fingerprint, here.recipe.setup):
        raise StatisticsError(
            f"{path} is of the same weights with another configuration or tokenizer; use another "
            "folder"
        )
    return here
