"""Our safetensors files: named tensors and a JSON header that says which format they are of, under
the metadata key "knowedit".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from knowedit.errors import EditError, KnowEditError
from knowedit.io.files import atomic_file

KEY = "knowedit"


def write_file(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write `tensors` (moved to the CPU) and `header`, which has a "format", to one file,
    atomically. Raises OSError: the disk refuses; an older file is left as it was.
    """
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(held, temporary, metadata={KEY: json.dumps(header)})
    return Path(path)


def read_header(path: str | Path, error: type[KnowEditError] = EditError) -> dict[str, Any]:
    """The header alone; empty for another program's safetensors file. Raises `error`: missing or
    damaged.
    """
    if not Path(path).is_file():
        raise error(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (SafetensorError, json.JSONDecodeError, OSError) as problem:
        raise error(
            f"{path} is damaged or not a safetensors file ({problem}); make it again"
        ) from problem
    if not isinstance(found, dict):
        raise error(f"{path} is damaged: its header is not a record; make it again")
    return found


def format_of(path: str | Path, error: type[KnowEditError] = EditError) -> str | None:
    """The format of a file of ours; None: another program's. Raises `error`: missing or damaged."""
    return read_header(path, error).get("format")


def read_file(
    path: str | Path,
    formats: str | Sequence[str],
    what: str,
    error: type[KnowEditError] = EditError,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file.

    Args:
        formats: that it may be of, the newest first.
        what: the file should be, with its article, for the message.

    Raises:
        error: missing, damaged, of none of `formats`, or of a newer one.
    """
    known, header = (
        (formats,) if isinstance(formats, str) else tuple(formats),
        read_header(path, error),
    )
    found = header.get("format")
    if found not in known:
        if _newer(found, known):
            raise error(
                f"{path} was written by a newer version of this program (format {found!r}, this "
                f"one reads {', '.join(known)}); install that version"
            )
        raise error(
            f"{path} is not {what} of this version (format {found!r}, expected {known[0]!r})"
        )
    with safe_open(path, framework="pt") as file:
        return header, {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
        }


def _newer(found: Any, known: Sequence[str]) -> bool:
    """Whether a format is a later one of the same name as one that is known."""
    name, _, number = str(found).partition("/")
    same = [int(form.partition("/")[2]) for form in known if form.partition("/")[0] == name]
    return bool(same) and number.isdecimal() and int(number) > max(same)
