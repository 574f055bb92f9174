"""Edits written into a GGUF file: a copy of it in which the edited tensors alone differ.

An edited tensor is rounded to its own type where that keeps the edit, else to 8 or 16 bits: four
bits a number can round a small update away, and of some types no encoder is at hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from knowedit.edits.export.gguf_lora import said_in_file
from knowedit.edits.llamacpp import LlamaCpp
from knowedit.errors import EditError
from knowedit.io.files import atomic_file, check_free, disk_errors
from knowedit.models.editable import EditableModel
from knowedit.models.experts import split_name
from knowedit.models.load import accepts_model

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

    from knowedit.edits.edit import Edit

SAID = "knowedit.edits"  # the field with what was written, oldest first
KEPT = 0.1  # rounding an edited tensor may move it by this share of what the edit moved it
SAME = 0.01  # relative difference of a file's tensor from the model's, which bfloat16 may make


@dataclass(frozen=True)
class Written:
    """A tensor that was edited.

    Attributes:
        name: llama.cpp's.
        was, now: its types before and after.
        rounded: |rounding| / |update|, Frobenius.
    """

    name: str
    was: str
    now: str
    rounded: float

    def __str__(self) -> str:
        kept = (
            f"in its own type, {self.was}" if self.was == self.now else f"{self.was} -> {self.now}"
        )
        return f"{self.name}: {kept}; rounding is {self.rounded:.1%} of the update"


@accepts_model
def write_gguf(
    model: EditableModel, edits: Sequence[Edit], source: str | Path, path: str | Path
) -> list[Written]:
    """Copy the GGUF file `source` to `path` with `edits` of `model` written in. `model` is what
    `load_model(source)` gives, or the unquantised one that the file was made of in 16 or 32 bits.

    The file appears whole or not at all. There is no undo record: the unedited file is the record.

    Raises:
        EditError: an edit is of another model or of experts, llama.cpp holds a matrix otherwise,
            the file is not of this model's weights, or `path` exists.
    """
    import gguf

    if not edits:
        raise EditError("no edits to apply; name at least one edit file")
    path, theirs = Path(path), LlamaCpp(model)
    try:
        check_free(path)
    except FileExistsError as error:
        raise EditError(str(error)) from error
    reader = gguf.GGUFReader(source)
    held = {tensor.name: tensor for tensor in reader.tensors}
    data, types, written = {}, {}, []
    for name, (before, after) in _weights(model, edits).items():
        called = theirs.name(name)
        was, now = (theirs.rows(name, matrix).numpy() for matrix in (before, after))
        if called not in held or not _same(held[called], was):
            raise EditError(
                f"{source} does not hold the weights of {model.name} in {called}; give the file "
                "that the edit was computed on"
            )
        own = held[called].tensor_type
        types[called], data[called], rounded = _encoded(was, now, own)
        written.append(Written(called, own.name, types[called].name, rounded))
    said = json.dumps([*_earlier(reader), *map(said_in_file, edits)])
    with atomic_file(path) as temporary, disk_errors(path):
        copy_gguf(reader, temporary, data, types, {SAID: said})
    return written


def _earlier(reader: GGUFReader) -> list[Any]:
    """What the file says of the edits that are in it already."""
    field = reader.get_field(SAID)
    return [] if field is None else list(json.loads(field.contents()))


def _weights(model: EditableModel, edits: Sequence[Edit]) -> dict[str, tuple[Tensor, Tensor]]:
    """The weights that `edits` change, before and after, `[out, in]` float32."""
    names = sorted({name for edit in edits for name in edit.by_parameter(model)})
    if experts := [name for name in names if split_name(name)[1] is not None]:
        raise EditError(
            f"how llama.cpp holds single experts ({experts[0]}) is not known here; write the edit "
            "into a copy of the original model (`knowedit apply`) and convert that"
        )

    def now() -> dict[str, Tensor]:
        return {
            name: (held.T if model.is_transposed(name) else held).detach().float().cpu().clone()
            for name, held in ((name, model.stored(name)) for name in names)
        }

    before = now()
    with ExitStack() as applied:
        for edit in edits:
            applied.enter_context(edit.applied_to(model))
        after = now()
    return {name: (before[name], after[name]) for name in names}


def _same(tensor: Any, wanted: np.ndarray) -> bool:
    """Whether a file's tensor holds this matrix, but for rounding to 16 bits."""
    import gguf

    found = gguf.dequantize(tensor.data, tensor.tensor_type)
    if found.shape != wanted.shape:
        return False
    return bool(np.linalg.norm(found - wanted) <= SAME * np.linalg.norm(wanted))


def _encoded(
    was: np.ndarray, now: np.ndarray, own: GGMLQuantizationType
) -> tuple[GGMLQuantizationType, np.ndarray, float]:
    """`now` in the first of its own type, Q8_0, F16 and F32 that keeps what the edit moved; with
    the share of it that rounding moves.
    """
    import gguf

    moved, kinds = float(np.linalg.norm(now - was)), gguf.GGMLQuantizationType
    for kind in (own, kinds.Q8_0, kinds.F16, kinds.F32):
        try:
            data = gguf.quantize(now, kind)
        except (
            NotImplementedError,
            gguf.quants.QuantError,
        ):  # no encoder; or rows of an odd length
            continue
        rounded = float(np.linalg.norm(gguf.dequantize(data, kind) - now)) / max(moved, 1e-30)
        if rounded <= KEPT or kind == kinds.F32:
            break
    return kind, data, rounded


def copy_gguf(
    reader: GGUFReader,
    path: Path,
    data: Mapping[str, np.ndarray],
    types: Mapping[str, GGMLQuantizationType],
    more: Mapping[str, str] | None = None,
) -> None:
    """Write a file's fields and tensors again to `path`, those of `data` in their place and in
    `types`, with `more` fields of text.
    """
    import gguf

    more = more or {}
    fields = {
        name: field
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name not in more
    }
    arch = fields.pop(gguf.Keys.General.ARCHITECTURE).contents()
    writer = gguf.GGUFWriter(path, arch, endianess=reader.endianess)
    for name, field in fields.items():
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for name, text in more.items():
        writer.add_string(name, text)
    for tensor in reader.tensors:
        now = data.get(tensor.name, tensor.data)
        kind = types.get(tensor.name, tensor.tensor_type)
        writer.add_tensor_info(tensor.name, now.shape, now.dtype, now.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(data.get(tensor.name, tensor.data))
    writer.close()
