"""What a careful user wants to know before trusting an edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from knowedit.edits.changes import relative_norms
from knowedit.edits.report import EditReport
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.lines import named, number_of
from knowedit.methods.locate.task import Task, WrittenLayers
from knowedit.methods.locate.values import Targets, prompt_rows
from knowedit.models.calibration import sinks_of
from knowedit.models.editable import EditableModel
from knowedit.models.families.preset import Preset
from knowedit.models.sinks import SINK_RATIO
from knowedit.statistics.experts import ENOUGH

LARGE_NORM = 0.8


def first_token_warnings(
    model: EditableModel, facts: Sequence[Fact], contexts: Sequence[str], allowed: bool
) -> list[str]:
    """Facts whose bare prompt has its subject at position 0, where the attention sink sits.

    Raises:
        EditError: no context puts anything in front of such a subject, and this is not allowed.
    """
    at_start = [fact.subject for fact in facts if model.row(fact.prompt, fact.subject).subject == 0]
    if not at_start:
        return []
    lone = [
        f.subject
        for f in facts
        if f.subject in at_start and prompt_rows(model, f, contexts)[0].subject == 0
    ]
    if lone and not allowed:
        raise EditError(
            f"subject {lone[0]!r} is the very first token, where a causal model keeps its "
            f"attention sink, in every context: "
            "add one with words in front to target.contexts, or pass allow_sinks=True"
        )
    return [
        f"{number_of(len(at_start), 'subject')} at the prompt's very first token "
        f"({', '.join(map(repr, at_start[:3]))}), where a causal "
        "model keeps its attention sink; their keys and values are taken from the prompts with "
        "a context in front"
    ]


#: Where the settings of a preset come from that was not measured on the model.
_ORIGINS = {
    "published": "are those published for this shape",
    "shape": "were calibrated on another model of this shape",
    "rule of thumb": "follow a rule of thumb (a sixth of the depth, no attention sink)",
}


def origin_warnings(model: EditableModel, preset: Preset, layers: Sequence[int]) -> list[str]:
    """One line for a model that nothing was measured on: where its settings come from, and how to
    measure them.
    """
    if preset.measured:
        return []
    return [
        f"{model.name} is not calibrated: {named('layer', layers)} and the value settings "
        f"{_ORIGINS[preset.origin]}; `knowedit calibrate {model.source}` measures them"
    ]


def sink_warnings(model: EditableModel, layers: Sequence[int], allowed: bool) -> list[str]:
    """A warning for each layer on an attention sink. Raises EditError when they are not allowed."""
    sinks, warnings = sinks_of(model), []
    for layer in filter(sinks.at, layers):
        warning = (
            f"layer {layer} carries an attention sink (its MLP writes {sinks.written[layer]:.0f} "
            f"times the median length at some token, limit {SINK_RATIO:.0f})"
        )
        if not allowed:
            raise EditError(f"{warning}; choose another layer, or pass allow_sinks=True")
        warnings.append(warning)
    return warnings


def rare_warnings(task: Task, written: WrittenLayers) -> list[str]:
    """A warning for each layer in which experts are edited that the statistics have hardly seen."""
    found = []
    for layer, (_, right) in written.factors.items():
        experts = task.model.layout.experts(layer)
        if experts is None or layer not in task.statistics.layers:
            continue
        routed = right[: experts.count * experts.width].split(experts.width)
        edited = {e for e, part in enumerate(routed) if bool(part.any())}
        if seldom := sorted(edited & set(task.statistics.rare_experts(layer))):
            found.append(
                f"layer {layer}: {len(seldom)} of {len(edited)} edited experts were given fewer "
                f"than {ENOUGH * experts.width} tokens in the statistics (experts "
                f"{', '.join(map(str, seldom[:5]))}), and are held by the mean of all experts; "
                "collect more tokens"
            )
    return found


def planned(task: Task, targets: Targets, written: WrittenLayers) -> dict[int, Tensor]:
    """`{layer: [facts, hidden]}` what the write was to add at each fact's lookup token: its value,
    or what a training made of it.
    """
    owner = [number for number, group in enumerate(task.groups) for _ in group]
    if written.report.get("look_ahead", {}).get("used"):
        return {layer: left.T[owner] for layer, (left, _) in written.factors.items()}
    values = targets.of_layers()[owner]
    return dict(zip(task.layers[-values.shape[1] :], values.unbind(1)))


def outcome(
    settings: dict[str, Any], task: Task, targets: Targets, written: WrittenLayers
) -> EditReport:
    """What was planned and what came of it, for `Edit.report`."""
    norms = relative_norms(task.model, written.factors)
    anchored = {} if targets.norm is None else {"anchored_norm": float(targets.norm[0])}
    report = EditReport(
        gain=min(entry["gain"] for entry in written.layers.values()),
        relative_norm={str(layer): norm for layer, norm in norms.items()},
        layers=written.layers,
        planned_nll=float(targets.nll.mean()),
        steps=targets.steps.tolist(),
        details={"settings": settings, **written.report, **anchored},
    )
    rare = rare_warnings(task, written)
    report.warnings = [*task.warnings, *rare, *outcome_warnings(report, targets, task.groups)]
    return report


def outcome_warnings(
    report: EditReport, targets: Targets, groups: Sequence[Sequence[Fact]]
) -> list[str]:
    """What a careful user wants to know before trusting the edit."""
    warnings = []
    merged = [group[0].subject for group in groups if len(group) > 1]
    if merged:
        warnings.append(
            f"the facts of {number_of(len(merged), 'subject')} share one value"
            f"{' each' * (len(merged) > 1)} "
            f"({', '.join(merged[:3])}{', ...' if len(merged) > 3 else ''})"
        )
    sinks = [] if targets.sink is None else targets.sink.nonzero()[:, 0].tolist()
    if sinks:
        named = ", ".join(repr(groups[i][0].subject) for i in sinks[:3])
        warnings.append(
            f"{number_of(len(sinks), 'subject')} ({named}) at an attention sink of the prompt "
            "itself: the value is held to the length of the states behind other words, and may "
            "not be said without any; put some in front of the prompt"
        )
    ahead = report.details.get("look_ahead", {})
    if ahead.get("used") and ahead["after"]["realised"] > 1.0:
        warnings.append(
            f"the answers end at an NLL of {ahead['after']['realised']:.1f}; more steps or a "
            "larger clamp may help"
        )
    for layer, norm in report.relative_norm.items():
        if norm > LARGE_NORM:
            warnings.append(
                f"layer {layer} changes by {norm:.0%} of its own norm; spread over more layers "
                f"or edit fewer facts at once"
            )
    worst = int(targets.nll.argmax())
    if float(targets.nll[worst]) > 1.0:
        warnings.append(
            f"the value of {groups[worst][0].subject!r} did not converge (NLL "
            f"{float(targets.nll[worst]):.1f}); "
            "more steps or a larger clamp may help"
        )
    return warnings
