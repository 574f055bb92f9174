"""`knowedit report RUN`: everything a folder of results holds, as text tables and as one
self-contained page.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowedit.errors import KnowEditError
from knowedit.evaluation.measures.counterfact import Estimate
from knowedit.evaluation.subjects.same_subject import SameSubjectEvaluation, Table, compare
from knowedit.evaluation.tracing.localisation import Advice
from knowedit.io.files import atomic_file
from knowedit.report import plots, study
from knowedit.report.page import _STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
SHORT = ("success", "contains", "kl")  # measures shown for every number of facts
_CARD = (
    "figure { background: #fff; margin: 1rem 0; padding: .5rem; border-radius: .4rem } "
    "figure svg { width: 100%; height: auto }"
)


def read(folder: Path) -> dict[str, Any]:
    """The results in `folder`, by the file they are in. Raises KnowEditError when there are none,
    or one is damaged.
    """
    found = {}
    for name in SECTIONS:
        path = folder / name
        if path.is_file():
            try:
                found[name] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise KnowEditError(f"{path} is damaged ({error}); measure again") from error
    if not found:
        raise KnowEditError(
            f"{folder} holds no results ({', '.join(SECTIONS)}); write some with `knowedit eval "
            f"-o {folder}`, "
            "`knowedit same-subject -o`, `knowedit geometry -o`, `knowedit trace -o` or "
            "`knowedit study -o`"
        )
    return found


def report(folder: Path) -> str:
    """Write `report.html` into `folder` and return the tables as text.

    Raises:
        KnowEditError: no results, or results of another version.
    """
    sections, texts = [], []
    for name, content in read(folder).items():
        try:
            for title, table, figure in SECTIONS[name](content):
                texts.append(f"{title}\n{table}")
                picture = f"<figure>{plots.svg(figure)}</figure>" if figure is not None else ""
                sections.append(
                    f"<h2>{html.escape(title)}</h2>{picture}<pre>{html.escape(table)}</pre>"
                )
        except (KeyError, TypeError, IndexError) as error:
            raise KnowEditError(
                f"{folder / name}: not of this version ({type(error).__name__}: {error})"
            ) from error
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width">'
        f"<title>{html.escape(folder.resolve().name)}</title><style>{_STYLE}{_CARD} pre "
        f"{{ overflow-x: auto }}</style>"
        f"<h1>{html.escape(folder.resolve().name)}</h1>{''.join(sections)}</html>\n"
    )
    with atomic_file(folder / PAGE) as path:
        path.write_text(page, encoding="utf-8")
    return "\n\n".join(texts)


Section = tuple[str, str, "Figure | None"]


def _results(results: Sequence[Mapping[str, Any]]) -> list[Section]:
    first = results[0]
    title = (
        f"{first['model']}: {first['protocol']} of {first['facts']} facts from {first['dataset']}"
    )
    after = {result["method"]: result["evaluation"]["after"] for result in results}
    before = first["evaluation"]["before"]
    lines = grid({"unedited": before, **after})
    for result in results:
        if result["drift"]:
            lines.append(
                f"{result['method']}: KL {result['drift']['kl']:.4f} nats on ordinary text, "
                f"{result['seconds']:.2f} s a fact"
            )
    found: list[Section] = [(title, "\n".join(lines), plots.measures(after, before))]
    if courses := {
        result["method"]: result["course"] for result in results if result.get("course")
    }:
        table = [line for name, points in courses.items() for line in (name, *_course(points))]
        found.append(("On the way", "\n".join(table), plots.course(courses)))
    return found


def _course(points: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["edits " + " ".join(f"{measure:>12}" for _, measure, _ in plots.COURSE)]
    for point in points:
        values = [plots._read(point, kind, measure) for kind, measure, _ in plots.COURSE]
        lines.append(f"{point['edits']:>5} " + " ".join(f"{_number(_mean(v)):>12}" for v in values))
    return lines


def _same_subject(results: Sequence[Mapping[str, Any]]) -> list[Section]:
    found = {
        result["method"]: SameSubjectEvaluation.from_dict(result["evaluation"])
        for result in results
    }
    tables = {name: result["evaluation"]["after"] for name, result in zip(found, results)}
    before, sizes = results[0]["evaluation"]["before"], next(iter(found.values())).sizes
    title = (
        f"{results[0]['model']}: {sum(sizes.values())} facts of {len(sizes)} subjects from "
        f"{results[0]['dataset']}"
    )
    lines = grid({"unedited": before, **tables})
    *others, last = found
    for other in others:
        clear = _plain(compare(found[last], found[other]), lambda _, e: e.low > 0 or e.high < 0)
        lines += ["", f"{last} - {other}, paired, where the interval excludes 0"]
        lines += grid({"difference": clear}) if clear else ["nothing"]
    for size in sorted(set(sizes.values())) if len(set(sizes.values())) > 1 else ():
        some = {name: evaluation.of_size(size) for name, evaluation in found.items()}
        lines += ["", f"subjects with {size} facts ({sum(n == size for n in sizes.values())})"]
        short = {name: _plain(part.after, lambda m, _: m in SHORT) for name, part in some.items()}
        lines += grid(short)
    return [(title, "\n".join(lines), plots.same_subject(tables, before))]


def _plain(table: Table, keep: Callable[[str, Estimate], bool]) -> dict[str, dict[str, Any]]:
    """The estimates to be shown, as JSON has them."""
    kept = {kind: {m: vars(e) for m, e in row.items() if keep(m, e)} for kind, row in table.items()}
    return {kind: row for kind, row in kept.items() if row}


def _geometry(layers: Sequence[Mapping[str, Any]]) -> list[Section]:
    return [("Geometry", geometry_table(layers), plots.geometry(layers))]


def geometry_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """`LayerGeometry.to_dict` of several layers as text."""
    facts = (
        f"{layers[0]['facts']} facts of {layers[0]['subjects']} subjects; values of "
        f"{max(g['edited'][0] for g in layers)} facts"
    )
    rows: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
        "kappa covariance": lambda g: g["kappa"]["C"][0],
        "  largest": lambda g: g["kappa"]["C"][1],
        "kappa null space": lambda g: g["kappa"]["P"][0],
        "null space: share of energy": lambda g: g["null"][0],
        "  of directions": lambda g: g["null"][1],
    }
    if any(g["values"] for g in layers):
        rows |= {
            "cosine of gradients, clean": lambda g: _of(g["values"], "gradient_cosine", "clean"),
            "  at the joint value": lambda g: _of(g["values"], "gradient_cosine", "joint"),
            "cosine of single shifts": lambda g: _of(g["values"], "delta_cosine"),
        }
        for name, way in product(
            ("nll", "shift", "tolerance", "weakest", "sharpness", "roughness"), ("alone", "joint")
        ):
            rows[f"{name}, {way}"] = lambda g, name=name, way=way: _of(g["values"], name, way)  # type: ignore[misc]
        rows |= {
            "recalled within the room": lambda g: g["within"]["in"],
            "  outside": lambda g: g["within"]["out"],
        }
    lines = [facts, f"{'':28}" + "".join(f"{'layer ' + str(g['layer']):>10}" for g in layers)]
    lines += [
        f"{name:28}" + "".join(f"{_number(read(g)):>10}" for g in layers)
        for name, read in rows.items()
    ]
    for g in layers:
        lines += [
            "",
            f"layer {g['layer']}: the keys of other forms; recall under edits of equal gain (C "
            f"covariance, P null, I identity)",
        ]
        lines += [
            f"{'form':16} {'|eps|/|k|':>9} {'cos':>5}  {'gain C / P / I':>20}  {'rho C':>20}  "
            f"{'likelier none / C / P / I':>26}"
        ]
        for form in g["forms"]:
            gain, rho = (form[name] for name in ("gain", "rho"))
            said = g["recall"].get(form["form"], {})
            recall = (
                " / ".join(_number(said[m]["success"], 2) for m in ("none", "C", "P", "I"))
                if said
                else ""
            )
            span = f"{rho['C']['mean']:.2f} [{rho['C']['low']:.2f}, {rho['C']['high']:.2f}]"
            gains = " / ".join(f"{gain[m]:.2f}" for m in plots.METRICS)
            lines.append(
                f"{form['form']:16} {form['moved']:>9.2f} {form['cosine']:>5.2f}  {gains:>20}  "
                f"{span:>20}  {recall:>26}"
            )
    return "\n".join(lines)


def _trace(record: Mapping[str, Any]) -> list[Section]:
    return [(f"Causal trace of {record['model']}", trace_table(record), plots.trace(record))]


def trace_table(record: Mapping[str, Any]) -> str:
    """`Trace.to_dict` or `AverageTrace.to_dict` as text: a map for every kind, each row's largest
    effect, its 95 % interval.
    """
    rows, average = record["rows"], "counts" in record
    if average:
        facts = record["facts"]
        clean, corrupted = (
            sum(f[name] for f in facts) / len(facts) for name in ("clean", "corrupted")
        )
        left = f"; left out: {record['unknown']} not known, {record['unusable']} not usable"
        lines = [
            f"{len(facts)} facts the model knows{left}",
            f"p(answer): {clean:.3f}, subjects corrupted {corrupted:.3f}",
        ]
        rows = [f"{role} ({count})" for role, count in zip(rows, record["counts"])]
    else:
        p = f"p {record['clean']:.3f}, subject (*) corrupted {record['corrupted']:.3f}"
        lines = [f"{record['prompt']!r} -> {record['answer']!r}: {p}"]
    lines += [f"{record['samples']} draws of noise, standard deviation {record['deviation']:.3f}"]
    for kind, effect in record["effect"].items():
        top = max(1e-3, *map(max, effect))
        width, depth = max(map(len, rows)), len(effect[0])
        lines += [
            "",
            f"{kind}: {plots.TRACED[kind][0].format(record['window'])}; darkest {top:.3f}",
        ]
        for i, name in enumerate(rows):
            shades = "".join(_SHADES[min(4, max(0, int(5 * e / top)))] for e in effect[i])
            at = max(range(depth), key=effect[i].__getitem__)
            ends = f"[{record['low'][kind][i][at]:+.3f}, {record['high'][kind][i][at]:+.3f}]"
            lines.append(f"{name:{width}} |{shades}| {effect[i][at]:+.3f} {ends} at {at}")
    if average and record["advice"]:
        lines += ["", str(Advice(**record["advice"]))]
    return "\n".join(lines + [f"note: {warning}" for warning in record.get("warnings", ())])


_SHADES = " ░▒▓█"


def _of(values: Any, *names: str) -> Any:
    """A value by its path; None where the layer has none."""
    for name in names:
        values = values.get(name) if values else None
    return values


def _mean(estimate: Mapping[str, float] | None) -> float | None:
    return None if estimate is None else estimate["mean"]


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def grid(tables: Mapping[str, plots.Table]) -> list[str]:
    """Kinds and measures down, methods across, each cell a mean with its interval."""
    rows = list(
        dict.fromkeys(
            (kind, m) for table in tables.values() for kind, row in table.items() for m in row
        )
    )
    lines = [f"{'':27}" + "".join(f"{name:>24}" for name in tables)]
    for kind, measure in rows:
        cells = [table.get(kind, {}).get(measure) for table in tables.values()]
        texts = [
            "" if e is None else f"{e['mean']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for e in cells
        ]
        lines.append(f"{kind:16} {measure:10}" + "".join(f"{text:>24}" for text in texts))
    return lines


SECTIONS: dict[str, Callable[[Any], list[Section]]] = {
    "results.json": _results,
    "same_subject.json": _same_subject,
    "geometry.json": _geometry,
    "trace.json": _trace,
    "traces.json": _trace,
    "study.json": study.sections,
}
