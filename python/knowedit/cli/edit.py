"""`knowedit edit`, `apply`, `undo` and `export`: making an edit, and writing it into a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowedit.cli.options import (
    App,
    Config,
    DeviceMap,
    Dtype,
    Json,
    Layers,
    Limit,
    MethodsCorpus,
    Model,
    Quiet,
    Seed,
    Settings,
    Statistics,
    Tokens,
    edit_of,
    one,
    parse_methods,
    placed,
    say,
)
from knowedit.errors import KnowEditError

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit
    from knowedit.facts.fact import Fact

app = App()

Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]


@app.command()
def edit(
    ctx: typer.Context,
    model: Model,
    facts: Annotated[
        str,
        typer.Argument(
            help="A .jsonl/.json/.csv(.gz) file of facts, a name of `knowedit datasets`, or an "
            "edit file: its facts."
        ),
    ],
    output: Output,
    method: Annotated[
        list[str], typer.Option("--method", help="A name of `knowedit methods`, or a record.")
    ] = ["memit"],  # noqa: B006
    settings: Settings = None,
    config: Config = None,
    limit: Limit = None,
    corpus: MethodsCorpus = None,
    tokens: Tokens = None,
    statistics: Statistics = None,
    layers: Layers = None,
    history: Annotated[
        Path | None,
        typer.Option(
            help="Earlier edits of this model, to write after and to spare; grows with every edit."
        ),
    ] = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compute an edit and save it; no model is changed. The file records how it was made:
    `--config` with it computes the same edit again.
    """
    from knowedit.edits.history import History
    from knowedit.methods.base import statistics_for
    from knowedit.methods.session import Session
    from knowedit.models.load import load_model

    if len(method) != 1:
        raise KnowEditError("an edit is made by one method; give --method once")
    chosen = parse_methods(method, settings, layers, seed)[0].with_corpus(one(corpus))
    wanted, earlier_edit = _facts(facts, limit), edit_of(ctx)
    editable = load_model(model, dtype=dtype, device_map=placed(device_map), say=say)
    if earlier_edit is not None:
        earlier_edit.check(editable)
    keys = statistics_for([chosen], editable, one(corpus), tokens, statistics)
    if history:
        earlier = History.load(history) if history.exists() else History(editable.fingerprint)
        made = Session(chosen, editable, keys, earlier).write(wanted)
    else:
        made = chosen.compute(editable, wanted, keys)
    run = {
        "model": model,
        "corpus": corpus,
        "tokens": tokens,
        "statistics": None if statistics is None else str(statistics),
        "dtype": dtype,
    }
    made.report.details["run"] = {name: value for name, value in run.items() if value is not None}
    made.save(output)
    if history:
        earlier.save(history)
    if as_json:
        print(json.dumps(_record(made, output)))
        return
    _print_edit(made)
    if earlier_edit is not None:
        same = made.key == earlier_edit.key
        print(f"{'the same bits as' if same else 'not the same bits as'} {config}")
    if made.changes:
        where = f"knowedit apply {model} {history or output} -o FOLDER"
        print(f"saved to {output}; apply it with: {where}")
    else:  # a memory edit changes no weight
        print(f"saved to {output}; apply it in Python: Edit.load(...).apply(model)")


def _facts(name: str, limit: int | None) -> list[Fact]:
    """The facts of a set, a file, or an edit."""
    from knowedit.facts.sets import load

    if not name.endswith(".safetensors"):
        return load(name, limit)
    from knowedit.edits.edit import Edit

    return Edit.load(name).facts[:limit]


@app.command()
def apply(
    model: Model,
    edits: Annotated[
        list[Path],
        typer.Argument(help="Edit files, or the history of a sequence; all are written together."),
    ],
    output: Output,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quiet: Quiet = False,
) -> None:
    """Write edits into a copy of the model that any transformers user can load; `undo` takes every
    bit back.
    """
    from knowedit.edits.export.folder import save_edited
    from knowedit.edits.history import edits_in
    from knowedit.models.load import load_model

    loaded = [edit for path in edits for edit in edits_in(path)]
    editable = load_model(model, dtype=dtype, device_map=placed(device_map), say=say)
    save_edited(editable, loaded, output)
    print(f"wrote {output}; take it back with: knowedit undo {output}")


@app.command()
def undo(
    folder: Annotated[Path, typer.Argument(help="A folder written by `knowedit apply`.")],
) -> None:
    """Restore the original bits of an edited model's folder, and check its fingerprint."""
    from knowedit.edits.export.folder import restore

    print(f"{folder}: every weight is back; fingerprint {restore(folder)}")


@app.command()
def export(
    model: Model,
    edit_file: Annotated[Path, typer.Argument(help="An edit file.")],
    output: Output,
    format: Annotated[
        str, typer.Option(help="peft: a LoRA adapter; folder: the whole model, as `apply` does.")
    ] = "peft",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quiet: Quiet = False,
) -> None:
    """Write an edit in another program's format: as a LoRA adapter for peft or vLLM."""
    from knowedit.edits.edit import Edit
    from knowedit.edits.export.listing import export_format
    from knowedit.models.load import load_model

    loaded, write = Edit.load(edit_file), export_format(format)
    write(load_model(model, dtype=dtype, device_map=placed(device_map), say=say), [loaded], output)
    print(f"wrote {output}")


def _record(made: Edit, path: Path) -> dict[str, Any]:
    """What `--json` prints of an edit."""
    return {
        "file": str(path),
        "key": made.key,
        "fingerprint": made.fingerprint,
        "facts": [fact.to_dict() for fact in made.facts],
        "config": made.config,
        "report": made.report.to_dict(),
    }


def _print_edit(made: Edit) -> None:
    report = made.report.to_dict()
    print(f"{made.method_name}: {len(made.facts)} facts, {len(made.changes)} weights changed")
    if "trainable" in report:
        memory = report["peak_memory_bytes"]
        print(
            f"  {report['trainable']:,} numbers trained in {report['steps']} steps and "
            f"{report['seconds']:.1f} s"
            + (f", {memory / 2**20:,.0f} MiB of memory" if memory is not None else "")
            + f"; NLL of the answers {report['loss']:.3f}"
        )
    for layer, chosen in report.get("layers", {}).items():
        others = (f"  {k} {v:.4g}" for k, v in chosen.items() if k not in ("gain", "lowest_gain"))
        print(
            f"  layer {layer}: gain {chosen['gain']:.3f}  |delta|/|W| "
            f"{report['relative_norm'][layer]:.3f}{''.join(others)}"
        )
    for warning in made.warnings:
        print(f"  note: {warning}")
