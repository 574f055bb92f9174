"""YAML and JSON that somebody wrote by hand: read strictly, in bounded time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knowedit.errors import ConfigError

#: Values that a file may stand for, once what it refers to (`*name`) is written out.
MOST = 100_000


def read_document(path: Path) -> Any:
    """What a YAML or JSON file says; None: nothing.

    Raises:
        ConfigError: it is neither, says a name twice, or refers to itself or to so much that it
            would not fit into memory. OSError: it cannot be read.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _size(path, node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: neither YAML nor JSON ({error})") from None


def _size(path: Path, node: Any, known: dict[int, int]) -> int:
    """How many values a node stands for. Raises ConfigError: too many, or a name is there twice."""
    import yaml

    if id(node) in known:
        if not known[id(node)]:
            raise ConfigError(f"{_line(path, node)}: this refers to itself; write it out")
        return known[id(node)]
    known[id(node)], size = 0, 1
    if isinstance(node, yaml.MappingNode):
        names = set()
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode):
                if (name.tag, name.value) in names:
                    raise ConfigError(f"{_line(path, name)}: {name.value!r} is there twice")
                names.add((name.tag, name.value))
            size += _size(path, name, known) + _size(path, value, known)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_size(path, value, known) for value in node.value)
    if size > MOST:
        raise ConfigError(f"{_line(path, node)}: this is more than {MOST:,} values, written out")
    known[id(node)] = size
    return size


def _line(path: Path, node: Any) -> str:
    return f"{path}:{node.start_mark.line + 1}"
