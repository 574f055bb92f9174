"""`knowedit inspect`: what is in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowedit.edits import edit, history
from knowedit.edits.export import folder as checkpoint
from knowedit.errors import ConfigError, KnowEditError
from knowedit.facts.fact import Fact
from knowedit.facts.sets import load
from knowedit.io.files import is_safetensors
from knowedit.io.lines import number_of
from knowedit.io.tensors import format_of, read_file, understood
from knowedit.methods.learned.mend import network as mend_network
from knowedit.methods.learned.serac import memory as memory_edit
from knowedit.methods.learned.serac import network as serac_network
from knowedit.statistics.files import npz, store

FACT_FILES = (".jsonl", ".json", ".csv")
SHOWN = 12  # facts and changed weights listed


@dataclass(frozen=True)
class Seen:
    """What is in a file.

    Attributes:
        kind: edit, history, statistics, network, edited model, facts, or peer's statistics.
        record: the same as JSON has it.
    """

    kind: str
    text: str
    record: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"kind": self.kind, **self.record}


def describe(path: Path, strict: bool = False) -> Seen:
    """A summary of a file of ours: an edit, a history, statistics, a network, an edited model's
    folder; and of files of facts and of a peer's statistics.

    Args:
        strict: refuse facts of which a record cannot be edited.

    Raises:
        KnowEditError: it is none of these, or damaged.
    """
    if path.is_dir():
        return _folder(path)
    ours = is_safetensors(path)
    if path.suffix == ".npz" and not ours:
        return _peer(path)
    if path.name.removesuffix(".gz").endswith(FACT_FILES) and not ours:
        return _facts(path, strict)
    kind = format_of(path)
    for formats, show in SHOWN_AS.items():
        if kind in formats:
            with understood(path, "a file", KnowEditError):
                return show(path)
    raise KnowEditError(f"{path} is a safetensors file, but not one of ours")


def _folder(path: Path) -> Seen:
    """A folder that `knowedit apply` wrote."""
    header, tensors, _ = checkpoint.read_record(checkpoint.record_of(path))
    lines = [f"edited model, from {header['model']} (fingerprint {header['fingerprint']})"]
    for made in header["edits"]:
        lines.append(f"  {made['method']} {made['key']}")
        lines += [f"    {_fact(fact)}" for fact in made["facts"]]
    lines.append(f"  undo restores: {', '.join(sorted(tensors))}")
    record = {key: header[key] for key in ("model", "fingerprint", "edits")}
    return Seen("edited model", "\n".join(lines), {**record, "restores": sorted(tensors)})


def _facts(path: Path, strict: bool) -> Seen:
    """A file of facts, whichever format it is of."""
    facts = load(str(path), strict=strict)
    subjects = len({fact.subject.casefold() for fact in facts})
    beside = {
        "paraphrase": sum(len(fact.paraphrases) for fact in facts),
        "neighbour": sum(len(fact.neighbours) for fact in facts),
        "portability prompt": sum(len(fact.portability) for fact in facts),
    }
    asked = ", ".join(number_of(count, what) for what, count in beside.items() if count)
    lines = [
        f"facts: {len(facts):,}, of {number_of(subjects, 'subject')}; beside them "
        f"{asked or 'no prompts: what else moves cannot be measured'}",
        *map(_line, facts[:SHOWN]),
    ]
    more = len(facts) - SHOWN
    lines += [f"  ... and {more} more"] if more > 0 else []
    idle = sum(fact.says(p.answer or "") for fact in facts for p in fact.neighbours)
    if idle:
        lines.append(
            f"  note: {number_of(idle, 'neighbour')} not asked: the new answer is their own, which "
            "an edit cannot have brought to them"
        )
    return Seen("facts", "\n".join(lines), {"facts": [fact.to_dict() for fact in facts]})


def _peer(path: Path) -> Seen:
    """Statistics of another program."""
    found = npz.read(path)
    text = (
        f"a peer's key statistics of {found.module}, {found.count:,} tokens\n"
        f"  take them over with: knowedit stats import MODEL {path}"
    )
    return Seen("peer's statistics", text, {"module": found.module, "tokens": found.count})


def _fact(fact: dict[str, Any]) -> str:
    return f"{fact['prompt'].replace('{}', fact['subject'])} -> {fact['target']}"


def _line(fact: Fact) -> str:
    return f"  {_fact(fact.to_dict())}"


def _edit(made: edit.Edit) -> Seen:
    lines = [
        f"{made.method_name} edit {made.key}",
        f"  model fingerprint  {made.fingerprint}",
        f"  facts              {len(made.facts)}",
        *(f"  {_line(fact)}" for fact in made.facts[:20]),
        *_layers(made),
        *_weights(made),
    ]
    if made.config:
        lines.append(f"  made by            {_method(made)}")
    if made.software:
        versions = ", ".join(f"{name} {version}" for name, version in made.software.items())
        lines.append(f"  with               {versions}")
    lines += [f"  note: {warning}" for warning in made.warnings]
    record = {
        "key": made.key,
        "fingerprint": made.fingerprint,
        "facts": [fact.to_dict() for fact in made.facts],
        "weights": {name: change.rank or None for name, change in made.changes.items()},
        "config": made.config,
        "software": made.software,
        "report": made.report.to_dict(),
        "notes": list(made.warnings),
    }
    return Seen("edit", "\n".join(lines), record)


def _history(path: Path) -> Seen:
    edits = [_edit(made) for made in history.History.load(path).edits]
    record = {"edits": [made.record for made in edits]}
    return Seen("history", "\n\n".join(made.text for made in edits), record)


def _layers(made: edit.Edit) -> list[str]:
    norms = made.report.relative_norm
    return [
        f"  layer {layer:<3}          gain {chosen['gain']:.3f}"
        + (f", |delta|/|W| {norms[layer]:.3f}" if layer in norms else "")
        for layer, chosen in made.report.layers.items()
    ]


def _weights(made: edit.Edit) -> list[str]:
    """The first changed weights, and how many more there are."""
    ranks = {
        name: f"rank {change.rank}" if change.rank else f"dense {list(change.dense().shape)}"
        for name, change in list(made.changes.items())[:SHOWN]
    }
    more = len(made.changes) - len(ranks)
    lines = [f"  {name}  {rank}" for name, rank in ranks.items()]
    return lines + ([f"  ... and {more} more weights"] if more else [])


def _method(made: edit.Edit) -> str:
    """Its settings that are not the defaults, or its name where they were objects."""
    try:
        return repr(made.method())
    except ConfigError:
        return str(made.config["kind"])


def _network(path: Path) -> Seen:
    header, _ = read_file(path, (mend_network.FORMAT, serac_network.FORMAT), "a network")
    report, kind = header["report"], header["format"].partition("/")[0]
    name = kind.removeprefix("knowedit-").upper()
    lines = [
        f"{name} network",
        f"  model fingerprint  {header['fingerprint']}",
        f"  trained on         {report['facts']['training']} facts, {report['seconds']:.0f} s",
        f"  parameters         {report['trainable_parameters']:,}",
        f"  validation         {report['validation']}",
    ]
    record = {"network": name, "fingerprint": header["fingerprint"], "report": report}
    return Seen("network", "\n".join(lines), record)


def _statistics(path: Path) -> Seen:
    found = store.LayerStatistics.load(path)
    recipe, corpus = found.recipe, found.recipe.corpus.get("name")
    counted = "" if recipe.skip_first else " (first tokens included)"
    lines = [
        f"key statistics of {found.module}, {found.model}",
        f"  model fingerprint  {recipe.fingerprint}",
        f"  tokens             {found.count:,} from {corpus}, pieces of at most "
        f"{recipe.max_length}",
        f"  trace of C         {found.energy:.6g}",
        *_experts(found.counts),
        f"  first/other norm   {found.first_ratio:.2f}{counted}",
        *(f"  {name:18} {v}" for name, v in found.extra.items() if name != "convergence"),
        *_errors(found.extra.get("convergence", [])),
    ]
    return Seen("statistics", "\n".join(lines), store.header(path))


def _experts(counts: Sequence[int]) -> list[str]:
    """How unevenly a router used its experts."""
    if not counts:
        return []
    return [f"  {len(counts)} experts         {min(counts):,} to {max(counts):,} tokens each"]


def _errors(checks: list[dict[str, Any]]) -> list[str]:
    """How well it has converged, by the last check."""
    last = checks[-1] if checks else {}
    return [
        f"  {'error of ' + name:18} ±{last[name][0]:.1%} (quartiles {last[name][1]:.1%} to "
        f"{last[name][2]:.1%})"
        for name in ("solve", "null_space")
        if name in last
    ]


#: How each format of ours is shown.
SHOWN_AS: dict[tuple[str, ...], Callable[[Path], Seen]] = {
    (edit.FORMAT, *edit.EARLIER, memory_edit.FORMAT, *memory_edit.EARLIER): lambda path: _edit(
        edit.Edit.load(path)
    ),
    (history.FORMAT, *history.EARLIER): _history,
    (mend_network.FORMAT, serac_network.FORMAT): _network,
    (store.FORMAT, store.FORMAT_EXPERTS): _statistics,
}
