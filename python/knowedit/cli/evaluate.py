"""`knowedit eval`: measuring methods, and grids of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowedit.cli.commands import SWEEP, App
from knowedit.cli.options import (
    Chat,
    Folder,
    Join,
    Limit,
    MethodRun,
    Strict,
    in_ranks,
    json_text,
    kept_at_the_end,
    kept_so_far,
    one,
    placed,
    say,
)
from knowedit.errors import KnowEditError
from knowedit.io.files import locked
from knowedit.io.lines import printable
from knowedit.io.progress import kept_on_interrupt

if TYPE_CHECKING:
    from knowedit.evaluation.protocols import Result
    from knowedit.io.ranks import Ranks

app = App()


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A hub id or a folder; a grid may name its own.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A name of `knowedit datasets` or a file of facts.",
            show_default="embedded; with --edit or --against the facts that were written",
        ),
    ] = None,
    edits: Annotated[
        list[Path] | None,
        typer.Option(
            "--edit",
            help="Measure this saved edit, history or session's folder instead of computing one; "
            "repeatable: all together.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compute nothing: measure MODEL, an edited copy, beside this model, of which it "
            "was made."
        ),
    ] = None,
    limit: Limit = None,
    strict: Strict = False,
    protocol: Annotated[
        str, typer.Option(help="batch: all facts at once; single: each alone; sequential.")
    ] = "batch",
    batch: Annotated[int, typer.Option(min=1, help="Facts an edit (sequential).")] = 50,
    every: Annotated[
        int, typer.Option(min=1, help="Facts between two measurements (sequential).")
    ] = 100,
    text: Annotated[
        str | None, typer.Option(help="Held-out text for the perplexity, as --corpus.")
    ] = None,
    generate: Annotated[
        int,
        typer.Option(
            min=0,
            help="Let the edited model write about the first so many facts: the object in greedy "
            "answers, fluency, consistency.",
        ),
    ] = 0,
    references: Annotated[
        Path | None,
        typer.Option(help='Texts for the consistency of what it writes, as {"object": ["text"]}.'),
    ] = None,
    definition: Annotated[
        str,
        typer.Option(
            help="memit: which of two answers is likelier; easyedit: also its accuracy, the share "
            "of right tokens."
        ),
    ] = "memit",
    ability: Annotated[
        list[str] | None,
        typer.Option(
            help="General ability before and after: all bundled tasks (all), one of them "
            "(knowledge, cloze, reading, sentiment), or lm-eval:NAME where lm-eval is installed; "
            "repeatable."
        ),
    ] = None,
    ability_items: Annotated[
        int | None, typer.Option(min=1, help="At most so many items of each such task.")
    ] = None,
    at_least: Annotated[
        list[str] | None,
        typer.Option(
            help="End with exit code 1 where a figure after the edit is lower, as in "
            "neighbourhood.unchanged=0.95; repeatable."
        ),
    ] = None,
    at_most: Annotated[
        list[str] | None,
        typer.Option(help="The same where one is higher, as in drift.kl=0.01; repeatable."),
    ] = None,
    join: Join = None,
    chat: Chat = False,
    output: Folder = None,
    *,
    run: MethodRun,
) -> None:
    """Measure methods: efficacy, paraphrase, neighbourhood, drift on ordinary text; with 95 %
    intervals. With -o, results are written as they come, and the same command goes on where it
    stopped. With a grid in --config (`methods:` and `grid:`), every combination, as one table.
    With --edit or --against nothing is computed: what is there is measured. Under torchrun
    (`torchrun --nproc-per-node 2 -m knowedit eval ...`) the processes share the work.
    """
    if edits or against is not None:
        _refuse(ctx, COMPUTING, "computes an edit, and --edit and --against measure what is there")
    from knowedit.evaluation.requirements import Requirement, check_names, check_requirements

    wanted = [
        *(Requirement.parse(text, at_least=True) for text in at_least or ()),
        *(Requirement.parse(text, at_least=False) for text in at_most or ()),
    ]
    check_names(wanted)
    if SWEEP in ctx.meta:
        with in_ranks() as ranks:
            measured_rows, failed = _sweep(ctx, output, run, ranks)
            check_requirements(measured_rows, wanted, failed)
        return
    if model is None:
        raise KnowEditError("name a model: knowedit eval MODEL")
    from knowedit.evaluation.baseline import Scope
    from knowedit.evaluation.generation import read_references
    from knowedit.evaluation.protocols import measure
    from knowedit.evaluation.saved import measure_saved
    from knowedit.report.run import comparison

    if references is not None and not generate:
        raise KnowEditError("--references are for what the model writes; give --generate N")
    scope = Scope(
        text,
        run.seed or 0,
        generate,
        None if references is None else read_references(references),
        definition,
        ability or (),
        ability_items,
    )
    with in_ranks() as ranks, locked(output if ranks.rank == 0 else None):
        measured = {
            "device_map": placed(run.device_map),
            "scope": scope,
            "folder": output,
            "join": join,
            "chat": chat,
            "strict": strict,
            "dequantise": run.dequantise,
            "say": say,
        }
        if edits or against is not None:
            with kept_on_interrupt(lambda: kept_at_the_end(output, statistics=False)):
                told = measure_saved(
                    model, edits or (), against, dataset, limit, run.dtype, **measured
                )
            run.show([_record(told)], lambda: _shown(told))
            check_requirements([_record(told)], wanted)
            return
        found: list[dict[str, Any]] = []
        methods = run.methods()
        with kept_on_interrupt(lambda: kept_so_far(output, len(found), "method")):
            for result in measure(
                model,
                dataset or "embedded",
                methods,
                limit,
                protocol,
                one(run.corpus),
                run.tokens,
                run.dtype,
                batch=batch,
                every=every,
                where=run.statistics,
                **measured,
            ):
                found.append(_record(result))
                text = _shown(result, output)
                again = isinstance(result, dict) and len(methods) > 1  # it has been printed before
                if not run.as_json and not again:
                    print(printable(text), end="\n\n", flush=True)
        if run.as_json:
            print(json_text(found))
        elif len(found) > 1:
            print(printable(comparison(found)))
        check_requirements(found, wanted)


def _record(result: dict[str, Any] | Result) -> dict[str, Any]:
    """As --json has it."""
    return result if isinstance(result, dict) else result.to_dict()


def _shown(result: dict[str, Any] | Result, folder: Path | None = None) -> str:
    """A result that was measured now, or the record of one that the folder had. Raises
    KnowEditError for a record that is damaged.
    """
    from knowedit.evaluation.protocols import RESULTS
    from knowedit.evaluation.requirements import figures
    from knowedit.io.tensors import understood
    from knowedit.report.run import result_text

    if not isinstance(result, dict):
        return str(result)
    if folder is None:
        return result_text(result)
    with understood(folder / RESULTS, "results", KnowEditError, "choose another folder"):
        figures(result)
        return result_text(result)


#: Options of what computes edits.
COMPUTING = (
    *("method", "settings", "config", "layers", "protocol", "batch", "every"),
    *("corpus", "tokens", "statistics"),
)
#: Options that a grid takes from the command line, by the name of its field.
GRID_OPTIONS = (
    *("model", "dataset", "limit", "strict", "protocol", "batch", "every", "text"),
    *("ability", "ability_items"),
    *("tokens", "statistics", "seed", "dtype", "dequantise"),
)


def _sweep(
    ctx: typer.Context, output: Path | None, run: MethodRun, ranks: Ranks
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run the grid of --config, and return its rows' results, and what failed; options on the
    command line win over the file's.
    """
    from knowedit.evaluation.sweep import (
        failures,
        read_sweep,
        results,
        rows_kept,
        run_sweep,
        table,
    )

    given: dict[str, Any] = {
        name: ctx.params[name]
        for name in GRID_OPTIONS
        if _given(ctx, name) and ctx.params[name] is not None
    }
    apart = ("method", "settings", "layers", "device_map", "join", "chat")
    _refuse(ctx, apart, f"does not go with a grid; write it into {ctx.meta[SWEEP]}")
    if _given(ctx, "corpus"):
        given["corpus"] = one(ctx.params["corpus"])
    sweep = read_sweep(ctx.meta[SWEEP]).with_settings(given)
    kept = kept_on_interrupt(lambda: kept_so_far(output, rows_kept(output), "row"))
    with locked(output if ranks.rank == 0 else None), kept:
        record = run_sweep(sweep, output, say=say)
    run.show(record, lambda: table(record))
    return results(record), failures(record)


def _refuse(ctx: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise KnowEditError where one of these options is on the command line."""
    spelled = {param.name: param.opts[0] for param in ctx.command.get_params(ctx)}
    for name in names:
        if _given(ctx, name):
            raise KnowEditError(f"{spelled[name]} {why}")


def _given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
