"""`knowedit train mend` and `knowedit train serac`: the networks of learned methods. Their options
are the fields of `MendTraining` and `SeracTraining`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowedit.cli.generated import SETTINGS, changed, command
from knowedit.cli.options import (
    App,
    Config,
    DeviceMap,
    Dtype,
    Json,
    Layers,
    Model,
    Quiet,
    parse_layers,
    placed,
    say,
)

if TYPE_CHECKING:
    from knowedit.facts.fact import Fact

app = App(
    no_args_is_help=True,
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
    typer.Option("--set", help="A setting of the training, as name=value; repeatable."),
]


@app.command(cls=command("knowedit.methods.learned.mend.training:MendTraining"))
def mend(
    ctx: typer.Context,
    model: Model,
    output: Output = None,
    dataset: Datasets = ["embedded", "sums"],  # noqa: B006
    without: Without = [],  # noqa: B006
    limit: Limit = None,
    layers: Layers = None,
    settings: Settings = None,
    config: Config = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """MEND's hyper-network: from a fact's gradient to an edit."""
    from knowedit.methods.learned.mend.training import MendTraining, train_mend
    from knowedit.methods.learned.networks import default_file
    from knowedit.models.load import load_model

    start = MendTraining(layers=parse_layers(layers))
    training = changed(start, ctx.meta[SETTINGS], settings or [])
    chosen = facts_to_train_on(dataset, without, limit, training.plan.seed)
    editable = load_model(model, dtype=dtype, device_map=placed(device_map), say=say)
    path = output or default_file("mend", editable)
    _print(train_mend(editable, chosen, training, path).report, path, as_json)


@app.command(cls=command("knowedit.methods.learned.serac.training:SeracTraining"))
def serac(
    ctx: typer.Context,
    model: Model,
    output: Output = None,
    dataset: Datasets = ["embedded", "sums"],  # noqa: B006
    without: Without = [],  # noqa: B006
    limit: Limit = None,
    settings: Settings = None,
    config: Config = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """SERAC's gate, which tells questions about a stored fact from others, and the reader that
    answers them.
    """
    from knowedit.methods.learned.networks import default_file
    from knowedit.methods.learned.serac.training import SeracTraining, train_serac
    from knowedit.models.load import load_model

    training = changed(SeracTraining(), ctx.meta[SETTINGS], settings or [])
    chosen = facts_to_train_on(dataset, without, limit, training.gate.seed)
    editable = load_model(model, dtype=dtype, device_map=placed(device_map), say=say)
    path = output or default_file("serac", editable)
    _print(train_serac(editable, chosen, training, path).report, path, as_json)


def facts_to_train_on(
    names: Sequence[str], without: Sequence[str], limit: int | None, seed: int
) -> list[Fact]:
    """The facts of all sets that can be written together, without the subjects of others, at most
    `limit`; and wrong sums.
    """
    import random

    from knowedit.facts.sets import conflict_free, load
    from knowedit.methods.learned.examples import sums

    excluded = {fact.subject.casefold() for name in without for fact in load(name)}
    given = (fact for name in names if name != "sums" for fact in load(name))
    facts = conflict_free(fact for fact in given if fact.subject.casefold() not in excluded)
    chosen = random.Random(seed).sample(facts, min(limit or len(facts), len(facts)))
    return chosen + (sums(seed=seed) if "sums" in names else [])


def _print(report: dict[str, Any], path: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    facts = report["facts"]["training"]
    print(f"{report['trainable_parameters']:,} trained parameters on {facts} facts")
    print(f"{report['seconds']:.0f} s, {report['cpu_seconds']:.0f} s of processor time")
    if report["peak_memory_bytes"] is not None:
        print(f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB at the peak, beyond the model")
    print(f"validation: {report['validation']}")
    print(f"saved to {path}")
