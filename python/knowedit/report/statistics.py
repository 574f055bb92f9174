"""A picture of key statistics: the estimated error against tokens, and the spectrum of C."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from knowedit.errors import StatisticsError
from knowedit.io.files import atomic_file

if TYPE_CHECKING:
    from knowedit.statistics import KeyStatistics

LABELS = {"solve": "C⁻¹k", "null_space": "null space"}


def draw(found: KeyStatistics, path: Path) -> None:
    """Write the picture; its kind follows from the suffix (.png, .svg, .pdf).

    Raises:
        StatisticsError: another suffix.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise StatisticsError(f"{path}: a picture ends in .png, .svg or .pdf")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, layer in enumerate(found.layers):
        colour, looks = f"C{number % 10}", found[layer].extra.get("convergence", [])
        for measure, line in (("solve", "-"), ("null_space", "--")):
            points = [(look["tokens"], *look[measure]) for look in looks if measure in look]
            if points:
                tokens, median, low, high = zip(*points)
                left.plot(
                    tokens,
                    median,
                    line,
                    marker=".",
                    color=colour,
                    label=f"layer {layer}, {LABELS[measure]}",
                )
                left.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
        values = torch.linalg.eigvalsh(found.moment(layer)).flip(0).clamp_min(1e-30)
        right.plot(range(1, len(values) + 1), values.tolist(), color=colour, label=f"layer {layer}")
    left.set(
        xlabel="tokens",
        ylabel="relative error (quartiles over keys)",
        title="estimated from two halves",
    )
    right.set(
        xlabel="number", ylabel="eigenvalue of C", title="spectrum", xscale="log", yscale="log"
    )
    if left.lines:
        left.set(xscale="log", yscale="log")
        left.legend(fontsize="small")
    else:
        left.text(0.5, 0.5, "too few tokens for an estimate", ha="center", transform=left.transAxes)
    right.legend(fontsize="small")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120)
