"""Calibrations of the real models that `knowedit models` lists, in `calibration.jsonl`, where each
takes the place of an earlier one of its model; with `--ship` also the files that the package has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from knowedit.evaluation.calibration.measure import FACTS, LEAST, calibrate
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


def add(report: common.Report, found: Calibration) -> None:
    """Into the report, in the place of an earlier one of its model."""
    report.rows[1:] = [row for row in report.rows[1:] if row["model"] != found.model]
    chosen = found.choice
    report.note(
        f"{found.model}: layer {chosen.layer}, shared {list(chosen.shared_layers)}, neurons "
        f"{chosen.neuron_layer}, clamp {chosen.clamp:g}, {chosen.steps} steps, {found.seconds:.0f} "
        "CPU-s",
        **found.to_dict(),
    )


def ship(found: Calibration) -> Path:
    """Into the package, which then has it by default; its file."""
    SHIPPED.mkdir(exist_ok=True)
    path = SHIPPED / f"{found.model}.json"
    path.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(NAME, __doc__, 1, timed=False)
    parser.add_argument("names", nargs="*", help="of models (default: all that lie here)")
    parser.add_argument("--limit", type=int, default=FACTS, help="facts that the model knows")
    parser.add_argument("--ship", action="store_true", help="put it into the package, too")
    arguments = parser.parse_args(argv)
    wanted = [copy for copy in COPIES if copy.here]
    if arguments.names:
        wanted = [copy for copy in wanted if copy.name in arguments.names]
        if unknown := set(arguments.names) - {copy.name for copy in wanted}:
            parser.error(f"not here: {', '.join(sorted(unknown))}; see `knowedit models`")
    limit = LEAST if arguments.quick else arguments.limit
    report = common.report(NAME, arguments)
    if report.output is not None and report.output.is_file():
        report.rows += common.read_file(report.output)[1]
    for copy in wanted[:1] if arguments.quick else wanted:
        model = load_model(str(copy.folder), dtype=torch.float32)
        found = calibrate(model, count=limit, say=lambda line: print(line, file=sys.stderr))
        add(report, found)
        if arguments.ship and not arguments.quick:
            print(ship(found))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
