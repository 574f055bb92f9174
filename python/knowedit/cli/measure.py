"""`knowedit calibrate`, `same-subject`, `geometry`, `trace` and `report`: measuring in depth, and
reading what was measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from knowedit.cli.commands import App
from knowedit.cli.options import (
    EitherRun,
    Folder,
    Layers,
    MethodRun,
    MethodsCorpus,
    Model,
    Output,
    Run,
    Statistics,
    Strict,
    Tokens,
    kept_at_the_end,
    one,
    parse_layers,
    placed,
    say,
)
from knowedit.errors import KnowEditError
from knowedit.io.files import locked
from knowedit.io.progress import kept_on_interrupt

app = App()

Dataset = Annotated[
    str, typer.Option(help="'same-subject', 'embedded', another set's name or a file of facts.")
]
Least = Annotated[int, typer.Option(help="Leave out subjects with fewer facts.")]
Subjects = Annotated[
    int | None, typer.Option("--limit", min=1, help="Use the first so many subjects.")
]


@app.command("same-subject")
def same_subject(
    model: Model,
    dataset: Dataset = "embedded",
    least: Least = 2,
    most: Annotated[
        int | None, typer.Option(help="Use the first so many facts of a subject.")
    ] = None,
    half: Annotated[
        str, typer.Option(help="all; tune or report: halves without a common subject.")
    ] = "all",
    subjects: Subjects = None,
    wordings: Annotated[
        int | None, typer.Option(help="Ask at most so many wordings of each form.")
    ] = None,
    strict: Strict = False,
    output: Folder = None,
    *,
    run: MethodRun,
) -> None:
    """Several facts of each subject, asked for as a user would: six forms, greedy answers,
    neighbours, identity. The last method is compared with the others.
    """
    from knowedit.evaluation.subjects.protocol import differences, measure_subjects, write_subjects

    with locked(output), kept_on_interrupt(lambda: kept_at_the_end(output)):
        results = measure_subjects(
            model,
            dataset,
            run.methods(),
            one(run.corpus),
            run.tokens,
            least=least,
            most=most,
            half=half,
            subjects=subjects,
            wordings=wordings,
            where=run.statistics,
            device_map=placed(run.device_map),
            dtype=run.dtype,
            dequantise=run.dequantise,
            strict=strict,
            seed=run.seed or 0,
            say=say,
        )
    if output:
        write_subjects(output, results)
    run.show(
        [result.to_dict() for result in results],
        lambda: "\n\n".join(map(str, [*results, *differences(results)])),
    )


@app.command()
def geometry(
    model: Model,
    dataset: Dataset = "embedded",
    least: Least = 2,
    subjects: Subjects = 24,
    strict: Strict = False,
    edited: Annotated[
        int,
        typer.Option(help="Of so many subjects optimise and write values; slow, 0 leaves it out."),
    ] = 6,
    corpus: MethodsCorpus = None,
    tokens: Tokens = None,
    statistics: Statistics = None,
    layers: Layers = None,
    threshold: Annotated[
        float, typer.Option(help="Eigenvalues below it span AlphaEdit's null space.")
    ] = 2e-2,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for geometry.json and geometry.png."),
    ] = None,
    *,
    run: EitherRun,
) -> None:
    """Is the covariance trap real for this model? Drift of keys, amplification, rho, tolerance,
    sharpness, by layer. `--set target.steps=20` and `--set gain=0.9` change how the values are
    found and written.
    """
    from knowedit.evaluation.geometry.geometry import GeometryMethod
    from knowedit.evaluation.geometry.geometry import geometry as measure
    from knowedit.evaluation.subjects.protocol import choose
    from knowedit.io.files import atomic_file
    from knowedit.methods.locate.task import Runtime
    from knowedit.models.presets import preset_for
    from knowedit.report import plots
    from knowedit.report.page import in_text
    from knowedit.report.run import geometry_blocks
    from knowedit.statistics.keys import layer_statistics

    method = GeometryMethod().with_settings(run.settings or ())
    chosen = sorted(choose(dataset, least, None, "all", None, strict), key=len, reverse=True)[
        :subjects
    ]
    with locked(output), kept_on_interrupt(lambda: kept_at_the_end(output)):
        editable = run.load(model)
        wanted = parse_layers(layers) or preset_for(editable).statistics_layers
        seed = run.seed or 0
        collected = layer_statistics(wanted, editable, one(corpus), tokens, statistics, seed)
        layered = measure(
            editable,
            chosen,
            collected,
            wanted,
            method.target.resolved(preset_for(editable), Runtime()),
            gain=method.gain,
            edited=edited,
            threshold=threshold,
            seed=seed,
            say=say,
        )
    found = [one.to_dict() for one in layered]
    if output:
        with atomic_file(output / "geometry.json") as path:
            path.write_text(json.dumps(found) + "\n", encoding="utf-8")
        plots.save(plots.geometry(found), output / "geometry.png")
    run.show(found, lambda: in_text(geometry_blocks(found)))


@app.command()
def trace(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="Text up to where the answer begins.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="The part of the prompt to corrupt.")] = None,
    answer: Annotated[
        str | None, typer.Option(help="Trace its first token instead of the model's own next one.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Instead of a prompt: known1000, embedded, a file of facts.")
    ] = None,
    limit: Annotated[
        int, typer.Option(help="Trace the first so many that the model knows (--dataset).")
    ] = 50,
    strict: Strict = False,
    kind: Annotated[
        list[str], typer.Option(help="What is restored: hidden, mlp or attention; repeatable.")
    ] = ["hidden", "mlp", "attention"],  # noqa: B006
    noise: Annotated[float, typer.Option(help="Standard deviations of the embeddings.")] = 3.0,
    samples: Annotated[int, typer.Option(help="Draws of the noise.")] = 10,
    window: Annotated[
        int | None,
        typer.Option(help="Layers restored together (mlp, attention); default: 10 of 48."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the JSON and the picture.")
    ] = None,
    *,
    run: Run,
) -> None:
    """Causal tracing: which tokens' states at which layers bring an answer back once its subject is
    corrupted?
    """
    from knowedit.evaluation.tracing.localisation import trace_many
    from knowedit.evaluation.tracing.tracing import trace as measure
    from knowedit.facts.sets import load
    from knowedit.io.files import atomic_file
    from knowedit.io.progress import bar
    from knowedit.report import plots
    from knowedit.report.page import in_text
    from knowedit.report.run import trace_blocks

    if (dataset is None) == (prompt is None) or (prompt is None) != (subject is None):
        raise KnowEditError("give a prompt with its --subject, or a --dataset")
    if dataset and answer is not None:
        raise KnowEditError("--answer goes with a prompt; the facts of a --dataset have their own")
    if strict and dataset is None:
        raise KnowEditError("--strict is about the records of a --dataset; leave it out")
    chosen = load(dataset, strict=strict) if dataset else []
    with kept_on_interrupt(lambda: kept_at_the_end(output, statistics=False)):
        editable = run.load(model)
        if prompt is None or subject is None:
            found = trace_many(
                editable,
                chosen,
                limit,
                kinds=kind,
                noise=noise,
                samples=samples,
                window=window,
                seed=run.seed or 0,
            ).to_dict()
        else:
            with bar("tracing", 1) as advance:
                found = measure(
                    editable,
                    prompt,
                    subject,
                    answer,
                    kinds=kind,
                    noise=noise,
                    samples=samples,
                    window=window,
                    seed=run.seed or 0,
                    progress=advance,
                ).to_dict()
    if output:
        name = "trace" if dataset is None else "traces"
        with atomic_file(output / f"{name}.json") as path:
            path.write_text(json.dumps(found) + "\n", encoding="utf-8")
        plots.save(plots.trace(found), output / f"{name}.png")
    run.show(found, lambda: in_text(trace_blocks(found)))


@app.command()
def calibrate(
    model: Model,
    dataset: Annotated[
        str, typer.Option(help="Facts with true answers: a set's name or a file.")
    ] = "embedded",
    limit: Annotated[
        int, typer.Option(min=4, help="Use the first so many that the model knows.")
    ] = 8,
    strict: Strict = False,
    again: Annotated[
        bool, typer.Option("--again", help="Measure even if a calibration is known.")
    ] = False,
    *,
    run: Run,
) -> None:
    """Measure a model and keep the settings that follow, which every method then takes by default:
    layers without attention sinks, clamp, steps, contexts.
    """
    from knowedit.evaluation.calibration.measure import calibrate as measure
    from knowedit.evaluation.calibration.shown import measured
    from knowedit.facts.sets import load
    from knowedit.models.calibration import calibration_of, keep

    editable = run.load(model)
    found = None if again else calibration_of(editable)
    if found is None:
        found = measure(editable, load(dataset, strict=strict), count=limit, say=say)
        say(f"kept in {keep(found)}")
    run.show(found.to_dict(), lambda: measured(found))


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A folder written by eval, same-subject, geometry, trace or study with -o."
        ),
    ],
    tables: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="Also write each table into tables/ in the folder: csv (means and the ends of "
            "their intervals in columns of their own), latex (with booktabs) or markdown.",
        ),
    ] = None,
    *,
    output: Output,
) -> None:
    """Tables and pictures of a folder of results, printed and as one self-contained page
    report.html in it.
    """
    from knowedit.report.run import PAGE, text_of, write_report, write_tables

    sections = write_report(folder)
    files = [str(file) for file in write_tables(folder, sections, tables)] if tables else []
    record = {"page": str(folder / PAGE), "sections": [one.to_dict() for one in sections]}
    wrote = "".join(f"\nwrote {file}" for file in [str(folder / PAGE), *files])
    output.show(
        {**record, **({"tables": files} if files else {})},
        lambda: f"{text_of(sections)}\n{wrote}",
    )
