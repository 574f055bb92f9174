"""Editing a mixture of experts that knows things: CounterFact written into routed experts.

No real mixture comes from a package index, so one is made: each MLP of the dense model is copied
into several experts behind a random router, whose gates add up to 1. It says what the dense model
says (checked), while its keys, gates, statistics and edits are those of a mixture: every expert
sees tokens of its own and is edited by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from knowedit.edits.edit import Edit
from knowedit.evaluation.evaluation import evaluate_each
from knowedit.facts.fact import Fact
from knowedit.facts.sets import data_dir, load
from knowedit.io.tables import Table
from knowedit.methods import MEMIT
from knowedit.methods.locate.targets import HiddenState
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.models.presets import preset_for
from knowedit.statistics import key_statistics

from . import common
from .quality import CORPUS, HELD_OUT

#: Largest relative difference of the mixture's logits from the dense model's.
SAME = 1e-3
SHOWN = ("success", "exact", "unchanged")


def copies(dense: EditableModel, experts: int, active: int, seed: int = 0) -> EditableModel:
    """The dense Llama with each MLP copied into `experts` experts, of which a random router picks
    `active` for a token.
    """
    old = dense.hf.config.to_dict()
    kept = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings rms_norm_eps rope_parameters hidden_act "
        "tie_word_embeddings pad_token_id bos_token_id eos_token_id"
    ).split()
    config = MixtralConfig(
        **{name: old[name] for name in kept if name in old},
        num_local_experts=experts,
        num_experts_per_tok=active,
        sliding_window=None,
    )
    hf: Any = MixtralForCausalLM(config)
    generator, given = torch.Generator().manual_seed(seed), dense.hf.state_dict()
    for name, parameter in hf.state_dict().items():
        mlp = f"{name.partition('.mlp.')[0]}.mlp."
        if name.endswith("experts.gate_up_proj"):
            parts = (given[f"{mlp}{part}_proj.weight"] for part in ("gate", "up"))
            parameter.copy_(torch.cat([*parts]).expand(parameter.shape))
        elif name.endswith("experts.down_proj"):
            parameter.copy_(given[f"{mlp}down_proj.weight"].expand(parameter.shape))
        elif ".mlp.gate." in name:
            parameter.normal_(0, 0.3, generator=generator)
        else:
            parameter.copy_(given[name])
    name = f"{experts} experts of {dense.name}"
    return EditableModel(hf.eval().requires_grad_(False), dense.tokenizer, name=name)


def difference(one: EditableModel, other: EditableModel) -> float:
    """Of their log-probabilities after some prompts, relative to the largest."""
    prompts = [fact.text for fact in load("embedded")[:8]]
    mine, theirs = one.next_logprobs(prompts), other.next_logprobs(prompts)
    return float((mine - theirs).abs().max() / theirs.abs().max())


def _kept(
    path: Path | None, mixture: EditableModel, facts: list[Fact], editor: MEMIT
) -> Edit | None:
    """The edit of an earlier run that was interrupted while it was measured; None where there is
    none of these facts and settings. Statistics are kept in the cache, or as checkpoints there.
    """
    if path is None or not path.exists():
        return None
    found = Edit.load(path)
    same = [fact.text for fact in found.facts] == [fact.text for fact in facts]
    same = same and found.fingerprint == mixture.fingerprint and found.method() == editor
    return found if same else None


def table(folder: Path) -> str:
    """What a batch edit did to facts, other wordings and neighbours; what it cost."""
    header, rows = common.read(folder, "moe")
    measured = [row for row in rows if row.get("measure", "").partition(" ")[2] in SHOWN]
    (last,) = (row for row in rows if "report" in row)
    lines = [
        [
            row["measure"],
            common.percent(row["unedited"]) if row["unedited"] is not None else "",
            f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
        ]
        for row in measured
    ]
    report, layers = last["report"], last["report"]["settings"]["layers"]
    counts = [n for layer in last["tokens_an_expert"] for n in layer]
    told = (
        f"{header['model']}, MEMIT in layer {', '.join(map(str, layers))}, {header['facts']} facts "
        f"in one edit, {header['tokens']:,} tokens of statistics ({min(counts):,.0f} to "
        f"{max(counts):,.0f} an expert), {last['seconds_a_fact']:.1f} CPU-s a fact. "
        f"Expert sets of later layers change for {percent_of(report, 'facts')} of the facts' "
        f"tokens, {percent_of(report, 'neighbours')} of the neighbours' and "
        f"{percent_of(report, 'text')} of ordinary text's."
    )
    heads = ["%", "unedited", "edited"]
    return "\n\n".join([told, Table(heads, lines).markdown(), common.measured_on(header)])


def percent_of(report: dict[str, Any], which: str) -> str:
    """A share of rerouted tokens."""
    return f"{100 * report['measured']['routing'][which]:.1f} %"


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("moe", __doc__, 1, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--limit", type=int, default=48, help="facts written at once")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the statistics")
    parser.add_argument(
        "--neighbours", type=int, default=None, help="prompts a fact (default: all)"
    )
    parser.add_argument(
        "--keep", type=Path, default=None, help="the edit's file; read again where it is there"
    )
    arguments = parser.parse_args(argv)
    count, tokens = arguments.limit, arguments.tokens
    if arguments.quick:
        count, tokens = 4, 8192
    facts = [
        replace(fact, neighbours=fact.neighbours[: arguments.neighbours])
        for fact in load("counterfact")[-HELD_OUT:][:count]
    ]
    dense = load_model(arguments.model, dtype=torch.float32)
    preset = preset_for(dense)
    mixture = copies(dense, arguments.experts, arguments.active)
    report = common.report(
        "moe", arguments, model=mixture.name, dataset="counterfact", facts=count, tokens=tokens
    )
    report.floor("the mixture", "agreement of logits", 1 - difference(mixture, dense), 1 - SAME)
    del dense
    corpus = (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    statistics = key_statistics(mixture, preset.layers, corpus, tokens, halves=False)
    editor = MEMIT(layers=preset.layers, target=HiddenState(**preset.values))
    edit = _kept(arguments.keep, mixture, facts, editor)
    if edit is None:
        start = time.process_time()
        edit = editor.compute(mixture, facts, statistics)
        edit.report.details["seconds"] = time.process_time() - start
        if arguments.keep is not None:
            edit.save(arguments.keep)
    seconds = edit.report.details["seconds"] / len(facts)
    found = evaluate_each(mixture, [edit] * len(facts), facts)
    for kind, measures in found.after.items():
        for measure, estimate in measures.items():
            was = found.before[kind].get(measure)
            before = None if was is None else was.mean
            report.note(
                f"{kind:14} {measure:12} {estimate}  unedited {before}",
                case="MEMIT",
                measure=f"{kind} {measure}",
                value=estimate.mean,
                low=estimate.low,
                high=estimate.high,
                unedited=before,
            )
    layer = str(preset.layers[-1])
    report.note(
        f"{seconds:.2f} CPU-s a fact, gain {edit.report.gain:.3f}, |delta| / |W| "
        f"{edit.report.relative_norm[layer]:.3f}; {edit.report.measured}",
        case="MEMIT",
        seconds_a_fact=seconds,
        report=edit.report.record(),
        tokens_an_expert=[statistics[at].counts for at in preset.layers],
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
