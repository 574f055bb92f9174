"""`knowedit report RUN`: everything a folder of results holds, as text and as one self-contained
page.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from knowedit.errors import KnowEditError
from knowedit.evaluation import protocols, sweep
from knowedit.evaluation.intervals import Estimate
from knowedit.evaluation.measures.base import FIGURES, fact_measures
from knowedit.evaluation.subjects import protocol as subjects
from knowedit.evaluation.subjects.same_subject import SameSubjectEvaluation
from knowedit.evaluation.tracing.localisation import Advice
from knowedit.io.files import atomic_file
from knowedit.io.lines import number_of
from knowedit.io.names import nearest
from knowedit.io.tables import Column, Table, figure
from knowedit.io.tensors import understood
from knowedit.methods.registry import changed, make_method
from knowedit.report import plots, prompts, study
from knowedit.report.page import Section, write_sections

PAGE = "report.html"
SHORT = ("success", "contains", "kl")  # measures shown for every number of facts
SHADES = " ░▒▓█"


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
            except (ValueError, RecursionError) as error:
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
    """Write `report.html` into `folder` and return the same as text, without the pictures. Raises
    KnowEditError, as `write_report`.
    """
    return text_of(write_report(folder))


#: The forms in which a table can be written, by the ending of its file.
FORMS: dict[str, Callable[[Table], str]] = {
    "csv": Table.csv,
    "latex": Table.latex,
    "markdown": Table.markdown,
}
ENDINGS = {"csv": "csv", "latex": "tex", "markdown": "md"}
TABLES = "tables"


def write_tables(folder: Path, sections: Sequence[Section], form: str) -> list[Path]:
    """Write every table of a page into `folder`/tables, one a file, which is numbered and called
    after it. Raises KnowEditError for an unknown form.
    """
    if form not in FORMS:
        raise KnowEditError(f"unknown form of tables {form!r}; {nearest(form, FORMS)}")
    named = [
        (block.title or section.title, block)
        for section in sections
        for block in section.blocks
        if isinstance(block, Table)
    ]
    written = []
    for number, (title, table) in enumerate(named, 1):
        words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        path = folder / TABLES / f"{number:02d}-{words[:50].strip('-')}.{ENDINGS[form]}"
        with atomic_file(path) as temporary:
            temporary.write_text(FORMS[form](table).rstrip("\r\n") + "\n", encoding="utf-8")
        written.append(path)
    return written


def text_of(sections: Sequence[Section]) -> str:
    """The sections of a page as a terminal shows them."""
    return "\n\n".join(text for section in sections if (text := section.text()))


def write_report(folder: Path) -> list[Section]:
    """Write `report.html` into `folder` and return what is on it.

    Raises:
        KnowEditError: no results, or results of another version.
    """
    sections: list[Section] = []
    for name, content in read(folder).items():
        with understood(folder / name, "results", KnowEditError, "measure again"):
            sections += SECTIONS[name](content)
            if name == protocols.RESULTS:
                results = [protocols.migrate(record) for record in content]
                sections += _details(results, [folder / protocols.PROMPTS])
            elif name == sweep.FILE:
                results = sweep.results(content)
                files = [sweep.prompts_file(folder, result["config"]) for result in results]
                sections += _details(results, files)
    write_sections(folder / PAGE, folder.resolve().name, sections)
    return sections


def _details(results: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> list[Section]:
    """Answers side by side, every prompt (in `files`), norms, and how to run it again."""
    found = []
    if said := prompts.said_side_by_side(results):
        found.append(Section("What the model says", said))
    if (every := prompts.read_prompts(files, results)) is not None:
        found.append(Section("Every prompt", [], prompts=every))
    if (norms := prompts.layers(results)).rows:
        found.append(Section("What was written", [norms]))
    names = prompts.apart([result["method"] for result in results])
    made = {name: one for name, one in zip(names, results) if one["config"] or _is_saved(one)}
    if made:
        how = "From the folder where this was run, with the same version:"
        commands = {name: _command(one) for name, one in made.items()}
        settings = {name: one["config"] for name, one in made.items() if one["config"]}
        found.append(Section("To reproduce", [how], commands=commands, settings=settings))
    return found


def _is_saved(result: Mapping[str, Any]) -> bool:
    """Whether it is of a saved edit, or of an edited folder, whose command is known."""
    asked = result.get("run", {}).get("asked", {})
    return "edit" in asked or "against" in asked


def _command(result: Mapping[str, Any]) -> str:
    """The command that measures a method of a run again."""
    run = result.get("run", {})
    words = ["knowedit", "eval", run.get("model", "MODEL")]
    if not _is_saved(result):
        own = run.get("own")  # a file of the user's, which a page does not run to ask it
        words += _set(own["file"], own["set"]) if own else _method_words(result["config"])
        words += ["--dataset", result["dataset"], "--protocol", result["protocol"]]
    for name, value in run.get("asked", {}).items():
        if isinstance(value, dict):  # of Python: no command line has it
            continue
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            words += [option] if one is True else [option, str(one)]
    return shlex.join(words)


def _method_words(config: Mapping[str, Any]) -> list[str]:
    """`--method`, with `--set` of what is not as it ships; a record where that does not say all of
    it.
    """
    try:
        kind = config["kind"]
        settings = changed(config, make_method(kind).to_dict())
        if make_method(kind, settings).to_dict() == config:
            return _set(kind, settings)
    except (KnowEditError, KeyError):
        pass
    return ["--method", json.dumps(config)]


def _set(method: str, settings: Iterable[str]) -> list[str]:
    return ["--method", method, *(word for one in settings for word in ("--set", one))]


def _results(records: Sequence[Mapping[str, Any]]) -> list[Section]:
    results = [protocols.migrate(record) for record in records]
    first = results[0]
    title = (
        f"{first['model']}: {first['protocol']} of {number_of(first['facts'], 'fact')} from "
        f"{first['dataset']}"
    )
    names = prompts.apart([result["method"] for result in results])
    after = {name: result["evaluation"]["after"] for name, result in zip(names, results)}
    before = first["evaluation"]["before"]
    costs = []
    for name, result in zip(names, results):
        effects = "; ".join(protocols.describe(result["side_effects"]))
        spent = result["seconds"]
        cost = [f"{spent:.2f} s a fact"] if spent is not None else []
        costs.append(f"{name}: {'; '.join([*cost, *([effects] if effects else [])])}")
    blocks: list[Table | str] = [grid({"unedited": before, **after}, explained=True), *costs]
    found = [Section(title, blocks, plots.measures(after, before))]
    if trajectories := {
        name: result["trajectory"] for name, result in zip(names, results) if result["trajectory"]
    }:
        tables = [_trajectory(name, steps) for name, steps in trajectories.items()]
        found.append(Section("On the way", tables, plots.trajectory(trajectories)))
    if able := {
        name: result["ability"] for name, result in zip(names, results) if "ability" in result
    }:
        found.append(Section("General ability", _ability(able)))
    if written := {
        name: result["generation"] for name, result in zip(names, results) if "generation" in result
    }:
        unedited = next(iter(written.values()))["before"]
        columns = {"unedited": unedited, **{n: made["after"] for n, made in written.items()}}
        found.append(Section("What it writes by itself", [grid(columns)]))
    return found


def comparison(records: Sequence[Mapping[str, Any]]) -> str:
    """Several records of `results.json` side by side, as text."""
    return _results(records)[0].text()


def result_text(record: Mapping[str, Any]) -> str:
    """One record of `results.json` as text."""
    return "\n\n".join(section.text() for section in _results([record]))


def _ability(able: Mapping[str, Mapping[str, Any]]) -> list[Table | str]:
    """`Ability.to_dict` by method: every task before and under each, and what changed."""
    first = next(iter(able.values()))
    columns = {"unedited": first["before"], **{name: made["after"] for name, made in able.items()}}
    by_chance = ", ".join(
        f"{task} {figure(share, '.3f')}" for task, share in first["chance"].items()
    )
    changes = grid({name: made["change"] for name, made in able.items()}, "change, item by item")
    return [grid(columns), changes, f"by chance: {by_chance}"]


def _trajectory(name: str, steps: Sequence[Mapping[str, Any]]) -> Table:
    shown = [*plots.STEPS, ("ability", "accuracy", "general ability")]
    columns: list[Column | str] = [
        "facts",
        *(Column(title, ".3f", "right") for _, _, title in shown),
    ]
    rows = [
        [step["edits"], *(_mean(plots.step_value(step, k, m)) for k, m, _ in shown)]
        for step in steps
    ]
    return Table(columns, rows, name).without_empty_columns()


def _same_subject(results: Sequence[Mapping[str, Any]]) -> list[Section]:
    found = {
        result["method"]: SameSubjectEvaluation.from_dict(result["evaluation"])
        for result in results
    }
    after = {name: result["evaluation"]["after"] for name, result in zip(found, results)}
    before, sizes = results[0]["evaluation"]["before"], next(iter(found.values())).sizes
    title = (
        f"{results[0]['model']}: {number_of(sum(sizes.values()), 'fact')} of "
        f"{number_of(len(sizes), 'subject')} from "
        f"{results[0]['dataset']}"
    )
    blocks = [grid({"unedited": before, **after})]
    *others, last = found
    blocks += [
        subjects.difference_table(last, found[last], other, found[other]) for other in others
    ]
    for size in sorted(set(sizes.values())) if len(set(sizes.values())) > 1 else ():
        some = {name: evaluation.of_size(size) for name, evaluation in found.items()}
        short = {
            name: {
                kind: {m: vars(e) for m, e in row.items() if m in SHORT}
                for kind, row in part.after.items()
            }
            for name, part in some.items()
        }
        count = sum(n == size for n in sizes.values())
        blocks.append(grid(short, f"subjects with {size} fact{'s' * (size > 1)} ({count})"))
    return [Section(title, blocks, plots.same_subject(after, before))]


def _geometry(layers: Sequence[Mapping[str, Any]]) -> list[Section]:
    return [Section("Geometry", geometry_blocks(layers), plots.geometry(layers))]


def geometry_blocks(layers: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    """`LayerGeometry.to_dict` of several layers: one table of all of them, then one a layer."""
    rows: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
        "kappa covariance": lambda g: g["kappa"]["C"][0],
        "  largest": lambda g: g["kappa"]["C"][1],
        "kappa null space": lambda g: g["kappa"]["P"][0],
        "null space: share of energy": lambda g: g["null"][0],
        "  of directions": lambda g: g["null"][1],
    }
    if any(g["values"] for g in layers):
        rows |= {
            "cosine of gradients, clean": _value("gradient_cosine", "clean"),
            "  at the joint value": _value("gradient_cosine", "joint"),
            "cosine of single shifts": _value("delta_cosine"),
        }
        measures = ("nll", "shift", "tolerance", "weakest", "sharpness", "roughness")
        for name, way in product(measures, ("alone", "joint")):
            rows[f"{name}, {way}"] = _value(name, way)
        rows |= {
            "recalled within the room": lambda g: g["within"]["in"],
            "  outside": lambda g: g["within"]["out"],
        }
    columns: list[Column | str] = [
        "",
        *(Column(f"layer {g['layer']}", ".3f", "right") for g in layers),
    ]
    counts = (layers[0]["facts"], layers[0]["subjects"], max(g["edited"][0] for g in layers))
    all_facts, subjects, edited = map(number_of, counts, ("fact", "subject", "fact"))
    facts = f"{all_facts} of {subjects}; values of {edited}"
    cells = [[name, *map(read, layers)] for name, read in rows.items()]
    return [facts, Table(columns, cells), *map(_forms, layers)]


def _forms(layer: Mapping[str, Any]) -> Table:
    """The keys of other prompt forms at one layer, and what edits of equal gain recall there."""
    rows = []
    for form in layer["forms"]:
        gain, said = form["gain"], layer["recall"].get(form["form"], {})
        recall = (
            " / ".join(f"{said[m]['success']:.2f}" for m in ("none", "C", "P", "I"))
            if said
            else None
        )
        gains = " / ".join(f"{gain[m]:.2f}" for m in plots.METRICS)
        rho = Estimate(**form["rho"]["C"])
        rows.append([form["form"], form["moved"], form["cosine"], gains, rho, recall])
    columns: list[Column | str] = [
        "form",
        Column("|eps| / |k|", ".2f"),
        Column("cosine", ".2f"),
        Column("gain C / P / I", align="right"),
        Column("rho C", ".2f"),
        Column("likelier: none / C / P / I", align="right"),
    ]
    title = f"layer {layer['layer']}: the keys of other forms"
    note = "Edits of equal gain by each metric: C covariance, P null space, I identity."
    return Table(columns, rows, title, [note])


def _trace(record: Mapping[str, Any]) -> list[Section]:
    title = f"Causal trace of {record['model']}"
    return [Section(title, trace_blocks(record), plots.trace(record))]


def trace_blocks(record: Mapping[str, Any]) -> list[Table | str]:
    """`Trace.to_dict` or `AverageTrace.to_dict`: a map for every kind, each row's largest effect
    and its 95 % interval.
    """
    rows, average = record["rows"], "counts" in record
    if average:
        facts = record["facts"]
        clean, corrupted = (
            sum(f[name] for f in facts) / len(facts) for name in ("clean", "corrupted")
        )
        blocks: list[Table | str] = [
            f"{len(facts)} facts the model knows; left out: {record['unknown']} not known, "
            f"{record['unusable']} not usable",
            f"p(answer): {clean:.3f}, subjects corrupted {corrupted:.3f}",
        ]
        rows = [f"{role} ({count})" for role, count in zip(rows, record["counts"])]
    else:
        p = f"p {record['clean']:.3f}, subject (*) corrupted {record['corrupted']:.3f}"
        blocks = [f"{record['prompt']!r} -> {record['answer']!r}: {p}"]
    blocks.append(
        f"{record['samples']} draws of noise, standard deviation {record['deviation']:.3f}"
    )
    blocks += [_map(record, kind, rows) for kind in record["effect"]]
    if average and record["advice"]:
        blocks.append(str(Advice(**record["advice"])))
    return blocks + [f"note: {warning}" for warning in record.get("warnings", ())]


def _map(record: Mapping[str, Any], kind: str, rows: Iterable[str]) -> Table:
    """A shaded line a token or role."""
    effect, low, high = (record[name][kind] for name in ("effect", "low", "high"))
    top = max(1e-3, *map(max, effect))
    cells = []
    for i, name in enumerate(rows):
        shades = "".join(SHADES[min(4, max(0, int(5 * e / top)))] for e in effect[i])
        at = max(range(len(effect[i])), key=effect[i].__getitem__)
        span = "[{}, {}]".format(*(figure(end[i][at], "+.3f") for end in (low, high)))
        cells.append([name, f"|{shades}|", effect[i][at], span, at])
    title = f"{kind}: {plots.TRACED[kind][0].format(record['window'])}; darkest {top:.3f}"
    columns: list[Column | str] = [
        "",
        Column("layers", code=True),
        Column("largest", "+.3f"),
        Column("95 %", align="right"),
        "at layer",
    ]
    return Table(columns, cells, title)


def _sweep(record: Mapping[str, Any]) -> list[Section]:
    head, rows, results = record["sweep"], record["rows"], sweep.results(record)
    what = number_of(results[0]["facts"], "fact") if results else "facts"
    compared = (
        f"sweep of {number_of(len(rows), 'setting')}"
        if any(row["settings"] for row in rows)
        else f"comparison of {number_of(len(rows), 'method')}"
    )
    title = f"{head['model']}: {compared} on {what} from {head['dataset']}"
    figure = None
    if results:
        names = prompts.apart([result["method"] for result in results])
        after = {name: one["evaluation"]["after"] for name, one in zip(names, results)}
        figure = plots.measures(after, results[0]["evaluation"]["before"])
    return [Section(title, [sweep.table(record)], figure)]


def _value(*path: str) -> Callable[[Mapping[str, Any]], Any]:
    """Reads a value of a layer's landscape by its path; None where the layer has none."""

    def read(layer: Mapping[str, Any]) -> Any:
        found: Any = layer["values"]
        for name in path:
            found = found.get(name) if found else None
        return found

    return read


def _mean(estimate: Mapping[str, float] | None) -> float | None:
    return None if estimate is None else estimate["mean"]


def grid(tables: Mapping[str, plots.Rates], title: str = "", *, explained: bool = False) -> Table:
    """Kinds and measures down, methods across, each cell a mean with its interval. `explained`:
    the notes say what they are.
    """
    measures: dict[str, dict[str, None]] = {}
    for table in tables.values():
        for kind, row in table.items():
            measures.setdefault(kind, {}).update(dict.fromkeys(row))
    rows = []
    for kind, measure in ((kind, name) for kind, names in measures.items() for name in names):
        found = [table.get(kind, {}).get(measure) for table in tables.values()]
        cells = [
            None
            if e is None
            else Estimate(e["mean"], e["low"], e["high"], int(e.get("records", 0)))
            for e in found
        ]
        rows.append([kind, measure, *cells])
    columns: list[Column | str] = ["", "measure"]
    columns += [Column(name, ".3f", "right") for name in tables]
    return Table(columns, rows, title, _legend(measures) if explained else ())


def _legend(measures: Mapping[str, Iterable[str]]) -> list[str]:
    """What the kinds of prompts and the measures of a table are."""
    known = fact_measures()
    kinds = [f"{kind}: {known[kind].about}" for kind in measures if kind in known]
    shown = {name for names in measures.values() for name in names}
    said = [f"{name}: {what}" for name, what in FIGURES.items() if name in shown]
    return [
        "; ".join(kinds) + ".",
        "; ".join(said) + ".",
        "Means over facts, with 95 % intervals; rates between 0 and 1.",
    ]


SECTIONS: dict[str, Callable[[Any], list[Section]]] = {
    protocols.RESULTS: _results,
    sweep.FILE: _sweep,
    subjects.FILE: _same_subject,
    "geometry.json": _geometry,
    "trace.json": _trace,
    "traces.json": _trace,
    "study.json": study.sections,
}
