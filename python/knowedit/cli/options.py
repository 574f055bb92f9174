"""Arguments and options that several commands share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from knowedit.errors import KnowEditError

Model = Annotated[str, typer.Argument(help="A hub id or a folder.")]
_CORPUS = (
    "A .txt/.jsonl/.parquet(.gz) file, 'wikipedia', 'hf:owner/name' or 'self' (the "
    "model's own samples); repeatable."
)
Corpus = Annotated[list[str], typer.Option(help=_CORPUS)]
MethodsCorpus = Annotated[
    list[str] | None,
    typer.Option("--corpus", help=_CORPUS, show_default="wikipedia, neuron-patch: self"),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        help="Keys to sum for the statistics; default: 64 for each of a key's dimensions."
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(
        help="A file or folder of `knowedit stats` (collected or imported) instead of --corpus."
    ),
]
Layers = Annotated[
    str | None, typer.Option(help="Layers, e.g. 5 or 4-8 or 4,6; default: the model's preset.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as saved).")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="As in transformers: cpu, cuda, auto (layers spread over GPUs); default: the GPU, "
        "if any."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """'5', '4-8' or '4,6' as layer numbers; None stays None. Raises KnowEditError."""
    if text is None:
        return None
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last if "-" in part else first) + 1)
            if not span:
                raise ValueError
            layers += span
    except ValueError:
        raise KnowEditError(f"--layers {text!r}: give numbers like 5, 4-8 or 4,6") from None
    return tuple(sorted(set(layers)))


def parse_settings(given: list[str]) -> dict[str, Any]:
    """`["lr=1e-4", "modules=[\"q_proj\"]"]` as a dictionary; values are JSON, lists become tuples.
    Raises KnowEditError.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            raise KnowEditError(
                f"--setting {text!r}: give name=value with a number, true, false, or a list in JSON"
            ) from None
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
    }


def placed(device_map: str | None) -> Any:
    """What `load_model` takes for --device-map: this process' own GPU, where there is one and
    nothing else was said.
    """
    from knowedit.statistics.distributed.ranks import Ranks

    return (
        Ranks.current().device
        if device_map is None
        else None
        if device_map == "cpu"
        else device_map
    )


def one(corpus: list[str] | None) -> Any:
    """A corpus as `text.documents` takes it; None where none was named."""
    return corpus[0] if corpus and len(corpus) == 1 else corpus


def say(text: str) -> None:
    print(text, file=sys.stderr)
