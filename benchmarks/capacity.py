"""How much of a model can be rewritten: its perplexity after a part of each MLP's neurons was given
away, and the others took over what they can (`docs/sequential.md`).

A fact of NeuronPatch costs two neurons, whatever it says, so this is what its facts cost apart from
what their switches do. Each layer alone, then a band of layers from below upwards, each on the
model as those below it have left it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from knowedit.cli.options import parse_layers
from knowedit.evaluation.measures.perplexity import perplexity
from knowedit.facts.sets import data_dir
from knowedit.io.tables import Table
from knowedit.methods.neurons.parts import Freed, free_neurons
from knowedit.methods.neurons.texts import everywhere, windows
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.statistics.corpus.corpus import Corpus

from . import common
from .sequential import CORPUS, TEXT

NAME = "capacity"
#: Parts of a layer's neurons that are given away; of a band the last.
SHARES = (1 / 8, 1 / 4)
NEURONS = 2  # a fact


def freed_in(model: EditableModel, layer: int, moment: Tensor, count: int) -> tuple[Tensor, Freed]:
    """The projection's weight `[hidden, d_ff]` as a view that can be written, and what is freed."""
    name = model.layout.weight_name(layer)
    weight = model.stored(name)
    weight = weight.T if model.is_transposed(name) else weight
    return weight, free_neurons(weight, moment, count)


@contextmanager
def without(weight: Tensor, freed: Freed, count: int) -> Iterator[None]:
    """The first `count` of the freed neurons given away, for a while."""
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(freed.left[:, :count] @ freed.right[:, :count].T)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def alone(
    report: common.Report, model: EditableModel, rows: Sequence[list[int]], asked: Any
) -> None:
    """Each layer by itself."""
    layers = range(len(model.layers))
    seen = everywhere(model, rows, {layer: (None,) for layer in layers})
    for layer in layers:
        moment = seen[layer][None][1]
        counts = [round(share * len(moment)) for share in SHARES]
        weight, freed = freed_in(model, layer, moment, counts[-1])
        found = []
        for count in counts:
            with without(weight, freed, count):
                found.append(asked())
        told = ", ".join(f"{n}: {p:.2f}" for n, p in zip(counts, found))
        report.note(
            f"layer {layer:2}  perplexity {told}",
            case="alone",
            layer=layer,
            neurons=counts,
            perplexity=found,
            lost=freed.loss,
        )


def together(
    report: common.Report,
    model: EditableModel,
    rows: Sequence[list[int]],
    asked: Any,
    band: Sequence[int],
) -> None:
    """The layers of the band and all of it below them; the model is left as it was."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for place, layer in enumerate(band, 1):
            moment = everywhere(model, rows, {layer: (None,)})[layer][None][1]
            count = round(SHARES[-1] * len(moment))
            weight, freed = freed_in(model, layer, moment, count)
            kept.append((weight, weight.detach().clone()))
            with torch.no_grad():
                weight.add_(freed.left @ freed.right.T)
            found = asked()
            report.note(
                f"layers {band[0]}-{layer}  {place * count} neurons, perplexity {found:.2f}",
                case="together",
                layer=layer,
                neurons=place * count,
                perplexity=found,
                lost=freed.loss,
            )
    finally:
        with torch.no_grad():
            for weight, before in reversed(kept):
                weight.copy_(before)


def table(folder: Path) -> str:
    """What a band's neurons cost, layer after layer; beside each layer by itself, where that was
    measured.
    """
    header, rows = common.read(folder, NAME)
    base, own, band = _parts(rows)
    headings = ["layers", "neurons", "facts", "perplexity", "change", "the last layer alone"]
    lines = [
        [
            f"{band[0]['layer']}-{row['layer']}" if row is not band[0] else f"{row['layer']}",
            f"{row['neurons']:,}",
            f"{row['neurons'] // NEURONS:,}",
            f"{base:.1f} -> {row['perplexity']:.1f}",
            f"{100 * (row['perplexity'] / base - 1):+.1f} %",
            f"{100 * (own[row['layer']][-1] / base - 1):+.1f} %" if own else "",
        ]
        for row in band
    ]
    count = len(headings) - (not own)
    found = Table(headings[:count], [line[:count] for line in lines]).markdown()
    return f"{found}\n\n{common.measured_on(header)}"


def draw(folder: Path, path: Path) -> None:
    """The band, and each layer by itself where that was measured."""
    _, rows = common.read(folder, NAME)
    base, own, both = _parts(rows)
    figure = Figure(figsize=(7.5, 3.0) if own else (4.5, 3.0), layout="constrained")
    axes = figure.subplots(1, 2 if own else 1, squeeze=False)[0]
    facts = [row["neurons"] / NEURONS for row in both]
    axes[0].plot(facts, [100 * (row["perplexity"] / base - 1) for row in both], "o-", ms=3)
    axes[0].set(xlabel="facts", title="1/4 of several layers", ylim=(0, None), xlim=(0, None))
    axes[0].set(ylabel="perplexity, change in %")
    for place, share in enumerate(SHARES if own else ()):
        change = [100 * (found[place] / base - 1) for found in own.values()]
        axes[1].plot(list(own), change, "o-", ms=3, label=f"1/{1 / share:.0f}")
    if own:
        axes[1].set(xlabel="layer", title="One layer")
        axes[1].legend(title="of its neurons", frameon=False, fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _parts(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[float, dict[int, list[float]], list[Mapping[str, Any]]]:
    """The unedited model's perplexity; each layer's by itself, of all of the band's or none; and
    the band's rows.
    """
    base = next(row["perplexity"] for row in rows if row["case"] == "unedited")
    own = {row["layer"]: row["perplexity"] for row in rows if row["case"] == "alone"}
    band = [row for row in rows if row["case"] == "together"]
    return base, own if all(row["layer"] in own for row in band) else {}, band


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(NAME, __doc__, 1, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--layer", action=common.Repeated, default=["4-19"], help="the band")
    parser.add_argument("--tokens", type=int, default=20_000, help="of ordinary text")
    parser.add_argument("--corpus", type=Path, help=f"(default: {CORPUS} in KNOWEDIT_DATA)")
    parser.add_argument("--text", type=Path, help=f"held out (default: {TEXT} in KNOWEDIT_DATA)")
    arguments = parser.parse_args(argv)
    data = data_dir() or Path("KNOWEDIT_DATA")
    model = load_model(arguments.model, dtype=torch.float32)
    band = sorted(parse_layers(arguments.layer) or ())
    model.check_layers(band)
    tokens = 2_000 if arguments.quick else arguments.tokens
    texts = list(Corpus.parse(arguments.text or data / TEXT).documents())
    asked = partial(perplexity, model, texts, tokens=500 if arguments.quick else 2048)
    report = common.report(NAME, arguments, model=model.name, setting={"tokens": tokens})
    report.note(f"unedited  perplexity {(found := asked()):.2f}", case="unedited", perplexity=found)
    rows = windows(model, arguments.corpus or data / CORPUS, tokens)
    together(report, model, rows, asked, band[:2] if arguments.quick else band)
    alone(report, model, rows, asked)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
