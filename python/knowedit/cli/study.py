"""`knowedit study arithmetic`: "2+2=5", and nothing else?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knowedit.cli.commands import App
from knowedit.cli.options import Corpus, Dtype, EitherRun, Tokens, kept_so_far, one, say
from knowedit.errors import KnowEditError
from knowedit.io.files import locked
from knowedit.io.progress import kept_on_interrupt
from knowedit.models.download import DEFAULT_MODEL

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel
    from knowedit.studies.arithmetic import Sum

Targets = Annotated[list[str], typer.Option("--target", help="What to write; repeatable.")]

FIRST_HALVING = 42  # its seed, unless --seed says another


@dataclass(frozen=True)
class StudyRun(EitherRun):
    """As every command; sums in float32, of a seed of their own."""

    dtype: Dtype = "float32"
    seed: Annotated[
        int | None, typer.Option(help="Of the first halving.", show_default=str(FIRST_HALVING))
    ] = None


app = App(help="Studies: a question, every method, an answer.")


@app.callback()
def _group() -> None:
    """Keep `arithmetic` a command of its own while it is the only one."""


@app.command()
def arithmetic(
    model: Annotated[str, typer.Argument(help="A hub id or a folder.")] = DEFAULT_MODEL,
    method: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default: all of the study's.")
    ] = None,
    target: Targets = ["2+2=5"],  # noqa: B006
    halvings: Annotated[
        int, typer.Option(help="Random halvings of the prompts; the first has seed --seed.")
    ] = 3,
    interference: Annotated[
        bool, typer.Option(help="With several targets: also each alone, and these added up.")
    ] = True,
    unrelated: Annotated[
        str | None,
        typer.Option(help="Data set of the unrelated prompts; default: KnowEdit's, else ours."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Use the first so many unrelated prompts.")] = 100,
    lead: Annotated[
        str,
        typer.Option(
            help="Ask every sum behind this text, e.g. 'Sum: ', of models that do not read the "
            "first token of a text.",
            show_default="nothing",
        ),
    ] = "",
    paraphrases: Annotated[
        int | None, typer.Option(help="Ask an endpoint for so many; default: the shipped twenty.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server, e.g. http://localhost:8000/v1.")
    ] = None,
    paraphrase_model: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
    key_variable: Annotated[
        str, typer.Option(help="Environment variable with its key.")
    ] = "OPENAI_API_KEY",
    timeout: Annotated[float, typer.Option(help="Seconds a request to it.")] = 120.0,
    corpus: Corpus = ["self"],  # noqa: B006
    tokens: Tokens = 32_768,
    tracing: Annotated[bool, typer.Option(help="Also trace where the first sum is stored.")] = True,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for results; goes on where it stopped."),
    ] = None,
    *,
    run: StudyRun,
) -> None:
    """Can the model be made to say "2+2=5", and nothing else? Every method, judged on prompts that
    none was given. `--set` changes a setting of every method that is run.
    """
    from knowedit.statistics import key_statistics
    from knowedit.studies.arithmetic import Study, Sum
    from knowedit.studies.arithmetic import run as run_study
    from knowedit.studies.arithmetic.experiments import check_settings, default_experiments
    from knowedit.studies.arithmetic.prompts import unrelated_prompts
    from knowedit.studies.arithmetic.runs import runs_kept
    from knowedit.studies.arithmetic.summary import summary

    if halvings < 1 or limit < 2:
        raise KnowEditError(
            f"--halvings must be at least 1 and --limit at least 2, got {halvings} and {limit}"
        )
    methods, settings = method or default_experiments(), run.settings or []
    check_settings(methods, settings)
    edited = [Sum.parse(text) for text in target]
    own, source = _paraphrases(
        edited, paraphrases, endpoint, paraphrase_model, key_variable, timeout
    )
    others = unrelated_prompts(limit, unrelated)
    kept = kept_on_interrupt(lambda: kept_so_far(output, runs_kept(output), "run"))
    with locked(output), kept:
        editable = run.load(model)
        seed = FIRST_HALVING if run.seed is None else run.seed
        seeds = [seed + n for n in range(halvings)]
        study = Study(editable, edited, seeds, others, own, source, one(corpus), settings, lead)
        for note in study.notes():
            say(f"note: {note}")
        found = run_study(
            study,
            methods,
            partial(key_statistics, editable, corpus=one(corpus), tokens=tokens),
            output,
            interference=interference,
            say=say,
        )
        if output and tracing:
            _trace(editable, edited[0], lead, output)
    run.show(found, lambda: summary(found))


def _paraphrases(
    edited: Sequence[Sum],
    count: int | None,
    url: str | None,
    name: str | None,
    key_variable: str,
    timeout: float,
) -> tuple[dict[str, list[str]] | None, str]:
    """From the endpoint, by target, and where they come from; None for the shipped ones."""
    from knowedit.facts.wordings.paraphrase import Endpoint, paraphrases
    from knowedit.studies.arithmetic.prompts import WORDS

    if count is None and url is None and name is None:
        return None, "shipped, hand-written"
    if url is None or name is None:
        raise KnowEditError(
            "--paraphrases needs --endpoint and --paraphrase-model; leave all out for the "
            "shipped ones"
        )
    server, own = Endpoint(url, name, key_variable, timeout), {}
    for target in edited:
        numbers = {target.target, target.true} - {target.a, target.b}
        given = [word for n in numbers for word in (str(n), *WORDS[n : n + 1])]

        def refuse(text: str, target: Sum = target) -> str | None:
            return None if target.find(text) else f"does not name {target.a} and {target.b}"

        own[str(target)] = paraphrases(target.prompt, count or 20, server, given, refuse)
    return own, f"{name} at {server.shown}"


def _trace(model: EditableModel, edited: Sum, lead: str, folder: Path) -> None:
    """Where the sum is stored, as `trace.json` and a picture."""
    from knowedit.evaluation.tracing.tracing import trace
    from knowedit.io.files import atomic_file
    from knowedit.report import plots

    # the true answer, which hangs on the operands more than what a small model says
    # (docs/tracing.md)
    try:
        prompt = f"{lead}{edited.prompt}"
        found = trace(model, prompt, edited.subject, str(edited.true)).to_dict()
    except KnowEditError as error:
        say(f"note: {edited.prompt} is not traced: {error}")
        return
    with atomic_file(folder / "trace.json") as path:
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    plots.save(plots.trace(found), folder / "trace.png")
