"""Is the covariance trap real for this model and layer? Activation drift, read-in vectors and
tolerance, measured.

RoSE (arXiv 2603.15518) blames lost recall under rephrasing on two things: the covariance amplifies
the drift of the subject's key, and jointly optimised values tolerate little. Its definitions are
not public; these are ours (`docs/geometry.md`). One fact written at key k by a metric M reads in
along ``a = M⁻¹k / kᵀM⁻¹k``, so that at the key k' of another prompt form the share ``aᵀk'`` of the
planned shift is realised, and with ``eps = k' - k``

* amplification ``kappa = |a| |k|`` (1 for the identity: the least worst-case deviation);
* deviation: root mean square of ``aᵀeps``;   rho = its square over the identity's, which exceeds 1
    where the metric harms;
* drift of an edit: ``D = |Delta k' - r| / |r|`` with r planned, and ``A = |h' - h| / |h|`` of the
    edited layer's outputs;
* tolerance, gradient cosines and curvature of the values: `curvature.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.evaluation import intervals
from knowedit.evaluation.geometry.curvature import Landscape, landscape
from knowedit.evaluation.intervals import Estimate
from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import Form, held_out_forms
from knowedit.io.config import Config
from knowedit.io.lines import named
from knowedit.io.ranges import Share
from knowedit.methods.locate.targets import HiddenState
from knowedit.methods.locate.task import Runtime
from knowedit.methods.locate.values import ValueSettings
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.models.presets import preset_for
from knowedit.statistics import KeyStatistics
from knowedit_kernels import EditSolver, Identity, NullSpace, weight_for_gain
from knowedit_kernels.solver import Metric

#: C: covariance (ROME, MEMIT); P: null space (AlphaEdit); I: identity (RoSE's isotropic part
#: alone).
METRICS = ("C", "P", "I")
OTHER = "other cloze"  # the clozes of the subject's other facts
THRESHOLD = 2e-2  # AlphaEdit's published eigenvalue threshold
GAIN = 0.95  # of each metric's edit, so that the three are compared at equal strength


@dataclass(frozen=True)
class GeometryMethod(Config):
    """How the values are found, and how strongly each metric writes them.

    Attributes:
        target: what finds the values.
        gain: of each metric's edit.
    """

    target: HiddenState = field(default_factory=HiddenState)
    gain: Share = GAIN


def read_in(metric: Metric, keys: Tensor) -> Tensor:
    """``a = M⁻¹k / kᵀM⁻¹k`` of every key: `[m, n]` columns to `[m, n]` float64; ``aᵀk = 1``."""
    found = metric.inverse(keys)
    return found / (found * metric.columns(keys)).sum(0)


def amplification(metric: Metric, keys: Tensor) -> Tensor:
    """``kappa = |a| |k|`` of every key `[m, n]`: `[n]`, at least 1; 1 / cos(k, M⁻¹k), for a
    projector |k| / |Pk|.
    """
    return read_in(metric, keys).norm(dim=0) * metric.columns(keys).norm(dim=0)


@dataclass(frozen=True)
class FormDrift:
    """How far the keys of one prompt form lie from the edited ones at one layer, and what each
    metric makes of it.

    Attributes:
        texts: how many; moved: mean ``|eps| / |k|``; cosine: mean cos(k', k).
        gain: `{metric: mean aᵀk'}`; deviation: `{metric: rms of aᵀeps}`.
        rho: `{metric: squared deviation over the identity's}`, with an interval over subjects.
    """

    form: str
    texts: int
    moved: float
    cosine: float
    gain: dict[str, float]
    deviation: dict[str, float]
    rho: dict[str, Estimate]


@dataclass(frozen=True)
class LayerGeometry:
    """One layer.

    Attributes:
        facts, subjects: that the drift was measured on; edited: (facts, subjects) whose values were
            written together.
        kappa: `{metric: (mean, largest)}`; null: share of C's energy inside the null space, and of
            its directions.
        forms: the drift of the keys, form by form.
        values: how sharp the optimised values are, and how much drift they tolerate.
        recall: `{form: {metric: {measure: mean}}}` under each metric's edit: drift D, outputs A,
            and the recall of the new object, exact (every token the arg-max) and success (likelier
            than the true one); "none" is the unedited model.
        points: (D |r|, room, recalled exactly, form) of every fact and form under the covariance's
            edit; `room` is the tolerated distance from the fact's joint value.
    """

    layer: int
    facts: int
    subjects: int
    edited: tuple[int, int]
    kappa: dict[str, tuple[float, float]]
    null: tuple[float, float]
    forms: list[FormDrift]
    values: Landscape | None
    recall: dict[str, dict[str, dict[str, float]]]
    points: list[tuple[float, float, bool, str]]

    def within(self) -> dict[str, float]:
        """Share recalled of the texts whose push stays within the room, and of the others; NaN
        where there are none.
        """
        parts = {
            name: [r for push, room, r, _ in self.points if (push <= room) == w]
            for name, w in (("in", True), ("out", False))
        }
        return {
            name: float(np.mean(part)) if part else float("nan") for name, part in parts.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; None where a measure is undefined."""
        values = (
            {}
            if self.values is None
            else {n: v for n, v in vars(self.values).items() if not isinstance(v, Tensor)}
        )
        plain = {
            name: value for name, value in vars(self).items() if name not in ("forms", "values")
        }
        whole = {
            **plain,
            "forms": [asdict(form) for form in self.forms],
            "values": values,
            "within": self.within(),
        }
        return _without_nan(whole)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if value != value else value


@accepts_model
def geometry(
    model: EditableModel,
    groups: Sequence[Sequence[Fact]],
    statistics: KeyStatistics,
    layers: Sequence[int],
    values: ValueSettings | None = None,
    *,
    gain: Share = GAIN,
    edited: int | None = None,
    threshold: float = THRESHOLD,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> list[LayerGeometry]:
    """Measure each of `layers` on `groups` (the facts of one subject each); the model is not
    touched.

    The keys of all groups are read in one pass; the values of the first `edited` groups (default:
    all; 0: of none, which is fast) are optimised, written together by each metric, and asked for in
    one wording a form, layer by layer. Facts whose subject is the very first token are left out:
    the key there is the attention sink's.

    Raises:
        EditError: fewer than two usable subjects. StatisticsError: missing layers, or of another
            model.
    """
    statistics.check(model, layers)
    if routed := [layer for layer in layers if model.layout.experts(layer) is not None]:
        raise EditError(
            f"the geometry is that of one dense matrix, and {model.name} has "
            f"routed experts at {named('layer', routed)}; choose dense layers"
        )
    values = values or HiddenState().resolved(preset_for(model), Runtime())
    usable = [[f for f in g if model.row(f.prompt, f.subject).subject != 0] for g in groups]
    usable = [group for group in usable if group]
    some = usable[:edited]
    if len(usable) < 2 or len(some) == 1:
        raise EditError(
            "the geometry needs facts of at least two subjects that do not begin their prompt"
        )
    every, asked = _Texts(model, usable, other=True), _Texts(model, some, wordings=1)
    n = len(asked.facts)  # the edited groups come first in `every` too
    keys, others = (model.keys(rows, layers)[0] for rows in (every.bare, every.rows))
    unedited = _recalled(model, asked) if some else {}
    found = []
    for layer in layers:
        null, moment = statistics.null_space(layer, threshold), statistics.moment(layer)
        assert isinstance(null, NullSpace)  # the layer is dense
        metrics: dict[str, Metric] = {
            "C": statistics.metric(layer),
            "P": null,
            "I": Identity(model.d_ff),
        }
        at, away = (k[layer].double().cpu().T for k in (keys, others))
        kappa = {name: amplification(metric, at) for name, metric in metrics.items()}
        landed = landscape(model, some, layer, values, seed=seed) if some else None
        recall, points = (
            _written(model, asked, layer, metrics, at[:, :n], landed, unedited, gain)
            if landed
            else ({}, [])
        )
        ends = {name: (float(k.mean()), float(k.max())) for name, k in kappa.items()}
        inside = float(null.inverse(moment).trace() / moment.trace()), null.rank / null.dim
        drifts, sizes = _drifts(every, metrics, at, away, seed), (n, len(some))
        one = LayerGeometry(
            layer,
            len(every.facts),
            len(usable),
            sizes,
            ends,
            inside,
            drifts,
            landed,
            recall,
            points,
        )
        found.append(one)
        say(f"layer {layer} measured")
    return found


class _Texts:
    """The facts' bare prompts, and every other text that names their subject: at most `wordings` of
    each form.
    """

    def __init__(
        self,
        model: EditableModel,
        groups: Sequence[Sequence[Fact]],
        *,
        wordings: int | None = None,
        other: bool = False,
    ) -> None:
        self.facts = [fact for group in groups for fact in group]
        self.owner = torch.tensor([g for g, group in enumerate(groups) for _ in group])
        self.bare = [model.row(fact.prompt, fact.subject) for fact in self.facts]
        chats = bool(getattr(model.tokenizer, "chat_template", None))
        self.prompts: list[str] = []
        self.names: list[str] = []
        of: list[int] = []
        for i, fact in enumerate(self.facts):
            forms = [form for form in held_out_forms(fact) if chats or not form.chat]
            if other:
                forms += [
                    Form(OTHER, fact.subject, f.prompt if f.subject == fact.subject else f.text)
                    for f in groups[int(self.owner[i])]
                    if f is not fact
                ]
            seen: Counter[str] = Counter()
            for form in forms:
                seen[form.name] += 1
                if form.row(model).subject != 0 and (
                    wordings is None or seen[form.name] <= wordings
                ):
                    self.prompts.append(form.prompt(model))
                    self.names.append(form.name)
                    of.append(i)
        self.of = torch.tensor(of)
        self.rows = [
            model.row(prompt, self.facts[i].subject) for i, prompt in zip(of, self.prompts)
        ]
        self.forms = list(dict.fromkeys(self.names))

    def means(self, column: Tensor) -> dict[str, float]:
        """By form, over the texts where it is known."""
        return {form: float(column[self.are(form)].nanmean()) for form in self.forms}

    def are(self, form: str) -> Tensor:
        return torch.tensor([name == form for name in self.names])


def _drifts(
    texts: _Texts, metrics: dict[str, Metric], keys: Tensor, others: Tensor, seed: int
) -> list[FormDrift]:
    """Keys `[d_ff, facts]` of the bare prompts against those of the texts, `[d_ff, texts]`."""
    at = keys[:, texts.of]
    eps = others - at
    off = {
        name: (read_in(metric, keys)[:, texts.of] * eps).sum(0) for name, metric in metrics.items()
    }
    moved, cosine = eps.norm(dim=0) / at.norm(dim=0), torch.cosine_similarity(others, at, dim=0)
    found = []
    for form in texts.forms:
        if form == "cloze":  # the edited prompt itself
            continue
        mine = texts.are(form)
        square, subjects = (
            {name: off[name][mine].square() for name in metrics},
            texts.owner[texts.of][mine],
        )
        found.append(
            FormDrift(
                form,
                int(mine.sum()),
                float(moved[mine].mean()),
                float(cosine[mine].mean()),
                gain={name: 1 + float(off[name][mine].mean()) for name in metrics},
                deviation={name: float(square[name].mean().sqrt()) for name in metrics},
                rho={
                    name: ratio(square[name], square["I"], subjects, seed)
                    for name in metrics
                    if name != "I"
                },
            )
        )
    return found


def ratio(above: Tensor, below: Tensor, clusters: Tensor, seed: int = 0) -> Estimate:
    """``sum(above) / sum(below)`` with a 95 % percentile bootstrap interval over whole clusters;
    all `[n]`.
    """
    owners = clusters.tolist()
    up, down = (intervals.by_cluster(part.tolist(), owners)[0] for part in (above, below))
    return intervals.ratio(up, down, seed, records=len(above))


def _written(
    model: EditableModel,
    texts: _Texts,
    layer: int,
    metrics: dict[str, Metric],
    keys: Tensor,
    landed: Landscape,
    unedited: dict[str, Tensor],
    gain: Share,
) -> tuple[dict[str, dict[str, dict[str, float]]], list[tuple[float, float, bool, str]]]:
    """`LayerGeometry.recall` and `.points`: the joint values written at the subjects' mean keys, at
    equal gain.
    """
    delta, count = landed.delta.double(), torch.bincount(texts.owner)
    mean = (
        torch.zeros(len(keys), len(count), dtype=keys.dtype).index_add(1, texts.owner, keys) / count
    )
    planned = delta[texts.owner].T[:, texts.of]
    found: dict[str, dict[str, Tensor]] = {}
    for name in ("none", *metrics):
        factors = {}
        if name in metrics:
            metric = metrics[name].with_weight(weight_for_gain(metrics[name], mean, gain))
            factors[layer] = delta.T.float(), EditSolver(metric, mean).A.T.float()
        with model.virtual(factors):
            here, (away, now) = (
                model.keys(texts.bare, [layer], outputs=True)[1],
                model.keys(texts.rows, [layer], outputs=True),
            )
            assert here is not None and now is not None
            here = here[texts.of.to(here.device)]
            found[name] = {"outputs": ((now - here).norm(dim=1) / here.norm(dim=1)).double().cpu()}
            found[name] |= _recalled(model, texts) if factors else unedited
        if factors:
            left, right = (factor.double() for factor in factors[layer])
            miss = left @ (right.T @ away[layer].double().cpu().T) - planned
            found[name]["drift"] = miss.norm(dim=0) / planned.norm(dim=0)
    push = (found["C"]["drift"] * planned.norm(dim=0)).tolist()
    points = zip(push, landed.room[texts.of].tolist(), found["C"]["exact"].tolist(), texts.names)
    means = {
        name: {m: texts.means(column) for m, column in table.items()}
        for name, table in found.items()
    }
    by_form = {
        f: {n: {m: value[f] for m, value in table.items()} for n, table in means.items()}
        for f in texts.forms
    }
    return by_form, [(p, r, bool(e), name) for p, r, e, name in points]


def _recalled(model: EditableModel, texts: _Texts) -> dict[str, Tensor]:
    """Whether each text is followed by the new object: every token the arg-max; likelier than the
    true one (or NaN).
    """
    facts = [texts.facts[i] for i in texts.of]
    pairs = [
        (p, answer) for p, f in zip(texts.prompts, facts) for answer in (f.target, f.true) if answer
    ]
    scores = dict(zip(pairs, model.score(*zip(*pairs))))
    new = [scores[p, f.target] for p, f in zip(texts.prompts, facts)]
    old = [scores[p, f.true] if f.true else None for p, f in zip(texts.prompts, facts)]
    success = [
        float("nan") if o is None else float(n.logprob > o.logprob) for n, o in zip(new, old)
    ]
    return {
        "exact": torch.tensor([float(n.exact) for n in new]).double(),
        "success": torch.tensor(success).double(),
    }
