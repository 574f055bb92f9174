"""The main job on one screen: six facts into a real language model, what moved, and every bit
back.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from knowedit.edits.edit import Edit
from knowedit.evaluation import drift, evaluate
from knowedit.evaluation.evaluation import Evaluation
from knowedit.facts import sets as datasets
from knowedit.facts.fact import Fact
from knowedit.methods import MEMIT
from knowedit.models.download import DEFAULT_MODEL
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.models.load import load_model
from knowedit.statistics import key_statistics

WORDS = 6  # new tokens shown


def run(
    name: str = DEFAULT_MODEL,
    corpus: Any = "self",
    tokens: int = 16_384,
    output: Path | None = None,
) -> None:
    """Run the demo and print it; `output` names a folder for the same as an HTML page."""
    began = time.perf_counter()
    console = Console()
    say = console.print
    model = load_model(name, say=say)
    say(
        f"[bold]{model.name}[/]: {len(model.layers)} layers, {model.d_ff} keys a layer, "
        f"{str(model.dtype)[6:]}"
    )
    facts = datasets.load("demo")
    statistics = key_statistics(model, corpus=corpus, tokens=tokens)
    say(
        f"key statistics of layers {statistics.layers}: {tokens:,} tokens of {corpus!r}, "
        f"{_since(began)}"
    )
    before = continuations(model, facts)
    edit = MEMIT().compute(model, facts, statistics)
    fingerprint = weights_fingerprint(model.hf)
    measured = evaluate(model, edit, facts)
    moved = drift(model, edit)
    edit.apply(model)
    after = continuations(model, facts)
    edited = weights_fingerprint(model.hf)
    edit.undo(model)
    restored = weights_fingerprint(model.hf)
    console.print(table(facts, before, after, measured))
    console.print(summary(edit, measured, moved))
    if edited == fingerprint or restored != fingerprint:
        raise SystemExit("the undo did not restore the model's bits: please report this")
    say(
        f"undone: all weight bits are back (fingerprint {fingerprint[:12]} -> {edited[:12]} -> "
        f"{restored[:12]})"
    )
    say(f"done in {_since(began)}")
    if output is not None:
        from knowedit.report.page import write_page

        shown = [
            (record, role, prompt)
            for record, fact in enumerate(facts)
            for role, prompt in shown_prompts(fact)
        ]
        write_page(Path(output) / "demo.html", model, edit, measured, moved, shown, before, after)
        say(f"wrote {Path(output) / 'demo.html'}")


def shown_prompts(fact: Fact) -> list[tuple[str, str]]:
    """The edit prompt, one paraphrase and one neighbour of a fact, with the role of each."""
    rows = [("edited", fact.text)]
    rows += [("paraphrase", p) for p in fact.paraphrases[:1]]
    return rows + [("neighbour", p.prompt) for p in fact.neighbours[:1]]


def continuations(model: EditableModel, facts: list[Fact]) -> dict[str, str]:
    """What the model says to every shown prompt."""
    prompts = list(dict.fromkeys(p for fact in facts for _, p in shown_prompts(fact)))
    return dict(zip(prompts, (" ".join(text.split()) for text in model.generate(prompts, WORDS))))


def table(
    facts: list[Fact], before: dict[str, str], after: dict[str, str], measured: Evaluation
) -> Table:
    """Before and after, one row a prompt: the model's own words and the probabilities of both
    answers.
    """
    rated = {(row["record"], row["prompt"]): row for row in measured.rows()}
    view = Table(
        box=None,
        pad_edge=False,
        title="what the model says",
        title_justify="left",
        header_style="bold",
    )
    for column in ("", "prompt", "before", "after", "p(new)", "p(old)"):
        view.add_column(column, overflow="fold")
    for record, fact in enumerate(facts):
        for role, prompt in shown_prompts(fact):
            row = rated[record, prompt]
            new, old = ("wrong", "right") if role == "neighbour" else ("right", "wrong")
            colour = (
                "green"
                if (role == "neighbour")
                == (before[prompt].split()[:1] == after[prompt].split()[:1])
                else "red"
            )
            view.add_row(
                role,
                prompt,
                before[prompt],
                f"[{colour}]{after[prompt]}[/]",
                f"{row[f'p_{new}_before']:.2f} -> {row[f'p_{new}_after']:.2f}",
                f"{row[f'p_{old}_before']:.2f} -> {row[f'p_{old}_after']:.2f}",
                end_section=role == "neighbour",
            )
    return view


def summary(edit: Edit, measured: Evaluation, moved: Any) -> Table:
    """The measures before and after, and what moved elsewhere."""
    view = Table(
        box=None, pad_edge=False, title="measured", title_justify="left", header_style="bold"
    )
    for column in ("", "before", "after"):
        view.add_column(column)
    names = {
        "efficacy": "prefers the new fact",
        "paraphrase": "... in other words",
        "neighbourhood": "neighbours still right",
    }
    for kind, label in names.items():
        was, now = measured.before[kind]["success"], measured.after[kind]["success"]
        view.add_row(label, f"{was.mean:.0%}", f"{now.mean:.0%}  [{now.low:.0%}, {now.high:.0%}]")
    view.add_row(
        "says exactly the new fact",
        f"{measured.before['efficacy']['exact'].mean:.0%}",
        f"{measured.after['efficacy']['exact'].mean:.0%}",
    )
    view.add_row(
        f"ordinary text ({moved.prompts} prompts)",
        "",
        f"same next word {moved.same:.0%}, KL {moved.kl:.4f} nats",
    )
    for layer, norm in edit.report.relative_norm.items():
        chosen = edit.report.layers[layer]
        view.add_row(
            f"layer {layer}",
            "",
            f"|delta|/|W| {norm:.3f}, gain {chosen['gain']:.3f}, lambda {chosen['lambda']:.3g}",
        )
    for warning in edit.warnings:
        view.add_row("note", "", warning)
    return view


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:.0f} s"
