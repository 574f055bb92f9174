"""`knowedit recommend`: the plausible methods on one's own facts, one table, one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knowedit.cli.commands import App
from knowedit.cli.options import (
    Corpus,
    EitherRun,
    Model,
    Strict,
    kept_so_far,
    one,
    parse_methods,
    say,
)
from knowedit.io.files import locked
from knowedit.io.lines import number_of
from knowedit.io.progress import kept_on_interrupt

app = App()


@app.command()
def recommend(
    model: Model,
    facts: Annotated[
        Path,
        typer.Argument(help="A .jsonl/.json/.csv(.gz) file of facts, or a set's name."),
    ],
    limit: Annotated[int, typer.Option(min=1, help="Use the first so many.")] = 20,
    strict: Strict = False,
    minutes: Annotated[
        float,
        typer.Option(
            min=0, help="Start no method that is unlikely to be done by then; the first always is."
        ),
    ] = 15.0,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Compare these instead of what is plausible; repeatable."),
    ] = None,
    corpus: Corpus = ["self"],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Keys to sum for the statistics.")] = 16_384,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the results, read by `knowedit report`."),
    ] = None,
    *,
    run: EitherRun,
) -> None:
    """Which method for my facts? Measure the plausible ones on them, a line each, and say which to
    take. With -o, results are written as they come, and the same command goes on where it stopped.
    """
    from knowedit.evaluation.protocols import count_results
    from knowedit.evaluation.recommendation import plausible
    from knowedit.evaluation.recommendation import recommend as measure
    from knowedit.facts.sets import conflict_free, load
    from knowedit.methods.base import statistics_for

    chosen = conflict_free(load(str(facts), strict=strict))[:limit]
    names = method or plausible(chosen)
    made = [
        found.with_corpus(one(corpus))
        for found in parse_methods(names, run.settings, seed=run.seed)
    ]
    say(
        f"comparing {', '.join(found.name for found in made)} on "
        f"{number_of(len(chosen), 'fact')}; after {minutes:g} minutes no other is started"
    )
    kept = kept_on_interrupt(lambda: kept_so_far(output, count_results(output), "method"))
    with locked(output), kept:
        editable = run.load(model)
        seed = run.seed or 0
        statistics = statistics_for(made, editable, one(corpus), tokens, seed=seed)
        found = measure(
            editable,
            chosen,
            made,
            statistics,
            str(facts),
            minutes=minutes,
            seed=seed,
            folder=output,
            named=model,
            asked={
                "limit": limit,
                "strict": strict,
                "corpus": corpus,
                "tokens": tokens,
                "dtype": run.dtype,
                "dequantise": run.dequantise,
            },
            say=say,
        )
    run.show(found.to_dict(), lambda: found)
