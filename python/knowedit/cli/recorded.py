"""What an edit's record keeps of its command line, and how `--config` reads it: paths stand from
the folder of the edit's file, so that it works from any other, and after both have moved.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: Options that take paths, or names of models and data sets.
PATHS = ("model", "corpus", "statistics")
#: How a path begins in a record; nothing else is one.
RELATIVE = ("./", "../")


def kept(given: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The options in `given` as the record in `file` has them."""
    return _each(given, lambda text: _from_folder(text, file.parent))


def found(record: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The options of the record in `file`, with paths from the current folder."""

    def here(text: str) -> str:
        return os.path.relpath(file.parent / text) if text.startswith(RELATIVE) else text

    return _each(record, here)


def _each(options: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(one) for one in value]
        return change(value) if isinstance(value, str) else value

    return {name: changed(v) if name in PATHS else v for name, v in options.items()}


def _from_folder(text: str, folder: Path) -> str:
    """A relative path (a corpus may have its weight behind it) from `folder`; a name, and a path
    that is the same everywhere, stay.
    """
    from knowedit.statistics.corpus.hub import HubSource

    weighted = re.fullmatch(r"(.+)(\*[\d.]+)", text)
    path, weight = weighted.groups() if weighted and not Path(text).exists() else (text, "")
    named = path == "self" or HubSource.named_by(path)
    if named or Path(path).is_absolute() or not Path(path).exists():
        return text
    beside = os.path.relpath(path, folder)
    return (beside if beside.startswith("..") else f"./{beside}") + weight
