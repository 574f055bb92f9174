"""Which file of a model's folder holds which tensor, and whether they hold all, and no others."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from knowedit.errors import ModelError

logger = logging.getLogger(__name__)

#: How tensors are called that only quantised weights have.
PACKED = re.compile(
    r"(scales?(_inv)?|q?zeros|zero_points?|g_idx|qweight|weight_packed|absmax|SCB)$"
)
FLOATS = ("F64", "F32", "BF16", "F16")

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def tensor_files(folder: Path) -> dict[str, Path]:
    """`{tensor: file}` of an index, or of the one file.

    Raises:
        ModelError: there is neither, or it is damaged.
    """
    index, single = folder / INDEX, folder / SINGLE
    try:
        if index.exists():
            placed = json.loads(index.read_text("utf-8"))["weight_map"]
            return {name: folder / _inside(file) for name, file in placed.items()}
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; save the model with save_pretrained, "
            "which writes safetensors"
        ) from error
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: damaged weights ({error}); take it again") from error


def _inside(file: str) -> Path:
    """The path of a weight file that an index names, in its folder. Raises ValueError."""
    path = Path(file)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"{INDEX} names {file!r}, which is not in the folder")
    return path


def check_floats(folder: Path) -> None:
    """Raise ModelError where a safetensors file holds a weight as no float: transformers would take
    quantised integers for the weights themselves. A folder without such files is left to it.
    """
    if not any((folder / name).is_file() for name in (INDEX, SINGLE)):
        return
    for file in sorted(set(tensor_files(folder).values())):
        try:
            with safe_open(file, framework="pt") as opened:
                held = {
                    name: opened.get_slice(name).get_dtype()
                    for name in opened.keys()  # noqa: SIM118
                    if name.rpartition(".")[2] in ("weight", "bias")
                }
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} is truncated, damaged or missing ({error}); take it again"
            ) from error
        other = next((name for name in sorted(held) if held[name] not in FLOATS), None)
        if other is not None:
            raise ModelError(
                f"{file}: {other} is of {held[other]}, and the configuration names no quantisation "
                "that would say what it stands for; edit the original checkpoint"
            )


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of one file. Raises ModelError."""
    try:
        with safe_open(file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is truncated, damaged or missing ({error}); take it again"
        ) from error
    return found


def check_complete(source: str | Path, hf: Any, told: Mapping[str, Iterable[Any]]) -> None:
    """Raise ModelError where the files lack a tensor of the model: transformers only warns, and
    draws it at random; or where they hold scales or zeros that the model does not take. Other
    tensors that it does not take are warned of.

    Args:
        told: what `from_pretrained(..., output_loading_info=True)` returns beside `hf`.
    """
    amiss = sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"])))
    if amiss:
        raise ModelError(
            f"{source} lacks {len(amiss)} tensors of a {type(hf).__name__}, {amiss[0]} the first; "
            "take it again, or edit the original checkpoint"
        )
    beside = sorted(map(str, told.get("unexpected_keys", ())))
    if packed := [name for name in beside if PACKED.search(name)]:
        raise ModelError(
            f"{source} holds {packed[0]}, which is of quantised weights, and a "
            f"{type(hf).__name__} takes none: its configuration is of another checkpoint; take it "
            "again, or edit the original checkpoint"
        )
    if beside:
        logger.warning(
            "%s holds %d tensors that a %s does not take, %s the first: they are left out",
            source, len(beside), type(hf).__name__, beside[0],
        )  # fmt: skip
