"""Which file of a model's folder holds which tensor, and whether they hold all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from knowedit.errors import ModelError

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
            return {name: folder / file for name, file in placed.items()}
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; save the model with save_pretrained, "
            "which writes safetensors"
        ) from error
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: damaged weights ({error}); take it again") from error


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
    draws it at random.

    Args:
        told: what `from_pretrained(..., output_loading_info=True)` returns beside `hf`.
    """
    amiss = sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"])))
    if amiss:
        raise ModelError(
            f"{source} lacks {len(amiss)} tensors of a {type(hf).__name__}, {amiss[0]} the first; "
            "take it again, or edit the original checkpoint"
        )
