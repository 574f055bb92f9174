"""Value optimisation against a naive per-fact loop that runs the whole model, as the literature
writes it (unit, model).
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.methods.locate.values import (
    DEFAULT_CONTEXTS,
    ESSENCE,
    AtProjections,
    Problem,
    ValueSettings,
    optimise_values,
    prompt_rows,
)

FACTS = [
    Fact(prompt="The capital of {} is", subject="France", target="Lyon"),
    Fact(
        prompt="The mother tongue of {} is", subject="Danielle Darrieux", target="Mandarin Chinese"
    ),
    Fact(prompt="{} plays the", subject="Miles Davis", target="violin"),
    Fact(
        prompt="Everybody knows that the official language of {} is",
        subject="Brazil",
        target="Norwegian",
    ),
]


def naive(model, fact, layer, s):
    """One fact: every step the whole model over every whole row, full logits, torch's own Adam."""
    rows = [*prompt_rows(model, fact, s.contexts, fact.target)]
    essence = model.row(ESSENCE.format(fact.subject), fact.subject)
    ids, _ = model.pad([r.ids for r in [*rows, essence]])
    at = torch.tensor([r.subject for r in [*rows, essence]])
    lines = torch.arange(len(at))
    delta = torch.zeros(model.hidden, requires_grad=True)
    state = {}

    def hook(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        state.setdefault("value", hidden[0, at[0]].detach().clone())
        hidden = hidden.clone()
        hidden[lines, at] = hidden[lines, at] + delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.layers[layer].register_forward_hook(hook)
    optimiser = torch.optim.Adam([delta], lr=s.lr)
    clean, updates = None, 0
    try:
        for step in range(s.steps):
            logp = model.hf(input_ids=ids).logits.log_softmax(-1)
            terms = [
                logp[i, r.answer - 1 : len(r.ids) - 1]
                .gather(1, torch.tensor(r.ids[r.answer :])[:, None])
                .mean()
                for i, r in enumerate(rows)
            ]
            nll = -torch.stack(terms).mean()
            now = logp[-1, at[-1]]
            clean = now.detach() if clean is None else clean
            kl = F.kl_div(clean, now, log_target=True, reduction="sum")
            norm = state["value"].norm()
            loss = nll + s.kl * kl + s.weight_decay * delta.norm() / norm**2
            if loss < s.stop or step == s.steps - 1:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            updates += 1
            with torch.no_grad():
                if delta.norm() > s.clamp * norm:
                    delta *= s.clamp * norm / delta.norm()
    finally:
        handle.remove()
    return delta.detach(), float(loss.detach()), updates


@pytest.mark.model
def test_equals_the_naive_loop(smollm):
    contexts = DEFAULT_CONTEXTS[:2]
    settings = ValueSettings(steps=20, lr=1.0, stop=0.6, clamp=1.2, contexts=contexts)
    batched = optimise_values(smollm, [[f] for f in FACTS[:2]], 5, settings)
    for i, fact in enumerate(FACTS[:2]):
        delta, loss, updates = naive(smollm, fact, 5, settings)
        assert (batched.delta[i] - delta).norm() <= 1e-5 * delta.norm()
        assert float(batched.loss[i]) == pytest.approx(loss, rel=1e-4)
        assert int(batched.steps[i]) == updates
    assert len(set(batched.steps.tolist())) > 1, "early stopping was not exercised"


def test_equals_the_naive_loop_on_gpt2(tiny_gpt2):
    settings = ValueSettings(steps=6, clamp=5.0)
    batched = optimise_values(tiny_gpt2, [[f] for f in FACTS], 1, settings)
    for i, fact in enumerate(FACTS):
        delta, _, _ = naive(tiny_gpt2, fact, 1, settings)
        assert (batched.delta[i] - delta).norm() <= 1e-5 * delta.norm()


def test_batches_do_not_change_the_result(tiny_llama):
    one = optimise_values(tiny_llama, [[f] for f in FACTS], 1, ValueSettings(steps=5))
    many = optimise_values(tiny_llama, [[f] for f in FACTS], 1, ValueSettings(steps=5, budget=1))
    assert (one.delta - many.delta).norm() <= 1e-4 * one.delta.norm()


def test_a_group_shares_one_value(tiny_llama):
    pair = [
        Fact(prompt="The capital of {} is", subject="France", target="Lyon"),
        Fact(prompt="People in {} speak", subject="France", target="Norwegian"),
    ]
    merged = optimise_values(tiny_llama, [pair], 1, ValueSettings(steps=30, clamp=4.0))
    alone = optimise_values(tiny_llama, [pair[:1]], 1, ValueSettings(steps=30, clamp=4.0))
    assert merged.delta.shape == (1, tiny_llama.hidden)
    assert not torch.allclose(merged.delta[0], alone.delta[0], rtol=1e-2)


@pytest.mark.parametrize(
    "bad",
    [
        {"contexts": ()},
        {"contexts": ("In fact, {}",)},
        {"contexts": ("{}", "x")},
        {"steps": 0},
        {"clamp": 0},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(EditError):
        ValueSettings(**bad)


def test_targets_are_kept_on_the_device_that_is_asked_for(tiny_llama):
    """ "meta" stands for a GPU: what is left on the CPU shows."""
    settings = ValueSettings(steps=2)
    for layers in (1, (1, 2)):
        found = optimise_values(
            tiny_llama, [FACTS[:1]], layers, settings, problem=AtProjections, device="meta"
        )
        parts = [part for part in vars(found).values() if part is not None]
        assert len(parts) == 6 + isinstance(layers, tuple)
        assert {part.device.type for part in [*parts, found.wanted, found.of_layers()]} == {"meta"}


class Sinking(Problem):
    """The states of the bare prompts of the second group are fifty times as long, as where the
    model keeps an attention sink."""

    def states(self, rows):
        long = torch.ones(len(self.of_row))
        long[self.bare[self.bare_owner == 1]] = 50.0
        return super().states(rows) * long[rows][:, None, None]


def test_a_sink_does_not_say_how_long_a_value_may_be(tiny_llama):
    """Whatever its length, the value stays within what the same words have behind others."""
    groups, settings = [[f] for f in FACTS[:2]], ValueSettings(steps=25, lr=5.0, clamp=0.5)
    plain = optimise_values(tiny_llama, groups, 1, settings)
    held = optimise_values(tiny_llama, groups, 1, settings, problem=Sinking)
    assert plain.sink.tolist() == [0, 0] and held.sink.tolist() == [0, 1]
    assert held.delta[0].equal(plain.delta[0])
    rows = prompt_rows(tiny_llama, FACTS[1], settings.contexts)
    states = [
        tiny_llama.hf(input_ids=torch.tensor([r.ids]), output_hidden_states=True).hidden_states[2]
        for r in rows
    ]
    lengths = torch.stack([h[0, r.subject].norm() for h, r in zip(states, rows)])
    assert held.delta[1].norm() <= 0.5 * lengths.max() * (1 + 1e-5)
    free = optimise_values(tiny_llama, groups, 1, replace(settings, sink=99.0), problem=Sinking)
    assert free.sink.tolist() == [0, 0] and free.delta[1].norm() > held.delta[1].norm()


def test_an_empty_group_is_refused(tiny_llama):
    with pytest.raises(EditError, match="without facts"):
        optimise_values(tiny_llama, [[]], 1)


@pytest.mark.parametrize("model_too", [True, False])
def test_another_default_dtype_changes_nothing(tiny_llama, model_too):
    """Other people's code sets it; a float64 model has float64 values."""
    settings = ValueSettings(steps=4)
    groups = [[fact] for fact in FACTS[:2]]
    wanted = optimise_values(tiny_llama, groups, 1, settings)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        if model_too:
            tiny_llama.hf.double()
        found = optimise_values(tiny_llama, groups, 1, settings)
    finally:
        torch.set_default_dtype(before)
        tiny_llama.hf.float()
    error = (found.delta.double() - wanted.delta.double()).norm() / wanted.delta.norm()
    assert float(error) < 1e-4
    assert not model_too or found.delta.dtype == torch.float64
