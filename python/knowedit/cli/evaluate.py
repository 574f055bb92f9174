"""`knowedit eval`: measuring methods, and grids of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from knowedit.cli.options import (
    SWEEP,
    App,
    Config,
    DeviceMap,
    Dtype,
    Folder,
    Json,
    Layers,
    Limit,
    Methods,
    MethodsCorpus,
    Quiet,
    Seed,
    Settings,
    Statistics,
    Tokens,
    one,
    parse_methods,
    placed,
    say,
)
from knowedit.errors import KnowEditError

app = App()


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A hub id or a folder; a grid may name its own.")
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="A name of `knowedit datasets` or a file of facts.")
    ] = "embedded",
    method: Methods = ["memit"],  # noqa: B006
    settings: Settings = None,
    config: Config = None,
    limit: Limit = None,
    protocol: Annotated[
        str, typer.Option(help="batch: all facts at once; single: each alone; sequential.")
    ] = "batch",
    batch: Annotated[int, typer.Option(help="Facts an edit (sequential).")] = 50,
    every: Annotated[int, typer.Option(help="Facts between two measurements (sequential).")] = 100,
    text: Annotated[
        str | None, typer.Option(help="Held-out text for the perplexity, as --corpus.")
    ] = None,
    corpus: MethodsCorpus = None,
    tokens: Tokens = None,
    statistics: Statistics = None,
    layers: Layers = None,
    seed: Seed = None,
    output: Folder = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure methods: efficacy, paraphrase, neighbourhood, drift on ordinary text; with 95 %
    intervals. With a grid in --config (`methods:` and `grid:`), every combination, as one table.
    """
    if SWEEP in ctx.meta:
        _sweep(ctx, output, as_json)
        return
    if model is None:
        raise KnowEditError("name a model: knowedit eval MODEL")
    from knowedit.evaluation.protocols import measure, write_run

    results = measure(
        model,
        dataset,
        parse_methods(method, settings, layers, seed),
        limit,
        protocol,
        one(corpus),
        tokens,
        dtype,
        device_map=placed(device_map),
        batch=batch,
        every=every,
        text=text,
        where=statistics,
        seed=seed or 0,
        say=say,
    )
    if output:
        write_run(output, results)
    if as_json:
        print(json.dumps([result.to_dict() for result in results]))
    else:
        print("\n\n".join(map(str, results)))


#: Options that a grid takes from the command line, by the name of its field.
GRID_OPTIONS = "model dataset limit protocol batch every text tokens statistics seed dtype".split()


def _sweep(ctx: typer.Context, output: Path | None, as_json: bool) -> None:
    """Run the grid of --config; options on the command line win over the file's."""
    from knowedit.evaluation.sweep import read_sweep, run_sweep, table

    given: dict[str, Any] = {
        name: ctx.params[name]
        for name in GRID_OPTIONS
        if _given(ctx, name) and ctx.params[name] is not None
    }
    for name in ("method", "settings", "layers", "device_map"):
        if _given(ctx, name):
            raise KnowEditError(
                f"--{'set' if name == 'settings' else name.replace('_', '-')} does not go with a "
                f"grid; write it into {ctx.meta[SWEEP]}"
            )
    if _given(ctx, "corpus"):
        given["corpus"] = one(ctx.params["corpus"])
    record = run_sweep(read_sweep(ctx.meta[SWEEP]).with_settings(given), output, say=say)
    print(json.dumps(record) if as_json else table(record))


def _given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
