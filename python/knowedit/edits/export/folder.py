"""A copy of the whole model, edited, that any transformers user can load, beside the record that
takes every bit back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from knowedit.errors import EditError
from knowedit.io.files import atomic_file, atomic_folder
from knowedit.io.tensors import read_file, write_file
from knowedit.models.editable import EditableModel
from knowedit.models.gguf import as_plain
from knowedit.models.load import accepts_model, fingerprint_of

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit

RECORD = "knowedit-undo.safetensors"
FORMAT = "knowedit-undo/1"


@accepts_model
def save_edited(model: EditableModel, edits: Sequence[Edit], folder: str | Path) -> Path:
    """Save `model` with `edits` written into its weights, and the original bits of those weights
    beside it.

    The folder appears whole or not at all; the model in memory is left as it was found.

    Raises:
        EditError: an edit does not fit, the folder exists already, or transformers writes an edited
            weight as a part of another one. OSError: the disk refuses.
    """
    if not edits:
        raise EditError("no edits to apply; name at least one edit file")
    if active := model.ledger.active:
        raise EditError(
            f"{model.name} has active edits ({', '.join(active)}); undo them and name them with "
            f"the others"
        )
    names = sorted({name for edit in edits for name in edit.by_parameter(model)})
    parameters = dict(model.hf.named_parameters())
    originals = {name: parameters[name].detach().cpu().clone() for name in names}
    header = {
        "format": FORMAT,
        "fingerprint": model.fingerprint,
        "model": model.name,
        "edits": [
            {"method": e.method_name, "key": e.key, "facts": [f.to_dict() for f in e.facts]}
            for e in edits
        ],
    }
    applied: list[Edit] = []
    try:
        for edit in edits:
            edit.apply(model)
            applied.append(edit)
        with as_plain(model.hf), atomic_folder(folder) as temporary:
            model.hf.save_pretrained(temporary)
            model.tokenizer.save_pretrained(temporary)
            record = _as_written(model.hf, originals)
            _check_written(record, temporary)
            write_file(temporary / RECORD, record, header)
    except FileExistsError as error:
        raise EditError(str(error)) from error
    finally:
        for edit in applied:
            edit.undo(model)
    return Path(folder)


def _as_written(hf: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters under the names, and in the shapes, in which transformers saves them: a checkpoint
    can call them otherwise than the model's modules do (most models that see pictures).
    """
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder, state_dict=dict(tensors))
        return {
            name: tensor
            for file in Path(folder).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }


def _check_written(record: Mapping[str, Tensor], folder: Path) -> None:
    """Raise EditError for a tensor that is in none of the folder's files in this shape."""
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            shapes |= {name: opened.get_slice(name).get_shape() for name in names}
    missing = [name for name, tensor in record.items() if shapes.get(name) != [*tensor.shape]]
    if missing:
        raise EditError(
            f"transformers writes {missing[0]} together with other weights, so that its bits could "
            "not be put back into the folder; keep the edit file, and apply it to the loaded model"
        )


def write(model: EditableModel, edits: Sequence[Edit], path: str | Path) -> Path:
    """`save_edited`, as every export format is called."""
    return save_edited(model, edits, path)


def restore(folder: str | Path) -> str:
    """Put the original bits back into a folder written by `save_edited`; returns the restored
    model's fingerprint.

    Each weight file is replaced in one step and the record goes last, so an interrupted undo is
    finished by running it again.

    Raises:
        EditError: the folder holds no record, or the result is not the model the edits were made
            on.
    """
    folder = Path(folder)
    if not (folder / RECORD).exists():
        raise EditError(
            f"{folder} holds no {RECORD}: it was not written by `knowedit apply`, or is already "
            f"undone"
        )
    header, originals = read_file(folder / RECORD, FORMAT, "an undo record")
    left = set(originals)
    for file in sorted(folder.glob("*.safetensors")):
        if file.name == RECORD:
            continue
        with safe_open(file, framework="pt") as opened:
            metadata, here = opened.metadata(), left & set(opened.keys())
        if here:
            tensors = load_file(file)
            tensors |= {name: originals[name] for name in here}
            with atomic_file(file) as temporary:
                save_file(tensors, temporary, metadata=metadata)
            left -= here
    if left:
        raise EditError(
            f"{folder}: the weights {sorted(left)} of the undo record are in none of its files"
        )
    found = fingerprint_of(folder)
    if found != header["fingerprint"]:
        raise EditError(
            f"{folder}: after the undo its fingerprint is {found[:12]}, before the edit it was "
            f"{header['fingerprint'][:12]}: other weights were changed too; take the original "
            f"model again"
        )
    (folder / RECORD).unlink()
    return found
