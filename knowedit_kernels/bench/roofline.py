"""The roofline picture of a results file: useful rate over intensity, under the measured
ceilings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knowedit_kernels.bench.results import ResultsError, Row

# Okabe and Ito's palette: distinct for colour-blind readers
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^DvPX"


def draw(environment: dict[str, Any], rows: list[Row], output: Path) -> None:
    """Writes the picture (svg, png or pdf by `output`'s suffix). Raises ResultsError if no row was
    timed.

    Rows over budget are hollow: what they compute is not the answer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    timed = [row for row in rows if "ms" in row]
    if not timed:
        raise ResultsError("no row was timed: nothing to draw")
    copy, matmul = environment["ceilings"]["copy_gbps"], environment["ceilings"]["matmul_tflops"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    spots = [row["intensity"] for row in timed] + [1e3 * rate / copy for rate in matmul.values()]
    low, high = min(spots) / 2, max(spots) * 4
    for name, rate in matmul.items():
        ridge = 1e3 * rate / copy
        axes.plot([low, ridge, high], [low * copy / 1e3, rate, rate], color="0.45", lw=1.2)
        axes.annotate(f"{name} matmul, {rate:.3g} TFLOP/s", (high, rate), (0, 3),
                      textcoords="offset points", ha="right", fontsize=8, color="0.3")  # fmt: skip
    axes.annotate(f"copy, {copy:.0f} GB/s", (low * 1.1, low * 1.1 * copy / 1e3), (4, -12),
                  textcoords="offset points", fontsize=8, color="0.3")  # fmt: skip
    order = list(dict.fromkeys((row["op"], row["provider"]) for row in timed))
    seen = set()
    for row in timed:
        key = f"{row['op']}: {row['provider']}{' (over budget)' if row['red'] else ''}"
        turn, place = divmod(order.index((row["op"], row["provider"])), len(_COLOURS))
        marker = _MARKERS[(place + turn) % len(_MARKERS)]
        axes.plot(row["intensity"], row["useful_tflops"], marker, ls="none", ms=7,
                  mec=_COLOURS[place], mfc="none" if row["red"] else _COLOURS[place],
                  label=None if key in seen else key)  # fmt: skip
        seen.add(key)
    axes.set(xscale="log", yscale="log", xlim=(low, high),
             xlabel="useful flops per byte that must move", ylabel="useful TFLOP/s",
             title=environment.get("name") or environment["cpu"])  # fmt: skip
    axes.grid(True, which="major", color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    rates = [*matmul.values(), *(row["useful_tflops"] for row in timed)]
    axes.set_ylim(min(rates) / 2, max(rates) * 2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    figure.savefig(output, dpi=150)
