"""Edits written into a checkpoint on the disk, a tensor at a time: the model is never loaded, so
that one too large for the memory can be edited where it lies.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from knowedit.edits.changes import Change, check_fits, write_changes
from knowedit.edits.export.folder import (
    BASE_CARD,
    CARD,
    CONFIG,
    ENTRY,
    ORIGINAL,
    RECORD,
    config_of,
    describe,
    header_of,
)
from knowedit.errors import EditError
from knowedit.io.files import atomic_folder, check_free, disk_errors
from knowedit.io.progress import bar
from knowedit.io.tensors import checksum, overwrite, write_streamed
from knowedit.models.checkpoint import Checkpoint
from knowedit.models.experts import split_name
from knowedit_kernels.lowrank import WeightLedger

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit

#: Endings of files with weights: none is taken along but the checkpoint's own, or a loader might
#: prefer one without the edit.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def merge_into(checkpoint: str | Path, edits: Sequence[Edit], out: str | Path) -> Path:
    """Copy the folder of a model with `edits` written into its weights, the same bits as
    `save_edited` writes, without loading the model: at most one tensor, and what is computed from
    it, is in memory.

    Weights keep their files, places and dtypes; configuration, tokenizer and other files are
    copied, other weights (`.bin`, `.gguf`, adapters' ...) are not. The model card of the base stays
    as `README.base.md`. The folder appears whole or not at all; `knowedit undo` takes every bit
    back.

    Raises:
        EditError: an edit is of another model, does not fit, or `out` exists already.
        ModelError: `checkpoint` is not a plain safetensors checkpoint, or it stores an edited
            weight as a part of another. OSError: the disk refuses.
    """
    if not edits:
        raise EditError("no edits to apply; name at least one edit file")
    out = Path(out)
    try:
        check_free(out)
        base = Checkpoint(checkpoint)
        changes = {edit.key: _changes(base, edit) for edit in edits}
        _check_together(edits)
        names = sorted({name for changed in changes.values() for name in changed})
        with atomic_folder(out) as temporary, disk_errors(out):
            _copy(base, temporary)
            header = header_of(base, edits, base.config)
            header["weights"] = {name: _merge(base, name, changes, temporary) for name in names}
            header[CONFIG] = config_of(temporary).get(ENTRY)
            originals = {f"{ORIGINAL}{name}": partial(base.tensor, name) for name in names}
            tensors: dict[str, Callable[[], Tensor]] = {**originals, **_parts(changes)}
            write_streamed(temporary / RECORD, tensors, header)
            describe(temporary, header)
    except FileExistsError as error:
        raise EditError(str(error)) from error
    return out


def _changes(base: Checkpoint, edit: Edit) -> dict[str, Change]:
    """The changes of an edit that was made for this checkpoint. Raises EditError."""
    if not edit.changes:
        raise EditError(
            f"this {edit.method_name} edit changes no weights (it answers from a memory); apply it "
            "in Python: Edit.load(...).apply(model)"
        )
    if whole := [n for n in edit.changes if n.isdecimal() or split_name(n)[1] is not None]:
        raise EditError(
            f"{whole[0]} is known by the loaded model only (a layer of an early file, or an "
            "expert's matrix); apply this edit without --stream (save_edited)"
        )
    edit.check_made_for(base)
    if unknown := sorted(set(edit.changes) - set(base.shapes)):
        raise EditError(f"{base.name} has no parameter {', '.join(unknown)}")
    for name, change in edit.changes.items():
        base.stored_as(name)
        check_fits(name, change, base.shapes[name], base.is_transposed(name))
    return edit.changes


def _check_together(edits: Sequence[Edit]) -> None:
    """Raise EditError for an edit given twice, or for two that rewrite the same thing whole."""
    owner: dict[str, str] = {}
    if len({edit.key for edit in edits}) < len(edits):
        raise EditError("an edit is given twice; name each once")
    for edit in edits:
        for thing in edit.exclusive:
            if owner.setdefault(thing, edit.key) != edit.key:
                raise EditError(
                    f"{owner[thing]} and {edit.key} both rewrite {thing}, and both would be lost: "
                    "compute them together, or one while the other is applied"
                )


def _copy(base: Checkpoint, folder: Path) -> None:
    """The checkpoint's own weights, and all files that are none."""
    places = [
        source.relative_to(base.folder)
        for source in sorted(base.folder.rglob("*"))
        if source.is_file()
        and (source in base.files.values() or not source.name.lower().endswith(WEIGHTS))
    ]
    wanted = [
        place
        for place in places
        if place.name not in (RECORD, CARD) and not any(p.startswith(".") for p in place.parts)
    ]
    megabytes = {place: (base.folder / place).stat().st_size / 1e6 for place in wanted}
    with bar("copying the model", sum(megabytes.values()), "MB") as advance:
        for place in wanted:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.folder / place, folder / place)
            advance(megabytes[place])
    if (base.folder / CARD).is_file():
        shutil.copyfile(base.folder / CARD, folder / BASE_CARD)


def _merge(
    base: Checkpoint, name: str, changes: Mapping[str, Mapping[str, Change]], folder: Path
) -> dict[str, Any]:
    """Write one edited weight into its file in `folder`; returns what the record says of it."""
    weight, stored = base.tensor(name), base.stored_as(name)
    ledger = WeightLedger({name: weight}, [name] if base.is_transposed(name) else [])
    for key, changed in changes.items():
        if name in changed:
            ledger.add_many(key, {name: changed[name].raw})
    overwrite(folder / base.files[stored].name, stored, weight)
    edited = checksum(weight)
    return {"tensor": stored, "transposed": base.is_transposed(name), "edited": edited}


def _parts(changes: Mapping[str, Mapping[str, Change]]) -> dict[str, Callable[[], Tensor]]:
    """What the record holds of each of several edits, so that one may be taken back alone."""
    found: dict[str, Callable[[], Tensor]] = {}
    for number, changed in enumerate(changes.values() if len(changes) > 1 else ()):
        for name, tensor in write_changes(changed).items():
            found[f"{number}.{name}"] = tensor.contiguous
    return found
