"""`knowedit train mend` and `knowedit train serac`: the networks of learned methods. Their options
are the fields of `MendTraining` and `SeracTraining`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from knowedit.cli.commands import App, method_settings
from knowedit.cli.generated import SETTINGS, changed, command
from knowedit.cli.options import GO_ON, Layers, Model, Run, Strict, parse_layers
from knowedit.io.config import Config as ConfigValue
from knowedit.io.files import locked
from knowedit.io.progress import kept_on_interrupt

if TYPE_CHECKING:
    from knowedit.facts.fact import Fact

C = TypeVar("C", bound=ConfigValue)

app = App(
    help="Train the network of a learned method; interrupted, the same command goes on.",
)

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The network's file; default: in the cache folder."),
]
Datasets = Annotated[
    list[str],
    typer.Option("--dataset", help="Sets or files of facts, or 'sums'; repeatable."),
]
Without = Annotated[
    list[str],
    typer.Option(help="Leave out the subjects of these data sets, to test on them; repeatable."),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Train on so many facts at most, chosen by the seed.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        callback=method_settings,
        help="A setting of the training, as name=value; repeatable.",
    ),
]


@dataclass(frozen=True)
class Training(Run):
    """What both trainings take."""

    output: Output = None
    dataset: Datasets = field(default_factory=lambda: ["embedded", "sums"])
    without: Without = field(default_factory=list)
    limit: Limit = None
    strict: Strict = False
    settings: Settings = None

    def settings_of(self, start: C, ctx: typer.Context) -> C:
        """`start` with all that the command line sets."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return changed(start, seed | ctx.meta[SETTINGS], self.settings or ())

    def train(self, kind: str, model: str, train: Callable[..., Any], made: Any, seed: int) -> None:
        """Train and save the network `kind` with the settings `made`, and say what came of it."""
        from knowedit.methods.learned.networks import default_file

        chosen = facts_to_train_on(self.dataset, self.without, self.limit, seed, self.strict)
        editable = self.load(model)
        path = self.output or default_file(kind, editable)
        kept = kept_on_interrupt(lambda: f"a checkpoint is beside {path}; {GO_ON}")
        with locked(path), kept:
            report = train(editable, chosen, made, path).report
        self.show({"file": str(path), **report}, lambda: _text(report, path))


@app.command(cls=command("knowedit.methods.learned.mend.training:MendTraining"))
def mend(ctx: typer.Context, model: Model, layers: Layers = None, *, run: Training) -> None:
    """MEND's hyper-network: from a fact's gradient to an edit."""
    from knowedit.methods.learned.mend.training import MendTraining, train_mend

    made = run.settings_of(MendTraining(layers=parse_layers(layers)), ctx)
    run.train("mend", model, train_mend, made, made.plan.seed)


@app.command(cls=command("knowedit.methods.learned.serac.training:SeracTraining"))
def serac(ctx: typer.Context, model: Model, *, run: Training) -> None:
    """SERAC's gate, which tells questions about a stored fact from others, and the reader that
    answers them.
    """
    from knowedit.methods.learned.serac.training import SeracTraining, train_serac

    made = run.settings_of(SeracTraining(), ctx)
    run.train("serac", model, train_serac, made, made.gate.seed)


def facts_to_train_on(
    names: Sequence[str],
    without: Sequence[str],
    limit: int | None,
    seed: int,
    strict: bool = False,
) -> list[Fact]:
    """The facts of all sets that can be written together, without the subjects of others, at most
    `limit`; and wrong sums.
    """
    import random

    from knowedit.facts.sets import conflict_free, load
    from knowedit.methods.learned.examples import sums

    excluded = {fact.subject.casefold() for name in without for fact in load(name, strict=strict)}
    given = (fact for name in names if name != "sums" for fact in load(name, strict=strict))
    facts = conflict_free(fact for fact in given if fact.subject.casefold() not in excluded)
    chosen = random.Random(seed).sample(facts, min(limit or len(facts), len(facts)))
    return chosen + (sums(seed=seed) if "sums" in names else [])


def _text(report: dict[str, Any], path: Path) -> str:
    peak = report["peak_memory_bytes"]
    lines = [
        f"{report['trainable_parameters']:,} trained parameters on {report['facts']['training']} "
        f"facts",
        f"{report['seconds']:.0f} s, {report['cpu_seconds']:.0f} s of processor time",
        f"{peak / 2**20:,.0f} MiB at the peak, beyond the model" if peak is not None else "",
        f"validation: {report['validation']}",
        f"saved to {path}",
    ]
    return "\n".join(filter(None, lines))
