"""The arithmetic study as sections of a page: every measure of every method, and what each trades
for what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from knowedit.io.tables import Table
from knowedit.report.page import Section
from knowedit.report.plots import bars, legend, panels
from knowedit.studies.arithmetic.measure import GOAL
from knowedit.studies.arithmetic.summary import (
    bounds,
    interference_tables,
    methods_table,
    verdicts,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GOALS = dict(GOAL)
_PARAPHRASE = ("paraphrase", "success")


def sections(found: Mapping[str, Any]) -> list[Section]:
    """`study.json` for `knowedit report`."""
    head, measured = found["head"], _measured(found)
    judged = Table(["method", "verdict"], verdicts(found))
    made = [
        Section(
            f"{', '.join(head['targets'])}, and nothing else? {head['model']}",
            [*found["notes"], methods_table(found)],
            comparison(found) if measured else None,
        ),
        Section(
            "What is traded for what",
            [judged, bounds(found)],
            pareto(found) if measured else None,
        ),
    ]
    if found["interference"]:
        made.append(Section("Several sums at once", interference_tables(found)))
    return made


def comparison(found: Mapping[str, Any]) -> Figure:
    """Every measure of every method on the judging half, with 95 % intervals."""
    from cycler import cycler
    from matplotlib import rc_context

    figure, (said, kept, moved) = panels(3, width=15, height=4.6)
    tables = {entry["method"]: entry["judge"] for entry in _measured(found)}
    says = [("target", "success"), _PARAPHRASE, ("paraphrase", "longer")]
    same = [
        ("unrelated", "identical"),
        ("sums", "identical"),
        ("sums", "clear"),
        ("sums", "steady"),
    ]
    with rc_context({"axes.prop_cycle": cycler(color=_tab20())}):
        bars(said, tables, says, found["unedited"], "says the target")
        bars(kept, tables, same, None, "as unedited")
        bars(
            moved,
            tables,
            [("sums", "kl"), ("unrelated", "kl")],
            None,
            "KL(unedited || edited), nats",
            top=None,
        )
    said.set_xticks(range(3), ["target", "paraphrase", "paraphrase\nlonger answer"])
    kept.set_xticks(
        range(4),
        ["unrelated\n(locality)", "other sums", "sums,\nclear answer", "sums, up to\na near-tie"],
    )
    moved.set_yscale("symlog", linthresh=0.01)
    moved.set_ylim(bottom=0)
    legend(figure, said)
    return figure


def pareto(found: Mapping[str, Any]) -> Figure:
    """What stays against what generalises; the goal's corner is shaded, the front a line, hollow
    marks miss the target.
    """
    figure, axes = panels(3, width=15, height=4.6)
    measures = {
        ("unrelated", "identical"): "locality",
        ("sums", "clear"): "clear sums",
        ("sums", "identical"): "all other sums",
    }
    for axis, (key, name) in zip(axes, measures.items()):
        _front(axis, _measured(found), key)
        floor = _GOALS.get(key)
        if floor is not None:
            axis.fill_between(
                [_GOALS[_PARAPHRASE], 1.03],
                floor,
                1.03,
                color="#32d583",
                alpha=0.25,
                linewidth=0,
                label="goal",
            )
        axis.set(
            xlim=(-0.03, 1.03),
            ylim=(-0.03, 1.03),
            xlabel="paraphrases that say the target",
            ylabel="as unedited",
        )
        axis.set_title(name, fontsize="medium", loc="left")
    legend(figure, axes[0])
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats in both coordinates, from left to right."""
    kept = [
        i
        for i, (x, y) in enumerate(points)
        if not any((a >= x and b >= y) and (a, b) != (x, y) for a, b in points)
    ]
    return sorted(kept, key=lambda i: points[i])


def _front(axis: Axes, entries: Sequence[Mapping[str, Any]], key: tuple[str, str]) -> None:
    kind, measure = key
    shown = [
        (e, e["judge"][_PARAPHRASE[0]][_PARAPHRASE[1]], e["judge"][kind].get(measure))
        for e in entries
    ]
    shown = [(e, x, y) for e, x, y in shown if y is not None]
    writing = [(x["mean"], y["mean"]) for e, x, y in shown if e["goals"]["target"][0]]
    for n, (entry, x, y) in enumerate(shown):
        colour, written = _tab20()[n % 20], entry["goals"]["target"][0]
        ends = [[[e["mean"] - e["low"]], [e["high"] - e["mean"]]] for e in (x, y)]
        marker = "osD^v"[n % 5]
        axis.errorbar(
            x["mean"],
            y["mean"],
            ends[1],
            ends[0],
            fmt=marker,
            color=colour,
            elinewidth=0.6,
            markersize=6,
            markerfacecolor=colour if written else "none",
            label=entry["method"],
        )
    best = [writing[i] for i in front(writing)]
    axis.plot([x for x, _ in best], [y for _, y in best], color="#667085", linewidth=0.8, zorder=0)


def _tab20() -> Sequence[Any]:
    """Colours for twenty methods: more than the usual ten."""
    from matplotlib import colormaps

    return colormaps["tab20"].colors  # type: ignore[attr-defined]


def _measured(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for entry in found["methods"] if "judge" in entry]
