"""Value optimisation: batched suffix replay (ours) against the published per-fact loop.

Both use the same contexts, objective, learning rate, steps and stopping rule, so the values can be
compared. The peer handles facts one by one at constant cost a fact, and is timed on the first few
only; ours on all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from knowedit.facts.fact import Fact
from knowedit.facts.sets import conflict_free, load
from knowedit.methods.locate.values import Targets, ValueSettings, optimise_values
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model

from . import common, peers
from .common import Check, relative_error

SAME = 1e-5
#: As many and as long as MEMIT's: the bare prompt and five openings of about ten tokens, with a
#: full stop.
CONTEXTS = (
    "{}",
    "The weather in the north was unusually cold that year. {}",
    "Therefore we have decided to change our plans again. {}",
    "Because of the long delay they missed the last train. {}",
    "I have been thinking about this for a long time. {}",
    "You should always read the instructions before you begin. {}",
)
SETTINGS = ValueSettings(
    steps=25, lr=0.5, clamp=0.75, weight_decay=0.5, kl=0.0625, stop=0.05, contexts=CONTEXTS
)


def measure(
    report: common.Report,
    model: EditableModel,
    facts: Sequence[Fact],
    few: int,
    layer: int,
    settings: ValueSettings,
    repeats: int,
) -> None:
    """One row: seconds a fact, ours over all `facts`, the peer over the first `few`."""
    kept: list[Targets] = []
    theirs: dict[int, tuple[Tensor, Tensor]] = {}

    def ours() -> None:
        kept[:] = [optimise_values(model, [[fact] for fact in facts], layer, settings)]

    def peer() -> None:
        theirs.update((i, peers.compute_z(model, facts[i], layer, settings)) for i in range(few))

    def warm() -> None:
        short = replace(settings, steps=2)
        optimise_values(model, [facts[:1]], layer, short)
        peers.compute_z(model, facts[0], layer, short)

    seconds = common.interleave({"peer": peer, "ours": ours}, repeats, warm=warm)
    a_fact = {
        "peer": [s / few for s in seconds["peer"]],
        "ours": [s / len(facts) for s in seconds["ours"]],
    }
    found = kept[0]
    value = max(relative_error(found.value[i] + found.delta[i], z) for i, (_, z) in theirs.items())
    delta = max(relative_error(found.delta[i], d) for i, (d, _) in theirs.items())
    report.compare(
        f"value optimisation, {len(facts)} facts, seconds a fact",
        a_fact,
        "peer",
        [Check("same values", value, SAME)],
        target=6.0,
        layer=layer,
        facts=len(facts),
        peer_facts=few,
        contexts=len(settings.contexts),
        steps=settings.steps,
        updates=found.steps.tolist(),
        delta_error=delta,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("values", __doc__, 3)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", default="counterfact")
    parser.add_argument("--limit", type=int, default=16, help="facts")
    parser.add_argument("--peer-limit", type=int, default=4, help="facts the peer is timed on")
    parser.add_argument("--layer", type=int, default=5)
    arguments = parser.parse_args(argv)
    count, few, settings = arguments.limit, arguments.peer_limit, SETTINGS
    if arguments.quick:
        count, few = 3, 1
        settings = ValueSettings(steps=3, contexts=CONTEXTS[:2])
    facts = conflict_free(load(arguments.dataset))[:count]
    model = load_model(arguments.model, dtype=torch.float32)
    report = common.report("values", arguments, model=model.name, dataset=arguments.dataset)
    for threads in arguments.threads:
        with common.threads(threads):
            measure(
                report,
                model,
                facts,
                min(few, len(facts)),
                arguments.layer,
                settings,
                arguments.repeats,
            )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
