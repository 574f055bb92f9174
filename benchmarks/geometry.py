"""Is the covariance trap real? The geometry of edits on SmolLM2, layer by layer, for
`docs/geometry.md`.

Same-subject groups of CounterFact (2 to 4 facts a subject) under wordings no edit is trained on. A
row is one layer: what `knowedit geometry` measures. The keys' drift is that of all subjects; values
are optimised for the first `--edited`, written by three metrics at equal gain, and asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from knowedit.cli.options import parse_layers
from knowedit.evaluation.geometry.geometry import geometry
from knowedit.evaluation.subjects.protocol import choose
from knowedit.facts.sets import data_dir
from knowedit.io.tables import Table
from knowedit.models.load import load_model
from knowedit.report import plots
from knowedit.statistics import key_statistics

from . import common
from .sequential import CORPUS

FORMS = {
    "paraphrase": "paraphrase",
    "question": "question",
    "chat_question": "chat question",
    "chat_completion": "chat completion",
    "distractor": "distractor",
}
CLOZE = {"cloze": "cloze", **FORMS}
METRICS = {"C": "covariance", "P": "null space", "I": "identity"}
VALUES = {
    "nll": "loss at the value, nats",
    "shift": "shift, in lengths of the hidden state",
    "tolerance": "tolerance, mean over facts",
    "weakest": "tolerance of a subject's weakest fact",
    "sharpness": "top curvature, times the value's squared length",
    "roughness": "mean curvature, times the value's squared length",
}


Row = dict[str, Any]
Cell = Callable[[Row], str]
Lines = dict[str, Cell]


def table(rows: Sequence[Row]) -> str:
    """Amplification and rho; what each metric's edit drifts and recalls; how sharp the values are.
    A column a layer.
    """
    rows = sorted(rows, key=lambda row: row["layer"])
    edited = [row for row in rows if row["recall"]]
    metrics = " / ".join(METRICS.values())
    keys: Lines = {
        "`kappa`, covariance: mean (largest)": lambda r: "{:.2f} ({:.2f})".format(*r["kappa"]["C"]),
        "`kappa`, null space: mean (largest)": lambda r: "{:.2f} ({:.2f})".format(*r["kappa"]["P"]),
        **{f"`rho`, {title}": _rho(name) for name, title in FORMS.items()},
        "`rho`, null space, mean": lambda r: (
            f"{_mean(r, lambda form: form['rho']['P']['mean']):.2f}"
        ),
        "gain, mean: covariance / identity": _each(
            "CI", lambda r, m: _mean(r, lambda form: form["gain"][m])
        ),
        "the key moves by, in its length, mean": lambda r: (
            f"{_mean(r, lambda form: form['moved']):.2f}"
        ),
    }
    edits: Lines = {}
    for name, title in CLOZE.items():
        edits[f"`D`, {title}: {metrics}"] = _recall(name, "drift", METRICS)
    for name, title in CLOZE.items():
        edits[f"recalled, {title}: unedited / {metrics}"] = _recall(
            name, "success", ("none", *METRICS), "{:.0%}"
        )
    values: Lines = {title: _value(name) for name, title in VALUES.items()}
    values |= {
        "cosine of two facts' gradients: clean / at the joint value": _each(
            ("clean", "joint"), lambda r, at: r["values"]["gradient_cosine"][at]
        ),
        "cosine of the shifts optimised alone": lambda r: f"{r['values']['delta_cosine']:.2f}",
        "recalled exactly within the tolerance / outside": _each(
            ("in", "out"), lambda r, side: r["within"][side], "{:.0%}"
        ),
    }
    first = rows[0]
    parts = [
        f"**Keys** of {first['facts']} facts of {first['subjects']} subjects; means are over "
        f"the five forms.",
        "",
    ]
    parts.append(_grid(rows, keys))
    if edited:
        facts, subjects = edited[0]["edited"]
        about = (
            f"{facts} facts of {subjects} subjects, values optimised jointly, each metric at "
            f"gain 0.95"
        )
        parts += [
            "",
            f'**Edits**: {about}. "Recalled": the new object is likelier than the true one.',
            "",
        ]
        parts.append(_grid(edited, edits))
        parts += [
            "",
            "**Values**: optimised for one fact alone / for all facts of a subject.",
            "",
            _grid(edited, values),
        ]
    return "\n".join(parts)


def _grid(rows: Sequence[Row], lines: Lines) -> str:
    columns = [(str(row["layer"]), [cell(row) for cell in lines.values()]) for row in rows]
    return Table.from_columns("layer", lines, columns).markdown()


def _each(names: Iterable[str], read: Callable[[Row, str], float], pattern: str = "{:.2f}") -> Cell:
    return lambda row: " / ".join(pattern.format(read(row, name)) for name in names)


def _rho(form: str) -> Cell:
    return lambda row: "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**_form(row, form)["rho"]["C"])


def _recall(form: str, measure: str, names: Iterable[str], pattern: str = "{:.2f}") -> Cell:
    return _each(names, lambda row, name: row["recall"][form][name][measure], pattern)


def _value(name: str) -> Cell:
    pattern = "{:,.0f}" if name == "sharpness" else "{:.2f}"
    return _each(("alone", "joint"), lambda row, way: row["values"][name][way], pattern)


def _form(row: Row, name: str) -> Row:
    return next(form for form in row["forms"] if form["form"] == name)


def _mean(row: Row, value: Callable[[Row], float]) -> float:
    return sum(value(_form(row, name)) for name in FORMS) / len(FORMS)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The picture of `knowedit geometry`."""
    plots.save(plots.geometry(sorted(rows, key=lambda row: row["layer"])), path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("geometry", __doc__, 1, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", default="same-subject")
    parser.add_argument(
        "--layer", action=common.Repeated, default=["3-8"], help="a number or a range"
    )
    parser.add_argument("--limit", type=int, default=24, help="subjects")
    parser.add_argument(
        "--edited",
        type=int,
        default=4,
        help="subjects whose values are optimised and written; 0: none",
    )
    parser.add_argument("--tokens", type=int, default=65_536, help="of the statistics")
    parser.add_argument(
        "--corpus", type=Path, help=f"text for the statistics (default: {CORPUS} in KNOWEDIT_DATA)"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.dataset, arguments.layer, arguments.tokens = "embedded", ["5"], 4096
        arguments.limit, arguments.edited = 3, 0
    layers = parse_layers(arguments.layer) or ()
    groups = sorted(choose(arguments.dataset, 2, None, "all", None), key=len, reverse=True)[
        : arguments.limit
    ]
    model = load_model(arguments.model)
    corpus = arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    statistics = key_statistics(model, layers, corpus, arguments.tokens)
    report = common.report(
        "geometry", arguments, model=model.name, tokens=arguments.tokens, dataset=arguments.dataset
    )
    for layer in layers:
        found = geometry(model, groups, statistics, [layer], edited=arguments.edited)[0]
        rho = {form.form: form.rho["C"].mean for form in found.forms}
        report.note(
            f"layer {layer}: kappa {found.kappa['C'][0]:.2f}, rho "
            + ", ".join(f"{n} {v:.2f}" for n, v in rho.items()),
            case=f"layer {layer}",
            **found.to_dict(),
        )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
