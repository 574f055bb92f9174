"""Editing mixtures of experts that know things: CounterFact written into routed experts.

Three mixtures are made from the dense model (`benchmarks.mixtures`). The copies, in Mixtral's and
in gpt-oss's layout, say what it says (checked), while their keys, gates, statistics and edits are
those of a mixture: every expert sees tokens of its own and is edited by itself. The slices beside a
shared expert are another model, whose perplexity is stated.

MoEEdit's own code edits the copies beside ours, where a folder with it is named (`--moeedit`).

A run goes on with the results file: what other methods did to the same mixture and facts is kept.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowedit.edits.changes import changes_of, factors_of
from knowedit.edits.edit import Edit
from knowedit.edits.measured import measure, outputs
from knowedit.errors import KnowEditError
from knowedit.evaluation.evaluation import evaluate_each
from knowedit.evaluation.measures.perplexity import perplexity
from knowedit.facts.fact import Fact
from knowedit.facts.sets import data_dir, load
from knowedit.io.tables import Table
from knowedit.methods import MEMIT, Method, NeuronPatch
from knowedit.methods.locate.targets import HiddenState
from knowedit.methods.locate.values import DEFAULT_CONTEXTS, prompt_rows
from knowedit.methods.neurons.texts import chosen
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.models.presets import preset_for
from knowedit.statistics import KeyStatistics, key_statistics
from knowedit.statistics.corpus.corpus import Corpus

from . import common, mixtures, moeedit
from .quality import CORPUS, HELD_OUT

#: Largest relative difference of the copies' logits from the dense model's.
SAME = 1e-3
SHOWN = ("success", "exact", "unchanged")
#: The results file of each mixture.
RESULTS = {"copies": "moe", "gpt-oss": "moe_gpt_oss", "slices": "moe_slices"}
#: The case of rows that say where the router sends other wordings.
ROUTING = "wordings' experts"
METHODS = ("memit", "neuron-patch")
#: Documents that routers are fitted on; perplexity is of the next ones.
FITTED = 24


def made(kind: str, dense: EditableModel, experts: int, active: int) -> EditableModel:
    """The mixture of that kind."""
    if kind == "slices":
        return mixtures.slices(dense, documents()[:FITTED], experts, active)
    make = mixtures.copies if kind == "copies" else mixtures.in_gpt_oss
    return make(dense, experts, active)


def documents(count: int = 2 * FITTED) -> list[str]:
    """The first ones of the corpus."""
    found = Corpus.parse(str(corpus())).documents()
    return [text for text, _ in zip(found, range(count), strict=False)]


def corpus() -> Path:
    """Where ordinary text comes from."""
    return (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS


def difference(one: EditableModel, other: EditableModel) -> float:
    """Of their log-probabilities after some prompts, relative to the largest."""
    prompts = [fact.text for fact in load("embedded")[:8]]
    mine, theirs = one.next_logprobs(prompts), other.next_logprobs(prompts)
    return float((mine - theirs).abs().max() / theirs.abs().max())


def _kept(
    path: Path | None, mixture: EditableModel, facts: list[Fact], editor: Method
) -> Edit | None:
    """The edit of an earlier run that was interrupted while it was measured; None where there is
    none of these facts and settings. Statistics are kept in the cache, or as checkpoints there.
    """
    if path is None or not path.exists() or not _took(path).exists():
        return None
    found = Edit.load(path)
    same = [fact.text for fact in found.facts] == [fact.text for fact in facts]
    same = same and found.fingerprint == mixture.fingerprint and found.method() == editor
    return found if same else None


def _took(path: Path) -> Path:
    """Where the CPU seconds of a kept edit are."""
    return path.with_suffix(".seconds")


def prepare(
    model: EditableModel, layers: Sequence[int], tokens: int
) -> tuple[KeyStatistics, float]:
    """Statistics of some layers, collected anew and factored, and the CPU seconds of both."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        found = key_statistics(model, layers, corpus(), tokens, halves=False, directory=folder)
        for layer in layers:
            found.metric(layer)
        return found, time.process_time() - start


def planned(
    editor: MEMIT, model: EditableModel, statistics: KeyStatistics, edit: Edit
) -> tuple[Tensor, float]:
    """`[facts, hidden]` what an edit of one layer was to add at each of its facts, a value a fact:
    its left factor; and the CPU seconds of everything but the values, its write done once more.
    """
    (layer,) = editor.statistics_layers(model)
    factors = factors_of(model, edit.changes, layer)
    assert factors is not None and factors[0].shape[1] == len(edit.facts)
    wanted = factors[0].T
    task = editor.prepare(model, [[fact] for fact in edit.facts], statistics, progress=False)
    start = time.process_time()
    found = editor.keys.at(task, layer, of_mlp=task.of_mlp)
    solver, _ = editor.metric.solver(statistics, layer, found.keys.T)
    changes_of(model, {layer: (wanted.T, found.add_up(solver.A).T.float())})
    return wanted, time.process_time() - start


def rerouted(
    model: EditableModel, facts: Sequence[Fact], layer: int, contexts: Sequence[str]
) -> dict[str, float]:
    """Shares of the gates at the facts' other wordings that go to the experts which fire at a
    fact's prompt: to the one with the largest gates, to those of the bare prompt, to those of the
    prompt in all contexts; how many experts these are, and at how many wordings the first is none.
    """
    own = chosen(
        model, [row for fact in facts for row in prompt_rows(model, fact, contexts)], layer
    )
    own = own.unflatten(0, (len(facts), -1))  # [facts, contexts, E]
    others = [(i, text) for i, fact in enumerate(facts) for text in fact.paraphrases]
    rows = [model.row(text, facts[i].subject) for i, text in others]
    gates, whose = chosen(model, rows, layer), torch.tensor([i for i, _ in others])
    gates = gates / gates.sum(1, keepdim=True)
    first = gates.gather(1, own.sum(1).argmax(1)[whose, None])[:, 0]
    fired = own.gt(0)
    return {
        "first": float(first.mean()),
        "prompt": float((gates * fired[whose, 0]).sum(1).mean()),
        "contexts": float((gates * fired.any(1)[whose]).sum(1).mean()),
        "experts": float(fired.any(1).sum(1).double().mean()),
        "without": float(first.eq(0).double().mean()),
    }


def judge(
    report: common.Report, case: str, model: EditableModel, edit: Edit, facts: list[Fact]
) -> None:
    """What the edit did, a row a measure."""
    found = evaluate_each(model, [edit] * len(facts), facts)
    for kind, measures in found.after.items():
        for measure_, estimate in measures.items():
            was = found.before[kind].get(measure_)
            before = None if was is None else was.mean
            report.note(
                f"{case}: {kind:14} {measure_:12} {estimate}  unedited {before}",
                case=case,
                measure=f"{kind} {measure_}",
                value=estimate.mean,
                low=estimate.low,
                high=estimate.high,
                unedited=before,
            )


def table(folder: Path) -> str:
    """What a batch edit did to facts, other wordings and neighbours; what it cost: every mixture
    that was measured.
    """
    there = [name for name in RESULTS.values() if (folder / f"{name}.jsonl").exists()]
    return "\n\n".join(_one(folder, name) for name in there)


def _one(folder: Path, name: str) -> str:
    header, rows = common.read(folder, name)
    measured = [row for row in rows if row.get("measure", "").partition(" ")[2] in SHOWN]
    cases = list(dict.fromkeys(row["case"] for row in measured))
    by_measure: dict[str, dict[str, Any]] = {}
    for row in measured:
        by_measure.setdefault(row["measure"], {})[row["case"]] = row
    lines = []
    for what, found in by_measure.items():
        unedited = next(iter(found.values()))["unedited"]
        lines.append([what, "" if unedited is None else common.percent(unedited)])
        lines[-1] += [
            f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            for row in (found[case] for case in cases)
        ]
    costs = [_costs(rows, case) for case in cases]
    told = [
        f"**{header['model']}**: {header['facts']} facts in one edit, {header['tokens']:,} tokens "
        "of statistics."
    ]
    told += [_perplexities(rows), *map(_told, costs), *map(_rerouted, rows)]
    heads = ["%", "unedited", *cases]
    text = " ".join(part for part in told if part)
    kind = next(kind for kind, file in RESULTS.items() if file == name)
    told_of = {**header, "benchmark": f"moe --kind {kind}"}
    where = common.measured_each(told_of, [(row["case"], row) for row in costs])
    return "\n\n".join([text, Table(heads, lines).markdown(), where])


def _costs(rows: list[dict[str, Any]], case: str) -> dict[str, Any]:
    """The row that says what an edit cost and how it was measured."""
    return next(row for row in rows if row.get("case") == case and "report" in row)


def _perplexities(rows: list[dict[str, Any]]) -> str:
    """Of the dense model and the mixture, where they differ."""
    found = next((row for row in rows if "perplexity" in row), None)
    if found is None:
        return ""
    return (
        f"Perplexity of text that its routers were not fitted on: {found['perplexity']:.1f}, the "
        f"dense model's {found['dense']:.1f}."
    )


def _rerouted(row: dict[str, Any]) -> str:
    """What a row of `rerouted` says; nothing of any other."""
    if row.get("case") != ROUTING:
        return ""
    return (
        f"Layer {row['layer']}, other wordings: the expert that fires most at a fact's prompt has "
        f"{100 * row['first']:.0f} % of the gates, and none at {100 * row['without']:.0f} % of "
        f"them; the experts of the bare prompt have {100 * row['prompt']:.0f} %, those of the "
        f"prompt in three contexts ({row['experts']:.1f} of them) {100 * row['contexts']:.0f} %."
    )


def _told(row: dict[str, Any]) -> str:
    """One case in words."""
    at = row["report"].get("settings", {}).get("layers", ())
    parts = [f"{row['case']}{', layer ' if at else ''}{', '.join(map(str, at))}:"]
    if counts := [n for layer in row.get("tokens_an_expert", ()) for n in layer]:
        parts.append(f"{min(counts):,.0f} to {max(counts):,.0f} tokens an expert,")
    if "seconds_a_fact" in row:
        parts.append(f"{row['seconds_a_fact']:.1f} CPU-s a fact,")
    if "write" in row:
        parts.append(f"{row['write']:.2f} CPU-s for the write alone,")
    if "prepared" in row:
        parts.append(f"{row['prepared']:.1f} for its statistics and their factors,")
    if "kept" in row:
        parts.append(
            f"{row['projections']:.0f} for its statistics and null spaces, which keep "
            f"{100 * row['kept']:.1f} % of the directions,"
        )
    shares = ", ".join(
        f"{percent_of(row['report'], which)} of {whose}"
        for which, whose in (
            ("facts", "the facts' tokens"),
            ("neighbours", "the neighbours'"),
            ("text", "ordinary text's"),
        )
    )
    return " ".join([*parts, f"expert sets of later layers change for {shares}."])


def percent_of(report: dict[str, Any], which: str) -> str:
    """A share of rerouted tokens."""
    return f"{100 * report['measured']['routing'][which]:.1f} %"


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("moe", __doc__, 1, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--kind", choices=RESULTS, default="copies", help="of mixture")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument(
        "--method", action=common.Repeated, choices=METHODS, default=["memit"], help="(repeatable)"
    )
    parser.add_argument("--active", type=int, default=None, help="a token (default: 2, slices 4)")
    parser.add_argument("--limit", type=int, default=48, help="facts written at once")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the statistics")
    parser.add_argument(
        "--neighbours", type=int, default=None, help="prompts a fact (default: all)"
    )
    parser.add_argument("--shared", action="store_true", help="edit the shared expert")
    parser.add_argument(
        "--moeedit", type=Path, default=None, help="folder with MoEEdit's code: edit with it too"
    )
    parser.add_argument(
        "--keep", type=Path, default=None, help="folder for the edits, each read again if there"
    )
    arguments = parser.parse_args(argv)
    if arguments.moeedit is not None and arguments.kind != "copies":
        parser.error("--moeedit goes with --kind copies, whose layout its code can be shown")
    if arguments.shared and arguments.kind != "slices":
        parser.error("--shared goes with --kind slices, which have a shared expert")
    if "memit" not in arguments.method and arguments.moeedit:
        parser.error("--moeedit goes with --method memit")
    count, tokens = arguments.limit, arguments.tokens
    if arguments.quick:
        count, tokens = 4, 8192
    facts = [
        replace(fact, neighbours=fact.neighbours[: arguments.neighbours])
        for fact in load("counterfact")[-HELD_OUT:][:count]
    ]
    dense = load_model(arguments.model, dtype=torch.float32)
    layers, values = preset_for(dense).layers, preset_for(dense).values
    active = arguments.active or (4 if arguments.kind == "slices" else 2)
    mixture = made(arguments.kind, dense, arguments.experts, active)
    report = common.report(
        RESULTS[arguments.kind],
        arguments,
        model=mixture.name,
        dataset="counterfact",
        facts=count,
        tokens=tokens,
    )
    kept = _kept_rows(report.output)  # before the first new row takes their place
    if arguments.kind == "slices":
        text = documents()[FITTED:]
        apart = {"perplexity": perplexity(mixture, text), "dense": perplexity(dense, text)}
        _check_alike(kept, apart["perplexity"])
        report.note(f"perplexity {apart['perplexity']:.2f}, dense {apart['dense']:.2f}", **apart)
    else:
        same = 1 - difference(mixture, dense)
        report.floor("the mixture", "agreement of logits", same, 1 - SAME)
    for layer in (*layers, preset_for(mixture).neuron_layer):
        found = rerouted(mixture, facts, layer, DEFAULT_CONTEXTS)
        said = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        report.note(f"{ROUTING}, layer {layer}: {said}", case=ROUTING, layer=layer, **found)
    del dense
    memit = MEMIT(layers=layers, target=HiddenState(**values))
    editors: dict[str, Method] = {"MEMIT": memit} if "memit" in arguments.method else {}
    if "neuron-patch" in arguments.method:
        editors[NeuronPatch.name] = NeuronPatch(corpus=corpus())
    if arguments.shared:
        editors = {
            f"{name}, shared expert": editor.with_settings({"experts": "shared"})
            for name, editor in editors.items()
        }
    others = [*editors, "MoEEdit"] if arguments.moeedit else [*editors]
    report.rows[1:1] = _earlier(report, kept, without=others)
    for case, editor in editors.items():
        seen = editor.view(mixture) if isinstance(editor, MEMIT) else mixture
        statistics, prepared = (
            prepare(seen, layers, tokens) if isinstance(editor, MEMIT) else (None, None)
        )
        path = arguments.keep and arguments.keep / f"{case}.edit.safetensors"
        edit = _kept(path, mixture, facts, editor)
        if edit is None:
            start = time.process_time()
            edit = editor.compute(mixture, facts, statistics)
            took = time.process_time() - start
            if path is not None:
                _took(path).write_text(str(took), "utf-8")
                edit.save(path)
        else:
            took = float(_took(path).read_text("utf-8"))
        judge(report, case, mixture, edit, facts)
        seconds = took / len(facts)
        costs: dict[str, Any] = {"environment": common.environment()}
        if isinstance(editor, MEMIT) and statistics is not None:
            wanted, write = planned(editor, seen, statistics, edit)
            counts = [statistics[at].counts for at in layers]
            costs |= {"write": write, "prepared": prepared, "tokens_an_expert": counts}
        report.note(
            f"{case}: {seconds:.2f} CPU-s a fact, gain {edit.report.gain:.3f}; "
            f"{edit.report.measured}",
            case=case,
            seconds_a_fact=seconds,
            report=edit.report.record(),
            **costs,
        )
        if arguments.moeedit is not None:
            beside(report, arguments.moeedit, mixture, layers[-1], facts, wanted, tokens)
    return report.finish()


def _kept_rows(path: Path | None) -> list[dict[str, Any]]:
    """Header and rows of an earlier run's file; none where there is none."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _check_alike(kept: list[dict[str, Any]], perplexity: float) -> None:
    """Raise KnowEditError where the earlier rows are of other slices: routers are fitted anew by
    each run, and another processor's are not the same.
    """
    for row in kept[1:]:
        if abs(row.get("perplexity", perplexity) / perplexity - 1) > SAME:
            raise KnowEditError(
                "the results file is of other slices, of perplexity "
                f"{row['perplexity']:.2f}, these have {perplexity:.2f}; give another --output"
            )


def _earlier(
    report: common.Report, kept: list[dict[str, Any]], without: Sequence[str]
) -> list[dict[str, Any]]:
    """Of an earlier run's header and rows those rows that are of the same mixture and facts, but
    for those of some cases; the report keeps its header.
    """
    same = ("model", "dataset", "facts", "tokens")
    if not kept or any(kept[0].get(name) != report.rows[0][name] for name in same):
        return []
    report.rows[0] = kept[0]
    new = {row.get("case") for row in report.rows[1:]}
    return [row for row in kept[1:] if row.get("case") and row["case"] not in {*without, *new}]


def beside(
    report: common.Report,
    folder: Path,
    model: EditableModel,
    layer: int,
    facts: list[Fact],
    wanted: Tensor,
    tokens: int,
) -> None:
    """MoEEdit's own code, given what the other edit was to add at the same facts."""
    texts: list[str] = []
    left = tokens
    for text in Corpus.parse(str(corpus())).documents():
        texts.append(text)
        left -= min(len(model.row(text[:20_000]).ids), 1024)  # it cuts documents there
        if left <= 0:
            break
    targets = outputs(model, facts, layer) + wanted
    found = moeedit.edited(folder, model, layer, facts, targets, texts)
    judge(report, "MoEEdit", model, found.edit, facts)
    found.edit.report.add_measured(measure(model, found.edit))
    report.note(
        f"MoEEdit: projections {found.projections:.1f} CPU-s, keep {found.kept:.2%} of the "
        f"directions; write {found.write:.2f} CPU-s; {found.edit.report.measured}",
        case="MoEEdit",
        environment=common.environment(),
        write=found.write,
        projections=found.projections,
        kept=found.kept,
        report=found.edit.report.record(),
    )


if __name__ == "__main__":
    sys.exit(main())
