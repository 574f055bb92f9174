"""Calibrations of the real models that `knowedit models` lists: `calibration.jsonl`, and the files
that the package ships.

    python -m benchmarks.calibration [NAME ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from knowedit.evaluation.calibration.measure import calibrate
from knowedit.evaluation.calibration.shown import choices, measured
from knowedit.models.calibration import SHIPPED, Calibration
from knowedit.models.copies import COPIES
from knowedit.models.load import load_model

from . import common

NAME = "calibration"


def found(folder: Path) -> list[Calibration]:
    """Those of a results file."""
    rows = common.read(folder, NAME)[1]
    return [
        Calibration.from_dict({name: row[name] for name in row if name != "others"}) for row in rows
    ]


def table(folder: Path) -> str:
    """What was chosen, then what was measured, model by model."""
    header, _ = common.read(folder, NAME)
    models = found(folder)
    parts = [choices(models).markdown(), *(measured(one).markdown() for one in models)]
    return "\n\n".join([*parts, common.measured_on(header)])


def draw(folder: Path, path: Path) -> None:
    """Scores over the depth, with what is written at most there."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    scores, written = figure.subplots(1, 2)
    for one in found(folder):
        depth = one.shape[1]
        layers = [trial.layer / depth for trial in one.layers]
        scores.plot(layers, [trial.mean for trial in one.layers], "o-", ms=4, label=one.model)
        places = [layer / depth for layer, size in enumerate(one.sinks.written) if size]
        written.semilogy(places, [size for size in one.sinks.written if size], lw=1)
    scores.set(xlabel="layer / depth", ylabel="score")
    written.set(xlabel="layer / depth", ylabel="written at most / median")
    written.axhline(10, color="grey", lw=0.8, ls=":")
    figure.legend(loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(names: Sequence[str]) -> None:
    """Measure the copies that lie here, all or those named."""
    wanted = [copy for copy in COPIES if copy.here and (not names or copy.name in names)]
    results = [
        calibrate(load_model(str(copy.folder)), say=lambda line: print(line, file=sys.stderr))
        for copy in wanted
    ]
    write(results)


def write(results: Sequence[Calibration]) -> None:
    """The results file, where each takes the place of an earlier one of its model, and the files
    of the package.
    """
    there = found(common.RESULTS) if (common.RESULTS / f"{NAME}.jsonl").exists() else []
    every = {one.model: one for one in [*there, *results]}
    report = common.Report(NAME, common.RESULTS / f"{NAME}.jsonl")
    for one in every.values():
        report.note(one.model, **one.to_dict())
        text = json.dumps(one.to_dict(), indent=1) + "\n"
        SHIPPED.mkdir(exist_ok=True)
        (SHIPPED / f"{one.model}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
