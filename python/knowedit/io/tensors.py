"""Our safetensors files: named tensors and a JSON header that says which format they are of, under
the metadata key "knowedit".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    atomically. Raises OSError or SafetensorError: the disk refuses; an older file is left as it
    was.
    """
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(held, temporary, metadata={KEY: json.dumps(header)})
    return Path(path)


@contextmanager
def opened(
    path: str | Path, error: type[KnowEditError] = EditError, remedy: str = "make it again"
) -> Iterator[Any]:
    """The opened file, from which single tensors can be read. Raises `error`: missing or damaged;
    the message ends with `remedy`.
    """
    if Path(path).is_dir():
        raise error(f"{path} is a folder; name one of our files in it, or another file")
    if not Path(path).is_file():
        raise error(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, json.JSONDecodeError, OSError) as problem:
        raise error(
            f"{path} is truncated or damaged, or not a safetensors file ({problem}); {remedy}"
        ) from problem


def header_of(file: Any) -> dict[str, Any]:
    """The header of an opened file; empty for another program's."""
    found = json.loads((file.metadata() or {}).get(KEY, "{}"))
    return found if isinstance(found, dict) else {}


def tensors_of(file: Any) -> dict[str, Tensor]:
    """All tensors of an opened file."""
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def format_of(path: str | Path, error: type[KnowEditError] = EditError) -> str | None:
    """The format of a file of ours; None: another program's. Raises `error`: missing or damaged."""
    with opened(path, error) as file:
        return header_of(file).get("format")


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
    known = (formats,) if isinstance(formats, str) else tuple(formats)
    with opened(path, error) as file:
        header = header_of(file)
        if (found := header.get("format")) in known:
            return header, tensors_of(file)
    if _newer(found, known):
        raise error(
            f"{path} was written by a newer version of this program (format {found!r}, this one "
            f"reads {', '.join(known)}); install that version"
        )
    raise error(f"{path} is not {what} of this version (format {found!r}, expected {known[0]!r})")


def _newer(found: Any, known: Sequence[str]) -> bool:
    """Whether a format is a later one of the same name as one that is known."""
    name, _, number = str(found).partition("/")
    same = [int(form.partition("/")[2]) for form in known if form.partition("/")[0] == name]
    return bool(same) and number.isdecimal() and int(number) > max(same)
