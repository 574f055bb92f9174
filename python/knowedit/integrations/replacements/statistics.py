"""Second moments (`layer_stats`): all layers of a job in one pass over the corpus.

The host asks for one layer at a time and runs the model up to it each time. The host's function
stays in charge of the file's name, the corpus, the sample and the longest text; it hands all of
that to `tally`, whose loop over batches is what is replaced. Files are the host's own and are
written by the host's own writer, so that either side reads what the other has made.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from knowedit.integrations.discovery import Signature, mentions, source_of
from knowedit.integrations.hosts import Host
from knowedit.integrations.replacements.base import NotOurs, Replacement, editable, own_way
from knowedit.integrations.replacements.requests import current_job
from knowedit.models.editable import EditableModel
from knowedit.statistics.moments import second_moments

#: The hosts' names of a precision, and ours.
PRECISIONS = {"float32": "fp32", "float64": "fp64"}


@dataclass(frozen=True)
class Asked:
    """What a call of `layer_stats` asks for.

    Attributes:
        name: the module whose inputs are summed.
        also: modules that will be asked for next, by layer, this one among them.
        precision: of the sums.
    """

    view: EditableModel
    name: str
    also: dict[int, str]
    precision: str


_ASKED: ContextVar[Asked | None] = ContextVar("asked", default=None)


def _asked(arguments: inspect.BoundArguments, host: Host) -> Asked:
    """Raises NotOurs when the module is not an MLP's output projection, or more than the second
    moment is collected.
    """
    given = arguments.arguments
    view = editable(given["model"], given["tokenizer"])
    names = {layer: view.layout.projection(layer) for layer in view.layout.editable}
    name = given["layer_name"]
    if list(given["to_collect"]) != ["mom2"]:
        raise NotOurs(f"{given['to_collect']} are collected, not the second moment alone")
    own = [layer for layer, projection in names.items() if projection == name]
    if not own:
        raise NotOurs(f"{name} is not the output projection of an MLP")
    precision = given.get("precision") or "float64"
    if precision not in PRECISIONS:
        raise NotOurs(f"precision={precision}")
    known = current_job()
    hparams = given.get("hparams") or (known.hparams if known else None)
    layers = {*getattr(hparams, "layers", ()), *host.layers, *own} & set(names)
    return Asked(view, name, {layer: names[layer] for layer in sorted(layers)}, precision)


def _make_layer_stats(original: FunctionType, host: Host) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def layer_stats(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        try:
            token = _ASKED.set(_asked(bound, host))
        except NotOurs as reason:
            own_way(original, reason)
            return original(*args, **kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            _ASKED.reset(token)

    return layer_stats


def _returns_the_sums(function: FunctionType) -> str | None:
    """The loop over batches is left empty, so nothing of it may be returned."""
    if not mentions(function, "tally"):
        return "it does not loop over tally(...)"
    tree = source_of(function)
    if tree is None:
        return "its source cannot be read"
    results = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    if any(isinstance(value, ast.Tuple) for value in results):
        return "it returns more than the sums"
    return None


LAYER_STATS = Replacement(
    "all layers of the hyper-parameters in one pass",
    Signature(
        "layer_stats",
        ("model", "tokenizer", "layer_name", "stats_dir", "ds_name", "to_collect"),
        (
            *("model_name", "sample_size", "precision", "batch_tokens", "download", "progress"),
            *("force_recompute", "hparams"),
        ),
    ),
    _make_layer_stats,
    _returns_the_sums,
)


# -- the loop


def _make_tally(original: FunctionType, host: Host) -> Callable[..., Any]:
    def tally(
        stat: Any, dataset: Any, cache: Any = None, quiet: bool = False, **kwargs: Any
    ) -> Any:
        asked = _ASKED.get()
        loader = original(stat, dataset, cache=cache, quiet=quiet, **kwargs)
        if asked is None or stat.mom2.count:
            return loader  # not for layer_stats, or read from the host's file
        return _collected(original, asked, stat, dataset, cache, kwargs)

    return tally


def _collected(
    original: FunctionType,
    asked: Asked,
    stat: Any,
    dataset: Any,
    cache: Any,
    kwargs: dict[str, Any],
) -> Iterator[Any]:
    """A loader without batches: what they would have added is in `stat` already."""
    tools = original.__globals__
    layers = asked.also if cache is not None else {}
    file = Path(str(cache))
    files = {
        layer: file.with_name(file.name.replace(asked.name, name)) for layer, name in layers.items()
    }
    own = next(layer for layer, name in asked.also.items() if name == asked.name)
    files = {layer: at for layer, at in files.items() if not at.exists()} | {own: file}
    lists = _token_lists(tools["make_loader"], dataset, kwargs)
    found = second_moments(asked.view, sorted(files), lists, precision=PRECISIONS[asked.precision])
    size = {"sample_size": kwargs["sample_size"]} if "sample_size" in kwargs else {}
    for layer, moment in found.items():
        total = moment.sum().to("cpu", getattr(torch, asked.precision))
        one = stat if layer == own else type(stat)(mom2=type(stat.mom2)())
        _fill(one, total, moment.count)
        if cache is not None:
            _write(tools["save_cached_state"], files[layer], one, size)
    yield from ()


def _fill(stat: Any, total: Tensor, count: int) -> None:
    stat.mom2.count, stat.mom2.mom2 = count, total


def _write(save: Callable[..., Any], path: Path, stat: Any, size: dict[str, Any]) -> None:
    """By the host's writer, beside the file first, so that no half of it is ever found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        save(str(temporary), stat, size)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _token_lists(
    make_loader: Callable[..., Any], dataset: Any, kwargs: dict[str, Any]
) -> Iterable[Sequence[list[int]]]:
    """The host's sample of the corpus, group by group, cut where the host cuts."""
    options = {**kwargs, "collate_fn": _ids, "pin_memory": False}
    yield from make_loader(dataset, **options)


def _ids(items: Sequence[Any]) -> list[list[int]]:
    return [item["input_ids"].tolist() for item in items if len(item["input_ids"])]


TALLY = Replacement(
    "batches of similar length, no padding to the host's budget",
    Signature("tally", ("stat", "dataset"), ("cache", "quiet"), keywords=True),
    _make_tally,
    lambda function: (
        None
        if {"make_loader", "save_cached_state"} <= function.__globals__.keys()
        else "its module has no make_loader or save_cached_state"
    ),
)
