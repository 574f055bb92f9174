"""The peers' statistics files: `.npz` as ROME, MEMIT, EasyEdit and AlphaEdit write and look for
them. Never a pickle.

    {folder}/{model}/{dataset}_stats/{module}_{precision}_mom2_{sample_size}.npz
        mom2.constructor   a string that readers ignore
        mom2.count         tokens
        mom2.mom2          [d_ff, d_ff], sum(k kᵀ), float32 as they write it
        sample_size        must be the number that is asked for, or their reader ignores the file

The name of the model is its hub id with `/` as `_` (ROME, MEMIT) or the part behind the `/`
(EasyEdit, AlphaEdit).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from knowedit.errors import StatisticsError
from knowedit.io.files import atomic_file
from knowedit.models.editable import EditableModel
from knowedit.statistics.files.store import CollectionRecipe, LayerStatistics
from knowedit.statistics.files.verify import Finding, plausible, require, resembles, sample

FORMATS = ("rome", "memit", "easyedit", "alphaedit")
CONSTRUCTORS = {
    "rome": "util.runningstats.SecondMoment()",
    "memit": "util.runningstats.SecondMoment()",
    "easyedit": "easyeditor.util.runningstats.SecondMoment()",
    "alphaedit": "util.runningstats.SecondMoment()",
}
SAMPLES = 100_000  # documents the peers ask for by default


@dataclass(frozen=True)
class PeerFile:
    """What a peer's file holds, and what its name says.

    Attributes:
        total: `[d_ff, d_ff]`, float64.
        count: tokens.
        sample_size: documents, or None.
        module: of the name, e.g. "model.layers.5.mlp.down_proj"; None if it is named otherwise.
    """

    total: Tensor
    count: int
    sample_size: int | None
    module: str | None


def peer_path(
    folder: Path,
    found: LayerStatistics,
    style: str,
    dataset: str = "wikipedia",
    sample_size: int = SAMPLES,
) -> Path:
    """Where a peer looks for the statistics of this layer.

    Raises:
        StatisticsError: no such format; names in the statistics that are no names of files.
    """
    if style not in FORMATS:
        raise StatisticsError(f"format {style!r} is not known; known: {', '.join(FORMATS)}")
    name = found.model.rstrip("/")
    name = name.replace("/", "_") if style in ("rome", "memit") else name.rsplit("/", 1)[-1]
    for part in (name, dataset, found.module):
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", part):
            raise StatisticsError(
                f"{part!r} cannot be part of a file's name, where letters, digits and . _ - are; "
                "the statistics are damaged, or their model has a name that no peer looks for: "
                "collect them again from a folder or hub id of such letters"
            )
    return folder / name / f"{dataset}_stats" / f"{found.module}_float32_mom2_{sample_size}.npz"


def write(
    folder: Path,
    found: LayerStatistics,
    style: str,
    *,
    dataset: str = "wikipedia",
    sample_size: int = SAMPLES,
) -> Path:
    """Write a layer's statistics so that a peer finds them; returns the path.

    Args:
        dataset, sample_size: what the peer's hyper-parameters ask for (`mom2_dataset`,
            `mom2_n_samples`).

    Raises:
        StatisticsError: no such format; the disk is full.
    """
    if found.counts:
        raise StatisticsError(
            f"layer {found.layer} has statistics of {len(found.counts)} experts, and a peer's file "
            "holds one matrix"
        )
    path = peer_path(folder, found, style, dataset, sample_size)
    members = {
        "mom2.constructor": np.array(CONSTRUCTORS[style]),
        "mom2.count": np.array(found.count, np.int64),
        "mom2.mom2": found.total.to(torch.float32).numpy(),
        "sample_size": np.array(sample_size, np.int64),
    }
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **members)  # type: ignore[arg-type]
    except OSError as error:
        raise StatisticsError(
            f"{path} could not be written ({error.strerror or error}); free disk space"
        ) from error
    return path


def read(path: Path) -> PeerFile:
    """Read a peer's file, unpickling nothing.

    Raises:
        StatisticsError: missing, damaged, holding pickled objects, or without a second moment.
    """
    try:
        with np.load(path, allow_pickle=False) as members:
            if not {"mom2.mom2", "mom2.count"} <= set(members.files):
                raise StatisticsError(
                    f"{path} holds {', '.join(members.files) or 'nothing'}, and no mom2.mom2 "
                    f"with mom2.count"
                )
            total, count = members["mom2.mom2"], members["mom2.count"]
            size = members["sample_size"] if "sample_size" in members.files else None
    except FileNotFoundError:
        raise StatisticsError(f"{path}: there is no such file") from None
    except StatisticsError:
        raise
    except Exception as error:  # numpy, zipfile, zlib and tokenize raise what they like
        hint = (
            "no .npz, or one of pickled objects, which are never loaded"
            if "allow_pickle" in str(error)
            else error
        )
        raise StatisticsError(
            f"{path} cannot be read as .npz ({hint}); fetch or make it again"
        ) from error
    if not all(isinstance(one, np.ndarray) for one in (total, count)):
        raise StatisticsError(f"{path}: its members are no arrays; fetch or make it again")
    if (
        not np.issubdtype(total.dtype, np.floating)
        or count.ndim
        or not np.issubdtype(count.dtype, np.integer)
    ):
        raise StatisticsError(
            f"{path}: mom2.mom2 is {total.dtype}, mom2.count {count.dtype} {count.shape}: no "
            f"second moment"
        )
    if not total.size:
        raise StatisticsError(f"{path}: mom2.mom2 is empty, {list(total.shape)}")
    named = re.fullmatch(r"(.+)_float\d\d_.*mom2.*", path.stem)
    # a peer that took all documents writes NaN
    whole = isinstance(size, np.ndarray) and not size.ndim and np.issubdtype(size.dtype, np.integer)
    documents = int(size) if whole else None  # type: ignore[arg-type]
    return PeerFile(
        torch.from_numpy(total.astype(np.float64)),
        int(count),
        documents,
        named[1] if named else None,
    )


def layer_of(module: str | None, model: EditableModel) -> int | None:
    """The layer whose projection a file's name means, or None."""
    names = {model.layout.projection(layer): layer for layer in model.layout.editable}
    return names.get(module or "")


def import_layer(
    path: Path, model: EditableModel, layer: int | None = None
) -> tuple[LayerStatistics, list[Finding]]:
    """A peer's file as statistics of `model`, after everything about it was checked.

    Args:
        layer: needed where the file's name does not say.

    Raises:
        StatisticsError: it is no second moment, or not of this model and layer; the message says
            why.
    """
    found = read(path)
    named = layer_of(found.module, model)
    if found.module is not None and named is None:
        example = model.layout.projection(model.layout.editable[0])
        raise StatisticsError(
            f"{path} is of {found.module}, {model.name} has modules like {example}: another "
            f"model's file"
        )
    layer = named if layer is None else layer
    if layer is None:
        raise StatisticsError(f"{path}: its name does not say which layer it is of; pass the layer")
    if named is not None and named != layer:
        raise StatisticsError(f"{path} is of layer {named} by its name, not of layer {layer}")
    model.check_layers([layer])
    if model.layout.experts(layer) is not None:
        raise StatisticsError(
            f"layer {layer} of {model.name} has routed experts, and a peer's file holds one "
            "matrix; collect your own with `knowedit stats`"
        )
    seen = sample(model, layer)
    findings = [*plausible(found.total, found.count), resembles(found.total, found.count, seen)]
    require(
        findings,
        str(path),
        "use a file of this model and layer, or collect your own with `knowedit stats`",
    )
    recipe = CollectionRecipe(
        model.fingerprint,
        {"name": f"imported {path.name}", "sample_size": found.sample_size},
        found.count,
        model.max_length,
        skip_first=False,
        seed=0,
        precision="imported",
        setup=model.setup,
    )
    made = LayerStatistics(
        layer=layer,
        module=model.layout.projection(layer),
        model=model.name,
        recipe=recipe,
        count=found.count,
        total=(found.total + found.total.T) / 2,
        first_norm=seen.first_norm,
        other_norm=seen.other_norm,
        extra={"imported": path.name},
    )
    return made, findings
