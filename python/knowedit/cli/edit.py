"""`knowedit edit`, `apply`, `undo` and `export`: making an edit, and writing it into a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowedit.cli import recorded
from knowedit.cli.commands import App
from knowedit.cli.options import (
    GO_ON,
    STATISTICS,
    Chat,
    Join,
    Limit,
    Loading,
    MethodRun,
    Model,
    Output,
    Strict,
    command_line,
    edit_of,
    in_ranks,
    one,
    say,
)
from knowedit.edits.export.listing import formats
from knowedit.errors import KnowEditError
from knowedit.io.files import check_file, check_free, is_safetensors, locked
from knowedit.io.lines import number_of
from knowedit.io.progress import kept_on_interrupt
from knowedit.models.gguf import is_gguf

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit
    from knowedit.facts.fact import Fact

app = App()

File = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
Format = Annotated[
    str,
    typer.Option(
        help="; ".join(f"{name}: {what.partition(',')[0]}" for name, what in formats().items())
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Write also what ruins the model.")]
Facts = Annotated[
    str,
    typer.Argument(
        help="A .jsonl/.json/.csv(.gz) file of facts, a name of `knowedit datasets`, or an edit "
        "file: its facts."
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        help="Another limit of what an edit may do, such as perplexity=1.2, or must do: said=1 "
        "refuses one that does not say every fact; repeatable."
    ),
]


@dataclass(frozen=True)
class OneMethod(MethodRun):
    """What every command that computes edits takes, but one method."""

    method: Annotated[
        list[str], typer.Option("--method", help="A name of `knowedit methods`, or a record.")
    ] = field(default_factory=lambda: ["memit"])


@app.command()
def edit(
    ctx: typer.Context,
    model: Model,
    facts: Facts,
    output: File,
    limit: Limit = None,
    strict: Strict = False,
    history: Annotated[
        Path | None,
        typer.Option(
            help="Earlier edits of this model, to write after and to spare; grows with every edit."
        ),
    ] = None,
    correct: Annotated[
        bool,
        typer.Option(
            "--correct",
            help="Facts that contradict earlier ones of --history take their place.",
        ),
    ] = False,
    join: Join = None,
    chat: Chat = False,
    allow: Allow = None,
    force: Force = False,
    *,
    run: OneMethod,
) -> None:
    """Compute an edit, measure what the edited model does, and save it; no model is changed. One
    that ruins the model is refused. Without --method, facts that share their subjects are written
    by rose, which is made for such. The file records how it was made: `--config` with it computes
    the same edit again. Under torchrun the processes share the optimisation of the values.
    """
    from knowedit.edits.history import History
    from knowedit.edits.limits import Limits
    from knowedit.evaluation.interview import Interview, said_table
    from knowedit.facts.groups import share_subjects
    from knowedit.facts.wordings.forms import as_asked
    from knowedit.methods.base import statistics_for
    from knowedit.methods.session import Session

    if len(run.method) != 1:
        raise KnowEditError("an edit is made by one method; give --method once")
    chosen = run.methods()[0].with_corpus(one(run.corpus))
    if correct and history is None:
        raise KnowEditError("--correct needs --history, which has the facts to correct")
    limits = Limits().with_settings(allow or [])
    check_file(output)
    with in_ranks() as ranks:
        wanted, again = facts_named(facts, limit, strict), edit_of(ctx)
        source = ctx.get_parameter_source("method")
        if source is not None and source.name == "DEFAULT" and share_subjects(wanted):
            say("note: facts share their subjects, so the method is rose; --method says another")
            chosen = replace(run, method=["rose"]).methods()[0].with_corpus(one(run.corpus))
        editable = run.load(model)
        wanted = as_asked(editable, wanted, join, chat)
        if again is not None:
            again.check(editable)
        with locked(history if ranks.rank == 0 else None):  # or another run's edits would be lost
            with kept_on_interrupt(lambda: f"no edit was written; {STATISTICS}; {GO_ON}"):
                keys = statistics_for(
                    [chosen], editable, one(run.corpus), run.tokens, run.statistics, run.seed or 0
                )
                asked = Interview(editable, wanted)
                if history:
                    known = history.exists()
                    earlier = History.load(history) if known else History(editable.fingerprint)
                    session = Session(chosen, editable, keys, earlier, limits=limits)
                    made = session.write(wanted, correct=correct, force=force)
                    said = asked.hear()
                else:
                    made = chosen.compute(editable, wanted, keys)
                    if not force:
                        limits.check(made.report)
                    with made.applied_to(editable):
                        said = asked.hear()
            made.report.details["run"] = recorded.kept(run_record(model, run), output)
            ranks.first(lambda: made.save(output))
            if history:
                ranks.first(lambda: earlier.save(history))
        to_apply = command_line("apply", model, history or output, *run.words(), "-o", "FOLDER")
        run.show(
            {**_record(made, output), "said": [one.to_dict() for one in said]},
            lambda: "\n".join(
                [
                    *edit_lines(made),
                    f"\n{said_table(said, len(wanted))}\n",
                    *_compared(made, again, run.config),
                    _saved(made, output, to_apply),
                ]
            ),
        )


def run_record(model: str, run: MethodRun) -> dict[str, Any]:
    """What of the command line --config needs to compute the same edit again."""
    given = {
        "model": model,
        "corpus": run.corpus,
        "tokens": run.tokens,
        "statistics": None if run.statistics is None else str(run.statistics),
        "dtype": run.dtype,
        "seed": run.seed,
        "dequantise": run.dequantise or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _compared(made: Edit, again: Edit | None, config: Path | None) -> list[str]:
    """Whether it is the edit of --config again."""
    if again is None:
        return []
    return [f"{'the same bits as' if made.key == again.key else 'not the same bits as'} {config}"]


def _saved(made: Edit, output: Path, to_apply: str) -> str:
    """Where it is, how large, and what to do with it."""
    where = f"saved to {output} ({output.stat().st_size / 1e3:,.0f} kB); apply it"
    if made.changes:
        return f"{where} with: {to_apply}"
    return f"{where} in Python: Edit.load(...).apply(model)"  # a memory edit


def facts_named(name: str, limit: int | None, strict: bool = False) -> list[Fact]:
    """The facts of a set, a file, or an edit."""
    from knowedit.facts.sets import load

    if not (name.endswith(".safetensors") or is_safetensors(Path(name))):
        return load(name, limit, strict=strict)
    from knowedit.edits.edit import Edit

    return Edit.load(name).facts[:limit]


@app.command()
def apply(
    model: Model,
    edits: Annotated[
        list[Path],
        typer.Argument(
            help="Edit files, the history of a sequence, or a session's folder; all are written "
            "together."
        ),
    ],
    output: File,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Copy the model's folder a tensor at a time, without loading the model; weights "
            "keep their dtype.",
        ),
    ] = False,
    force: Force = False,
    *,
    loading: Loading,
) -> None:
    """Write edits into a copy of the model that any transformers user can load; `undo` takes every
    bit back. Of a GGUF file (-o NAME.gguf) into a copy of the file, for llama.cpp.
    """
    from knowedit.edits.export.folder import save_edited
    from knowedit.edits.journal import edits_in
    from knowedit.edits.merge import merge_into
    from knowedit.models.download import folder_of

    check_free(output)
    as_gguf = output.suffix.lower() == ".gguf"
    if as_gguf and (stream or not is_gguf(model)):
        raise KnowEditError(
            f"{output} is to be a GGUF file: give the GGUF file that the edit was computed on as "
            "MODEL, without --stream; or name a folder"
        )
    loaded = _checked([edit for path in edits for edit in edits_in(path)], force)
    if as_gguf:
        _apply_gguf(model, loaded, output, loading)
        return
    if stream:
        if loading.words():
            raise KnowEditError(
                f"--stream loads no model; leave {' '.join(loading.words())} out: weights keep "
                "their dtype"
            )
        merge_into(folder_of(model, say=say), loaded, output)
    else:
        save_edited(loading.load(model), loaded, output)
    loading.show(
        _written(output, loaded[0].fingerprint, loaded),
        lambda: f"wrote {output}; take it back with: {command_line('undo', output)}",
    )


def _apply_gguf(source: str, edits: list[Edit], output: Path, loading: Loading) -> None:
    """Write edits into a copy of a GGUF file, and say in which types."""
    from knowedit.edits.gguf_model import write_gguf

    written = write_gguf(loading.load(source), edits, source, output)
    record = _written(output, edits[0].fingerprint, edits)
    record["tensors"] = [asdict(one) for one in written]
    loading.show(
        record,
        lambda: "\n".join([*map(str, written), f"wrote {output}; {source} is as it was"]),
    )


@app.command()
def undo(
    folder: Annotated[Path, typer.Argument(help="A folder written by `knowedit apply`.")],
    edit: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this one of its edits, by its key or how that begins (`knowedit inspect "
            "FOLDER` lists them); repeatable."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also where the folder was changed since the edit: what was changed of the edited "
            "weights is lost, what was changed beside them stays.",
        ),
    ] = False,
    *,
    output: Output,
) -> None:
    """Restore the original bits of an edited model's folder, and check its fingerprint; or take
    back one edit of several. A folder that was changed since the edit is left as it is.
    """
    from knowedit.edits.export.folder import RECORD, read_record, record_of, restore

    with locked(folder):
        before = read_record(record_of(folder))[0]["fingerprint"] if force else None
        found = restore(folder, edit or (), force=force)
    left = (folder / RECORD).exists()
    whole = not left and before in (None, found)
    done = "every weight is back" if whole else "the edited weights are back, others differ"
    done = f"without {', '.join(edit or ())}" if left else done
    output.show(
        {"folder": str(folder), "fingerprint": found, "original": whole},
        lambda: f"{folder}: {done}; fingerprint {found}",
    )


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="A model's folder, or a hub id.")],
    second: Annotated[
        str, typer.Argument(help="Another one; or edits of the first: a file, or a session.")
    ],
    *,
    output: Output,
) -> None:
    """What differs between two models: which weights, at what rank, by how much, and which facts
    are recorded. Read from the files: no model is loaded.
    """
    from knowedit.edits.diff import diff as compared
    from knowedit.models.download import folder_of

    there = Path(second).exists()
    found = compared(folder_of(first, say=say), second if there else folder_of(second, say=say))
    output.show(found.to_dict(), lambda: "\n".join(map(str, found.tables())))


@app.command()
def export(
    model: Model,
    edits: Annotated[
        Path,
        typer.Argument(help="An edit file, the history of a sequence, or a session's folder."),
    ],
    output: File,
    format: Format = "peft",
    force: Force = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Ask the facts on MODEL as others load it, the edit beside its weights."
        ),
    ] = False,
    *,
    loading: Loading,
) -> None:
    """Write edits in another program's format: a LoRA adapter for peft and vLLM, or one for
    llama.cpp.
    """
    from knowedit.edits.export.listing import export_format
    from knowedit.edits.journal import edits_in
    from knowedit.edits.servers import server_notes
    from knowedit.io.names import spelled

    check_free(output)
    format = spelled(format, formats())
    loaded, write = _checked(edits_in(edits), force), export_format(format)
    editable = loading.load(model)
    write(editable, loaded, output)
    notes = server_notes(editable, loaded) if format == "peft" else []
    record = {"format": format, **_written(output, editable.fingerprint, loaded), "notes": notes}
    lines = [f"wrote {output}", *(f"note: {note}" for note in notes)]
    if check:
        from knowedit.edits.served import on_served
        from knowedit.models.load import as_served

        found = on_served(editable, as_served(editable), loaded)
        record["served"] = found.to_dict()
        lines.append(str(found))
    loading.show(record, lambda: "\n".join(lines))


def _checked(edits: list[Edit], force: bool) -> list[Edit]:
    """`edits`; unless `force` says so, none whose record says that it ruins the model."""
    from knowedit.edits.limits import Limits

    reports = [edit.report for edit in edits]
    for number, report in enumerate([] if force else reports):
        Limits().check(report, reports[:number])
    return edits


def _written(folder: Path, fingerprint: str, edits: list[Edit]) -> dict[str, Any]:
    """What `--json` prints of a folder that was written."""
    keys = [edit.key for edit in edits]
    return {"folder": str(folder), "fingerprint": fingerprint, "edits": keys}


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


#: The figures of a layer's line, for those who read one for the first time.
FIGURES = {
    "gain": "the share of the planned change that arrives",
    "|delta|/|W|": "the change's norm beside the weight's",
    "lambda": "the weight of what must stay, which follows from the wanted gain",
    "beta": "the weight within the null space, which follows from the wanted gain",
    "threshold": "eigenvalues below it are the null space",
    "null_directions": "its dimension",
    "freed": "the share of the layer's output that the neurons taken over were good for",
    "leak": "the most that a switch closes at any other text",
}


def edit_lines(made: Edit) -> list[str]:
    """What an edit did, a line a layer."""
    report = made.report.to_dict()
    lines = [
        f"{made.method_name}: {number_of(len(made.facts), 'fact')}, "
        f"{number_of(len(made.changes), 'weight')} changed"
    ]
    if "trainable" in report:
        lines.append(_trained(report))
    for layer, chosen in report.get("layers", {}).items():
        others = (f"  {k} {v:.4g}" for k, v in chosen.items() if k not in ("gain", "lowest_gain"))
        lines.append(
            f"  layer {layer}: gain {chosen['gain']:.3f}  |delta|/|W| "
            f"{report['relative_norm'][layer]:.3f}{''.join(others)}"
        )
    if layers := report.get("layers", {}):
        shown = {"|delta|/|W|", *(name for chosen in layers.values() for name in chosen)}
        said = (f"{name}: {what}" for name, what in FIGURES.items() if name in shown)
        lines.append(f"  ({'; '.join(said)})")
    if made.report.measured is not None:
        lines.append(f"  {made.report.measured}")
    return [*lines, *(f"  note: {warning}" for warning in made.warnings)]


def _trained(report: dict[str, Any]) -> str:
    memory = report.get("peak_memory_bytes")
    used = "" if memory is None else f", {memory / 2**20:,.0f} MiB of memory"
    return (
        f"  {report['trainable']:,} numbers trained in {report['steps']} steps and "
        f"{report['seconds']:.1f} s{used}; NLL of the answers {report['loss']:.3f}"
    )
