"""PMET against a naive loop over the whole model with two deltas, and its spread against the
formula (unit).
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from knowedit.errors import ModelError
from knowedit.methods import PMET
from knowedit.methods.locate.metrics import Covariance
from knowedit.methods.locate.targets import AttentionAndMLP, TwoDeltas
from knowedit.methods.locate.values import ESSENCE, optimise_values, prompt_rows
from knowedit.models.structure import attention_of
from tests.knowedit.methods.helpers import FACTS, SAME, VALUES, pair, statistics_of, target_of
from tests.knowedit.models.layouts import without_attention


def naive(model, group, layer, s):
    """One group: the whole model, full logits, a delta on the attention's and one on the MLP's
    output, Adam on both.
    """
    per_fact = [prompt_rows(model, fact, s.contexts, fact.target) for fact in group]
    rows = [row for found in per_fact for row in found]
    first = [0, *torch.tensor([len(found) for found in per_fact]).cumsum(0).tolist()][:-1]
    essence = model.row(ESSENCE.format(group[0].subject), group[0].subject)
    ids, _ = model.pad([r.ids for r in [*rows, essence]])
    lines, at = torch.arange(len(rows) + 1), torch.tensor([r.subject for r in [*rows, essence]])
    deltas = [torch.zeros(model.hidden, requires_grad=True) for _ in range(2)]
    clean = {}

    def hook(part):
        def add(_module, _inputs, output):
            out = (output[0] if isinstance(output, tuple) else output).clone()
            clean.setdefault(part, out[first, at[first]].detach().mean(0))
            out[lines, at] = out[lines, at] + deltas[part]
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return add

    parts = attention_of(model, layer), model.projection(layer)
    handles = [part.register_forward_hook(hook(i)) for i, part in enumerate(parts)]
    optimiser, was = torch.optim.Adam(deltas, lr=s.lr), None
    for step in range(s.steps):
        logp = model.hf(input_ids=ids).logits.log_softmax(-1)
        nll = -sum(
            logp[i, r.answer - 1 : len(r.ids) - 1]
            .gather(1, torch.tensor(r.ids[r.answer :])[:, None])
            .mean()
            for i, r in enumerate(rows)
        ) / len(rows)
        now = logp[-1, at[-1]]
        was = now.detach() if was is None else was
        loss = nll + s.kl * F.kl_div(was, now, log_target=True, reduction="sum")
        loss = loss + s.weight_decay * sum(
            d.norm() / clean[part].norm() ** 2 for part, d in enumerate(deltas)
        )
        if step == s.steps - 1:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for part, d in enumerate(deltas):
                d *= (s.clamp * clean[part].norm() / d.norm()).clamp(max=1)
    for handle in handles:
        handle.remove()
    return deltas[1].detach(), clean[1], float(nll.detach())


@pytest.mark.parametrize("tiny", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("clamp", [0.5, 4.0])
def test_both_deltas_are_those_of_the_naive_loop(request, tiny, clamp):
    model, settings = request.getfixturevalue(tiny), replace(VALUES, clamp=clamp, stop=0.0)
    groups = [[FACTS[0], SAME], FACTS[1:2]]
    found = optimise_values(model, groups, 2, settings, problem=TwoDeltas)
    for i, group in enumerate(groups):
        delta, value, nll = naive(model, group, 2, settings)
        torch.testing.assert_close(found.value[i], value, rtol=1e-4, atol=1e-5)
        assert (found.delta[i] - delta).norm() <= 1e-4 * delta.norm()
        assert float(found.nll[i]) == pytest.approx(nll, rel=1e-4)


@pytest.mark.parametrize("tiny", ["tiny_llama", "tiny_gpt2"])
def test_the_mlps_residual_is_spread_by_the_square_root(request, tiny):
    """Delta_i = R_i Kᵀ (lambda C + K Kᵀ)⁻¹ with R_i = (m* - m) / sqrt(L - i), m the last layer's
    MLP output.
    """
    model = request.getfixturevalue(tiny)
    statistics, editor = (
        statistics_of(model, (1, 2)),
        PMET(
            layers=(1, 2), target=target_of(VALUES, AttentionAndMLP), metric=Covariance(weight=7.0)
        ),
    )
    made = editor.compute(model, FACTS, statistics, progress=False)
    assert made.report.details["settings"]["values"]["clamp"] == editor.target.clamp == VALUES.clamp
    wanted = optimise_values(model, [[fact] for fact in FACTS], 2, VALUES, problem=TwoDeltas).wanted
    rows = [prompt_rows(model, fact, VALUES.contexts) for fact in FACTS]
    for layer, left in ((1, 2), (2, 1)):
        with model.virtual({1: pair(model, made, 1)} if layer == 2 else {}):
            keys = [model.keys(found, [1, 2])[0] for found in rows]
        K = torch.stack([k[layer].double().mean(0) for k in keys], 1)
        now = model.projection(2)(torch.stack([k[2][0] for k in keys])).detach().double()
        C = statistics.moment(layer)
        update = ((wanted - now).T / left**0.5) @ torch.linalg.solve(7.0 * C + K @ K.T, K).T
        assert (made.delta(layer) - update).norm() <= 1e-6 * update.norm()


def test_the_clamp_is_relative_to_the_mlps_output(tiny_llama):
    values = replace(VALUES, lr=50.0, steps=3)
    for clamp, limit in ((0.1, 0.1), (None, 0.75)):  # None: the preset's
        target = replace(target_of(values, AttentionAndMLP), clamp=clamp)
        editor = PMET(layers=(1,), target=target)
        task = editor.prepare(
            tiny_llama, [FACTS[:1]], statistics_of(tiny_llama, (1,)), progress=False
        )
        found = editor.target.values(task)
        assert float(found.delta.norm() / found.value.norm()) == pytest.approx(limit, rel=1e-4)


def test_no_hook_is_left(tiny_llama):
    PMET(layers=(0,), target=target_of(VALUES, AttentionAndMLP)).compute(
        tiny_llama, FACTS[:1], statistics_of(tiny_llama, (0,)), progress=False
    )
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in tiny_llama.hf.modules()
    )


def test_a_layer_without_one_attention_is_named(tiny_llama):
    tiny_llama.layout = without_attention(tiny_llama.layout, 1)
    with pytest.raises(ModelError, match="layer 1 has 0 modules that mix tokens"):
        PMET(layers=(1,), target=target_of(VALUES, AttentionAndMLP)).compute(
            tiny_llama, FACTS, statistics_of(tiny_llama, (1,)), progress=False
        )
