"""The `knowedit` command: one short function a command; the work is done by the modules they
call.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from knowedit.cli import measure as cli_measure
from knowedit.cli import stats as cli_stats
from knowedit.cli import study as cli_study
from knowedit.cli import train as cli_train
from knowedit.cli.options import (
    Corpus,
    DeviceMap,
    Dtype,
    Json,
    Layers,
    MethodsCorpus,
    Model,
    Statistics,
    Tokens,
    one,
    parse_layers,
    parse_settings,
    placed,
    say,
)
from knowedit.errors import KnowEditError
from knowedit.models.download import DEFAULT_MODEL

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Change single facts inside a language model, see what moved, and take it back bit for "
    "bit.",
)

app.add_typer(cli_stats.app, name="stats")
app.add_typer(cli_measure.app)
app.add_typer(cli_study.app, name="study")
app.add_typer(cli_train.app, name="train")

METHODS = (  # as in `editors.EDITORS`, which is slow to import
    "memit, rome, emmet, pmet, memit-merge, alphaedit, rose, metake, look-ahead, neuron-patch, "
    "ft, ft-l, lora, "
    "regularised-lora, kl-ft, kl-lora, mend, serac"
)
Method = Annotated[str, typer.Option(help=f"One of {METHODS}.")]
Methods = Annotated[str, typer.Option(help=f"One or more, separated by commas, of {METHODS}.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"knowedit {version('knowedit-kernels')}")
        raise typer.Exit


@app.callback()
def shared(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command line; errors a user can mend end with one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app()
    except KnowEditError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        print(
            f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "),
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(
            "interrupted; what was checkpointed is kept, run the same command to go on",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="A hub id or a folder.")] = DEFAULT_MODEL,
    corpus: Corpus = ["self"],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Keys to sum for the statistics.")] = 16_384,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the page demo.html there.")
    ] = None,
) -> None:
    """Edit six facts of a real language model, show what changed and what did not, and undo it bit
    for bit.
    """
    from knowedit.cli.demo import run

    run(model, one(corpus), tokens, output)


@app.command()
def edit(
    model: Model,
    facts: Annotated[
        str, typer.Argument(help="A .jsonl/.json/.csv(.gz) file of facts, or 'demo' or 'embedded'.")
    ],
    output: Output,
    method: Method = "memit",
    corpus: MethodsCorpus = None,
    tokens: Tokens = None,
    statistics: Statistics = None,
    layers: Layers = None,
    gain: Annotated[
        float | None, typer.Option(help="Share of each planned change to realise (MEMIT).")
    ] = None,
    weight: Annotated[
        float | None, typer.Option(help="lambda itself instead of the gain (MEMIT).")
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--no-merge", help="One value for all facts of a subject (the default)."
        ),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            help="Earlier edits of this model, to write after and to spare; grows with every edit."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="Another setting of the method, as name=value: lr=1e-4, steps=20, rank=8."
        ),
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Compute an edit and save it; no model is changed."""
    from knowedit.edits.history import History
    from knowedit.facts.sets import load
    from knowedit.methods import make_editor, statistics_for
    from knowedit.methods.session import Session
    from knowedit.models.load import load_model

    wanted = load(facts)
    named = {
        "layers": parse_layers(layers),
        "gain": gain,
        "weight": weight,
        "merge_subjects": merge,
    }
    editor = make_editor(method, corpus=one(corpus), **{**named, **parse_settings(setting or [])})
    editable = load_model(model, dtype=dtype, device_map=placed(device_map), say=say)
    keys = statistics_for([editor], editable, one(corpus), tokens, statistics)
    if history:
        earlier = History.load(history) if history.exists() else History(editable.fingerprint)
        made = Session(editor, editable, keys, earlier).write(wanted)
        made.save(output)
        earlier.save(history)
    else:
        made = editor.compute(editable, wanted, keys)
        made.save(output)
    _print_edit(made)
    if made.changes:
        print(
            f"saved to {output}; apply it with: knowedit apply {model} {history or output} -o "
            f"FOLDER"
        )
    else:  # a memory edit changes no weight
        print(f"saved to {output}; apply it in Python: Edit.load(...).apply(model)")


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
) -> None:
    """Write edits into a copy of the model that any transformers user can load; `undo` takes every
    bit back.
    """
    from knowedit.edits.export.folder import save_edited
    from knowedit.edits.history import edits_in
    from knowedit.models.load import load_model

    loaded = [edit for path in edits for edit in edits_in(path)]
    save_edited(
        load_model(model, dtype=dtype, device_map=placed(device_map), say=say), loaded, output
    )
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
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Write an edit as a LoRA adapter for peft or vLLM."""
    from knowedit.edits.edit import Edit
    from knowedit.models.load import load_model

    loaded = Edit.load(edit_file)
    loaded.export(output, load_model(model, dtype=dtype, device_map=placed(device_map), say=say))
    print(f"wrote {output}")


@app.command("eval")
def evaluate(
    model: Model,
    dataset: Annotated[
        str, typer.Option(help="A data set's name or a file of facts.")
    ] = "embedded",
    method: Methods = "memit",
    edits: Annotated[int | None, typer.Option(help="Use the first so many facts.")] = None,
    protocol: Annotated[
        str, typer.Option(help="batch: all facts at once; single: each alone; sequential.")
    ] = "batch",
    batch: Annotated[int, typer.Option(help="Facts an edit (sequential).")] = 50,
    every: Annotated[int, typer.Option(help="Facts between two measurements (sequential).")] = 100,
    text: Annotated[
        str | None, typer.Option(help="Held-out text for the perplexity, as --corpus (sequential).")
    ] = None,
    corpus: MethodsCorpus = None,
    tokens: Tokens = None,
    statistics: Statistics = None,
    layers: Layers = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for results and single prompts.")
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Measure methods: efficacy, paraphrase, neighbourhood, drift on ordinary text; with 95 %
    intervals.
    """
    from knowedit.evaluation.protocols import measure, write_run

    results = measure(
        model,
        dataset,
        method.split(","),
        edits,
        protocol,
        one(corpus),
        tokens,
        parse_layers(layers),
        dtype,
        device_map=placed(device_map),
        batch=batch,
        every=every,
        text=text,
        where=statistics,
        say=say,
    )
    if output:
        write_run(output, results)
    if as_json:
        print(json.dumps([result.to_dict() for result in results]))
    else:
        print("\n\n".join(map(str, results)))


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="An edit, a statistics file, or an edited model's folder.")
    ],
) -> None:
    """Say what a file of ours holds: method, facts, layers, norms, the model it belongs to."""
    from knowedit.cli.inspection import describe

    print(describe(path))


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Also check this model.")] = None,
    as_json: Json = False,
) -> None:
    """What hardware is here, which kernels will run, why not the others, and whether a model can be
    edited.
    """
    from knowedit.cli.inspection import diagnose

    report = diagnose(model)
    if as_json:
        print(json.dumps(report))
        return
    for section, entries in report.items():
        print(section)
        for name, value in entries.items():
            print(f"  {name:26} {str(value).replace(chr(10), chr(10) + ' ' * 29)}")


def _print_edit(made: Any) -> None:
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
        extra = "".join(
            f"  {k} {v:.4g}" for k, v in chosen.items() if k not in ("gain", "lowest_gain")
        )
        print(
            f"  layer {layer}: gain {chosen['gain']:.3f}  |delta|/|W| "
            f"{report['relative_norm'][layer]:.3f}{extra}"
        )
    for warning in made.warnings:
        print(f"  note: {warning}")
