"""Pictures of measurements, drawn from the JSON that evaluations write."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from knowedit.errors import KnowEditError
from knowedit.io.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from knowedit.statistics import KeyStatistics

#: {kind: {measure: {"mean", "low", "high"}}}
Rates = Mapping[str, Mapping[str, Mapping[str, float]]]

FORMS = ("cloze", "paraphrase", "question", "chat_question", "chat_completion", "distractor")
METRICS = {"C": "covariance", "P": "null space", "I": "identity"}
ESTIMATED = {"solve": "C⁻¹k", "null_space": "null space"}
#: What was restored, and the map's colours (those of the paper).
TRACED = {
    "hidden": ("one layer's output", "Purples"),
    "mlp": ("MLP outputs, windows of {}", "Greens"),
    "attention": ("attention outputs, windows of {}", "Reds"),
}
#: Panels of a trajectory: kind, measure, title.
STEPS = (
    ("efficacy", "success", "prefers the new fact"),
    ("paraphrase", "success", "in other words"),
    ("neighbourhood", "unchanged", "neighbours unchanged"),
    (None, "perplexity", "perplexity of held-out text"),
    (None, "kl", "KL on ordinary text, nats"),
    (None, "norm", "|sum of updates| / |W|"),
)


def save(figure: Figure, path: Path) -> None:
    """Write a picture in one step; its kind follows from the suffix. Raises KnowEditError for an
    unknown one.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise KnowEditError(f"{path}: a picture ends in .png, .svg or .pdf")
    _as_written(figure)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=110)


def _as_written(figure: Figure) -> None:
    """Names in a picture are no formulas, whatever dollars they have."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def svg(figure: Figure) -> str:
    """The picture as an element to put into a page."""
    out = io.StringIO()
    _as_written(figure)
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def panels(
    columns: int, rows: int = 1, *, width: float = 11, height: float = 3.6
) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, row by row, in the pages' style; sizes in inches, height a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e4e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize="small")
    return figure, axes


def bars(
    axis: Axes,
    tables: Mapping[str, Rates],
    wanted: Sequence[tuple[str, str]],
    before: Rates | None,
    title: str,
    *,
    top: float | None = 1.0,
) -> None:
    """Grouped bars with intervals; a black tick marks the unedited model.

    Args:
        tables: rates by method; wanted: kind and measure of each group, left out where a method
            does not have it.
    """
    shown = [
        (kind, measure)
        for kind, measure in wanted
        if all(measure in t.get(kind, {}) for t in tables.values())
    ]
    width = 0.8 / max(1, len(tables))
    for i, (name, table) in enumerate(tables.items()):
        found = [table[kind][measure] for kind, measure in shown]
        means = [e["mean"] for e in found]
        ends = [[e["mean"] - e["low"] for e in found], [e["high"] - e["mean"] for e in found]]
        at = [b + (i - (len(tables) - 1) / 2) * width for b in range(len(shown))]
        axis.bar(at, means, 0.92 * width, color=f"C{i}", label=name)
        axis.errorbar(at, means, ends, fmt="none", ecolor="#344054", elinewidth=0.9, capsize=1.5)
    if before is not None:
        for b, (kind, measure) in enumerate(shown):
            axis.hlines(
                before[kind][measure]["mean"],
                b - 0.45,
                b + 0.45,
                "black",
                linewidth=1.4,
                label="unedited" * (b == 0),
            )
    axis.set_xticks(range(len(shown)), [kind.replace("_", "\n") for kind, _ in shown])
    axis.set_title(title, fontsize="medium", loc="left")
    if top is not None:
        axis.set_ylim(0, 1.04 * top)


def legend(figure: Figure, axis: Axes) -> None:
    """One legend for all panels below them, from the labels of `axis`, in as many columns as there
    is room for.
    """
    handles, labels = axis.get_legend_handles_labels()
    shown = {label: handle for handle, label in zip(handles, labels) if label}
    inches = 0.55 + 0.07 * max(map(len, shown), default=0)  # of a column: its sign and small print
    room = max(1, min(6, len(shown), int(figure.get_figwidth() / inches)))
    rows = -(-len(shown) // room)
    figure.legend(
        [*shown.values()],
        [*shown],
        loc="outside lower center",
        ncols=-(-len(shown) // max(rows, 1)) or 1,
        fontsize="small",
        frameon=False,
    )


def same_subject(tables: Mapping[str, Rates], before: Rates) -> Figure:
    """Recall of several methods form by form, and what else each of them moved. Arguments:
    `{method: after}`, before.
    """
    figure, (likely, exact, kept, moved) = panels(2, 2)
    bars(
        likely,
        tables,
        [(form, "success") for form in FORMS],
        before,
        "new object likelier than the true one",
    )
    said = [*((form, "exact") for form in FORMS), ("greedy", "contains")]
    bars(exact, tables, said, before, "exactly the new object; greedy: the answer contains it")
    same = [
        ("neighbourhood", "unchanged"),
        ("essence", "kept"),
        ("identity", "kept"),
        ("unrelated", "kept"),
    ]
    bars(
        kept,
        tables,
        same,
        None,
        "as unedited: neighbours' decision, the subject's most likely next word",
    )
    bars(
        moved,
        tables,
        [(k, "kl") for k, _ in same[1:]],
        None,
        "KL(unedited || edited) after the subject, nats",
        top=None,
    )
    legend(figure, likely)
    return figure


def measures(tables: Mapping[str, Rates], before: Rates) -> Figure:
    """CounterFact's measures of several methods."""
    figure, (success, exact) = panels(2)
    kinds = ("efficacy", "paraphrase", "neighbourhood")
    bars(success, tables, [(kind, "success") for kind in kinds], before, "success")
    bars(
        exact,
        tables,
        [(kind, "exact") for kind in kinds],
        before,
        "every token is the most likely one",
    )
    legend(figure, success)
    return figure


def trajectory(trajectories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """A model on its way through a sequence of edits: one line a method, bands are 95 %
    intervals.
    """
    figure, axes = panels(3, 2, height=2.8)
    for axis, (kind, measure, title) in zip(axes, STEPS):
        for i, (name, steps) in enumerate(trajectories.items()):
            shown = [p for p in steps if p["edits"] or kind in (None, "neighbourhood")]
            found = [
                (p["edits"], e) for p in shown if (e := step_value(p, kind, measure)) is not None
            ]
            if not found:
                continue
            edits, values = [n for n, _ in found], [e for _, e in found]
            axis.plot(
                edits, [e["mean"] for e in values], marker=".", color=f"C{i % 10}", label=name
            )
            low, high = [e["low"] for e in values], [e["high"] for e in values]
            axis.fill_between(edits, low, high, color=f"C{i % 10}", alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize="medium", loc="left")
        axis.set_xlabel("facts written", fontsize="small")
        if kind is not None:
            axis.set_ylim(0, 1.04)
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    legend(figure, axes[0])
    return figure


def step_value(
    step: Mapping[str, Any], kind: str | None, measure: str
) -> Mapping[str, float] | None:
    """An estimate of `SequenceStep.to_dict`; a plain number has itself for an interval."""
    if kind is not None:
        return step["measures"].get(kind, {}).get(measure)
    value = step["drift"]["kl"] if measure == "kl" else step[measure]
    return None if value is None else {"mean": value, "low": value, "high": value}


def geometry(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """`LayerGeometry.to_dict` of several layers: is the covariance trap real, and does it cost
    recall?
    """
    written = [layer for layer in layers if layer["recall"]]
    figure, axes = panels(3, 2 if written else 1, height=3.4)
    kappa, rho, gain = axes[:3]
    numbers = [layer["layer"] for layer in layers]
    for i, (metric, name) in enumerate(METRICS.items()):
        kappa.plot(
            numbers,
            [layer["kappa"][metric][0] for layer in layers],
            marker="o",
            color=f"C{i}",
            label=name,
        )
    for i, form in enumerate(form["form"] for form in layers[0]["forms"]):
        found = [
            next(f for f in layer["forms"] if f["form"] == form)["rho"]["C"] for layer in layers
        ]
        shifted, means = [n + 0.06 * (i - 2.5) for n in numbers], [e["mean"] for e in found]
        ends = [[e["mean"] - e["low"] for e in found], [e["high"] - e["mean"] for e in found]]
        rho.errorbar(
            shifted,
            means,
            ends,
            fmt="o-",
            markersize=3,
            linewidth=0.8,
            color=f"C{i + 3}",
            label=form.replace("_", " "),
        )
    rho.axhline(1, color="black", linewidth=0.8)
    for axis in (kappa, rho):
        axis.set_xlabel("layer", fontsize="small")
        axis.set_xticks(numbers)
        axis.legend(fontsize="x-small", frameon=False)
    centre = sum(numbers) / len(numbers)
    middle = min(written or layers, key=lambda layer: abs(layer["layer"] - centre))
    gains = {form["form"]: form["gain"] for form in middle["forms"]}
    _metric_bars(gain, [*gains], lambda form, metric: gains[form][metric])
    titles = {
        kappa: "amplification |a| |k|, mean over facts",
        rho: "rho: squared deviation, covariance / identity",
    }
    titles[gain] = f"layer {middle['layer']}: mean gain at the form's key"
    if written:
        drift, recall, room = axes[3:]
        said = middle["recall"]
        _metric_bars(drift, [*said], lambda form, metric: said[form][metric]["drift"])
        _metric_bars(recall, [*said], lambda form, metric: said[form][metric]["success"])
        for n, form in enumerate(said):
            recall.hlines(
                said[form]["none"]["success"],
                n - 0.45,
                n + 0.45,
                "black",
                linewidth=1.4,
                label="unedited" * (n == 0),
            )
        for recalled, colour, label in (
            (True, "C2", "recalled exactly"),
            (False, "#98a2b3", "not recalled"),
        ):
            points = [p for p in middle["points"] if p[2] == recalled]
            room.scatter(
                [p[0] for p in points], [p[1] for p in points], s=14, color=colour, label=label
            )
        room.axline((0, 0), slope=1, color="black", linewidth=0.8)
        room.set(xlabel="push |Delta k' - r|", ylabel="tolerated distance")
        room.legend(fontsize="x-small", frameon=False)
        titles[drift] = f"layer {middle['layer']}: drift |Delta k' - r| / |r|"
        titles |= {
            recall: "new object likelier than the true one",
            room: "each fact and form, covariance's edit",
        }
        legend(figure, recall)
    for axis, title in titles.items():
        axis.set_title(title, fontsize="medium", loc="left")
    return figure


def _metric_bars(axis: Axes, forms: Sequence[str], read: Callable[[str, str], float]) -> None:
    width = 0.26
    for i, (metric, name) in enumerate(METRICS.items()):
        at = [n + (i - 1) * width for n in range(len(forms))]
        axis.bar(
            at, [read(form, metric) for form in forms], 0.92 * width, color=f"C{i}", label=name
        )
    axis.set_xticks(
        range(len(forms)),
        [form.replace("_", " ") for form in forms],
        rotation=25,
        ha="right",
        fontsize="x-small",
    )


def trace(record: Mapping[str, Any]) -> Figure:
    """`Trace.to_dict` or `AverageTrace.to_dict`: maps of tokens (or roles) and layers; of an
    average also its intervals.
    """
    kinds, rows, average = [*record["effect"]], record["rows"], "counts" in record
    figure, axes = panels(
        len(kinds), 1 + average, width=4 * len(kinds), height=max(2.2, 0.9 + 0.26 * len(rows))
    )
    for axis, lines, kind in zip(
        axes, axes[len(kinds) :] or axes, kinds
    ):  # axis for the map, lines below it
        effect, (title, colours) = record["effect"][kind], TRACED[kind]
        top = max(1e-3, *map(max, effect))
        drawn = axis.pcolormesh(effect, cmap=colours, vmin=0, vmax=top)
        figure.colorbar(drawn, ax=axis, shrink=0.9).ax.tick_params(labelsize="x-small")
        axis.set_yticks(
            [i + 0.5 for i in range(len(rows))],
            rows if axis is axes[0] else [""] * len(rows),
            fontsize="small",
        )
        axis.invert_yaxis()
        axis.grid(False)
        ticks = range(0, len(effect[0]), max(1, len(effect[0]) // 6))
        axis.set_xticks([i + 0.5 for i in ticks], [*map(str, ticks)])
        axis.set_title(title.format(record["window"]), fontsize="medium", loc="left")
        axis.set_xlabel("layer", fontsize="small")
        if average:
            for i, role in enumerate(rows):
                lines.plot(effect[i], color=f"C{i}", label=role)
                ends = record["low"][kind][i], record["high"][kind][i]
                lines.fill_between(
                    range(len(effect[i])), *ends, color=f"C{i}", alpha=0.15, linewidth=0
                )
            lines.set_xlabel("layer", fontsize="small")
    if average:
        axes[len(kinds)].set_ylabel("probability given back", fontsize="small")
        legend(figure, axes[-1])
    what = (
        f"{len(record['facts'])} facts"
        if average
        else f"p({record['answer']!r}) given back, of {record['clean']:.2f}"
    )
    figure.suptitle(f"{record['model']}: {what}", fontsize="medium", x=0.01, ha="left")
    return figure


def statistics(found: KeyStatistics) -> Figure:
    """Key statistics: the estimated error against tokens, and the spectrum of C, by layer."""
    figure, (error, spectrum) = panels(2, width=10, height=4)
    for number, layer in enumerate(found.layers):
        colour, checks = f"C{number % 10}", found[layer].extra.get("convergence", [])
        for measure, line in (("solve", "-"), ("null_space", "--")):
            points = [(check["tokens"], *check[measure]) for check in checks if measure in check]
            if points:
                tokens, median, low, high = zip(*points)
                label = f"layer {layer}, {ESTIMATED[measure]}"
                error.plot(tokens, median, line, marker=".", color=colour, label=label)
                error.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
        values = torch.linalg.eigvalsh(found.moment(layer)).flip(0).clamp_min(1e-30)
        numbers = range(1, len(values) + 1)
        spectrum.plot(numbers, values.tolist(), color=colour, label=f"layer {layer}")
    error.set(xlabel="tokens", ylabel="relative error (quartiles over keys)")
    error.set_title("estimated from two halves", fontsize="medium", loc="left")
    spectrum.set(xlabel="number", ylabel="eigenvalue of C", xscale="log", yscale="log")
    spectrum.set_title("spectrum", fontsize="medium", loc="left")
    if error.lines:
        error.set(xscale="log", yscale="log")
        error.legend(fontsize="small")
    else:
        said = "too few tokens for an estimate"
        error.text(0.5, 0.5, said, ha="center", transform=error.transAxes)
    spectrum.legend(fontsize="small")
    return figure
