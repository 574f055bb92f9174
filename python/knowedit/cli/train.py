"""`knowedit train mend` and `knowedit train serac`: the networks of learned editors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from knowedit.cli.options import DeviceMap, Dtype, Json, Layers, Model, parse_layers, placed, say

app = typer.Typer(
    no_args_is_help=True,
    help="Train the network of a learned editor; interrupted, the same command goes on.",
)

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The network's file; default: in the cache folder."),
]
Facts = Annotated[
    list[str], typer.Option(help="Data sets or files of facts, or 'sums'; repeatable.")
]
Without = Annotated[
    list[str],
    typer.Option(help="Leave out the subjects of these data sets, to test on them; repeatable."),
]
Limit = Annotated[
    int | None, typer.Option(help="Train on so many facts at most, chosen by the seed.")
]
Steps = Annotated[int | None, typer.Option(help="Length of the training.")]
Minutes = Annotated[float | None, typer.Option(help="Stop this run after so long.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]


@app.command()
def mend(
    model: Model,
    output: Output = None,
    facts: Facts = ["embedded", "sums"],  # noqa: B006
    without: Without = [],  # noqa: B006
    limit: Limit = None,
    steps: Steps = None,
    minutes: Minutes = None,
    layers: Layers = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """MEND's hyper-network: from a fact's gradient to an edit."""
    from knowedit.methods.learned.networks import default_file
    from knowedit.methods.learned.mend.training import MendTraining, train_mend
    from knowedit.models.load import load_model

    chosen, base = (
        facts_to_train_on(facts, without, limit, seed),
        MendTraining(layers=parse_layers(layers)),
    )
    plan = replace(base.plan, steps=steps or base.plan.steps, minutes=minutes, seed=seed)
    editable = load_model(model, dtype=dtype, device_map=placed(device_map), say=say)
    path = output or default_file("mend", editable)
    _print(train_mend(editable, chosen, replace(base, plan=plan), path).report, path, as_json)


@app.command()
def serac(
    model: Model,
    output: Output = None,
    facts: Facts = ["embedded", "sums"],  # noqa: B006
    without: Without = [],  # noqa: B006
    limit: Limit = None,
    steps: Annotated[
        int | None, typer.Option(help="Of the reader; the gate takes five times as many.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop this run's gate and its reader after so long each.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """SERAC's gate, which tells questions about a stored fact from others, and the reader that
    answers them.
    """
    from knowedit.methods.learned.networks import default_file
    from knowedit.methods.learned.serac.training import SeracTraining, train_serac
    from knowedit.models.load import load_model

    chosen, base = facts_to_train_on(facts, without, limit, seed), SeracTraining()
    gate, reader = (replace(plan, minutes=minutes, seed=seed) for plan in (base.gate, base.reader))
    if steps:
        gate, reader = replace(gate, steps=5 * steps), replace(reader, steps=steps)
    editable = load_model(model, dtype=dtype, device_map=placed(device_map), say=say)
    path = output or default_file("serac", editable)
    _print(
        train_serac(editable, chosen, replace(base, gate=gate, reader=reader), path).report,
        path,
        as_json,
    )


def facts_to_train_on(
    names: list[str], without: list[str], limit: int | None, seed: int
) -> list[Any]:
    """The facts of all sets that can be written together, without the subjects of others, at most
    `limit`; and wrong sums.
    """
    import random

    from knowedit.facts.sets import conflict_free, load
    from knowedit.methods.learned.examples import sums

    excluded = {fact.subject.casefold() for name in without for fact in load(name)}
    told = (fact for name in names if name != "sums" for fact in load(name))
    facts = conflict_free(fact for fact in told if fact.subject.casefold() not in excluded)
    chosen = random.Random(seed).sample(facts, min(limit or len(facts), len(facts)))
    return chosen + (sums(seed=seed) if "sums" in names else [])


def _print(report: dict[str, Any], path: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    print(
        f"{report['trainable_parameters']:,} trained parameters on "
        f"{report['facts']['training']} facts"
    )
    print(f"{report['seconds']:.0f} s, {report['cpu_seconds']:.0f} s of processor time")
    if report["peak_memory_bytes"] is not None:
        print(f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB at the peak, beyond the model")
    print(f"validation: {report['validation']}")
    print(f"saved to {path}")
