"""Quantised GGUF files as plain float32 folders, dequantised once: later loads take a fraction of a
second, and an edited model is saved like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from knowedit.errors import ModelError
from knowedit.io.files import atomic_folder, cache_dir, disk_errors
from knowedit.io.progress import no_bars_of_transformers
from knowedit.models.copies import ORIGIN

#: Read at once while a file is hashed, in bytes.
BLOCK = 1 << 22


def is_gguf(name: str | Path) -> bool:
    """Whether `name` is a GGUF file on the disk."""
    path = Path(name)
    return path.suffix.lower() == ".gguf" and path.is_file()


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def cached_folder(gguf: Path, say: Callable[[str], None]) -> Path:
    """The folder in the cache with the weights of a user's GGUF file, converted when it is first
    used. Raises ModelError.
    """
    digest = sha256(gguf)
    folder = cache_dir("models") / f"{gguf.stem}-{digest[:12]}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").exists():
            dequantise(gguf, folder, {"name": gguf.name, "sha256": digest}, say)
    return folder


def dequantise(
    gguf: Path, folder: Path, origin: dict[str, str], say: Callable[[str], None]
) -> None:
    """Write the model and tokenizer of a GGUF file as `folder`, weights in float32.

    Args:
        origin: is kept beside them.

    Raises:
        ModelError: transformers cannot read the file, or it is one of several parts.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_whole(gguf)
    say(f"Converting {gguf.name} once to safetensors (up to some minutes) ...")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        with no_bars_of_transformers():
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # transformers', the gguf package's and numpy's own
        raise ModelError(
            f"transformers cannot read {gguf} ({type(error).__name__}: "
            f"{str(error).strip()[:300]}); give the folder or hub id of the original model instead"
        ) from error
    quiet = no_bars_of_transformers()
    with quiet, as_plain(model), atomic_folder(folder) as temporary, disk_errors(folder):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")


def _check_whole(path: Path) -> None:
    """Raise ModelError for one part of a file that was split: transformers would make the weights
    of the others up.
    """
    import gguf

    try:
        count = gguf.GGUFReader(path).get_field(gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
    except (ValueError, OSError, IndexError):  # not a sound file, which transformers will say
        return
    if count is not None and count.contents() > 1:
        raise ModelError(
            f"{path} is one of {count.contents()} parts of a file; join them first (llama.cpp's "
            "llama-gguf-split does)"
        )


@contextmanager
def as_plain(hf: Any) -> Iterator[None]:
    """Within the block a model that transformers dequantised from GGUF is saved as the plain floats
    that its weights are; of any other model nothing is changed.
    """
    config, quantizer = hf.config, getattr(hf, "hf_quantizer", None)
    quantised = getattr(config, "quantization_config", None)
    if "gguf" not in str(getattr(quantised, "quant_method", "")).lower():
        yield
        return
    hf.hf_quantizer = None
    del config.quantization_config
    try:
        yield
    finally:
        hf.hf_quantizer, config.quantization_config = quantizer, quantised
