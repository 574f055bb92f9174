"""The look-ahead against the edited model itself: losses, gradients, price, clamps (unit)."""

import pytest
import torch

from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.methods.locate.keys import group_keys
from knowedit.methods.locate.objective import FrozenLayer, TrainedText, TrainedTexts
from knowedit.methods.locate.training import (
    TrainingSettings,
    disconnect,
    state_norms,
    train_write_outs,
)
from knowedit.models.editable import EditableModel
from knowedit.models.partial.comparing import off
from knowedit_kernels import Covariance, EditSolver, weight_for_gain
from tests.knowedit.models.tiny import build

FACTS = [
    Fact(prompt="The capital of {} is", subject="France", target="Lyon"),
    Fact(prompt="The language of {} is", subject="Brazil", target="Norse"),
    Fact(prompt="It is said that {} plays the", subject="Miles Davis", target="violin"),
]
CONTEXTS = ("{}", "He said: {}")


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny(request):
    return request.getfixturevalue(request.param)


def metric_of(model, seed=0):
    keys = torch.randn(
        300, model.d_ff, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return Covariance(keys.T @ keys / 300)


def problem(model, layers, contexts=CONTEXTS):
    """Frozen layers of FACTS, their solvers, and random write-outs."""
    groups = [[fact] for fact in FACTS]
    norms = state_norms(model, groups, layers)
    frozen, solvers, out = {}, {}, {}
    for layer in layers:
        found = group_keys(model, groups, layer, layer, contexts, mean=len(contexts) > 1)
        metric, keys = metric_of(model, layer), found.keys.T
        solvers[layer] = EditSolver(metric.with_weight(weight_for_gain(metric, keys, 0.7)), keys)
        frozen[layer] = FrozenLayer.of(solvers[layer], found, norms[layer])
        out[layer] = torch.randn(
            len(groups), model.hidden, generator=torch.Generator().manual_seed(layer)
        )
    return groups, frozen, solvers, out


def lines_of(model, groups, first, **settings):
    rows = [
        TrainedText(model.row(f.text, f.subject, f.target), i)
        for i, group in enumerate(groups)
        for f in group
    ]
    return TrainedTexts(model, rows, first, len(groups), **settings)


def edited(model, frozen, out):
    """The same change as an edit that can be applied."""
    return Edit(
        "test",
        {
            model.layout.weight_name(k): LowRank(out[k].T.contiguous(), f.read_in.T.contiguous())
            for k, f in frozen.items()
        },
        [],
        model.fingerprint,
    )


@pytest.mark.parametrize("layers", [(2,), (1, 2)])
@pytest.mark.parametrize("budget", [20, 2048])
def test_the_realised_loss_is_that_of_the_edited_model(tiny, layers, budget):
    groups, frozen, _, out = problem(tiny, layers)
    found = disconnect(frozen, out, lines_of(tiny, groups, layers[0], budget=budget))
    with edited(tiny, frozen, out).applied_to(tiny):
        scores = tiny.score([f.text for f in FACTS], [f.target for f in FACTS])
    assert found.realised == pytest.approx(-sum(s.logprob for s in scores) / len(scores), rel=1e-5)


def test_planned_and_gained_are_shifts_at_the_lookup_token_only(tiny):
    groups, frozen, solvers, out = problem(tiny, (2,))
    found = disconnect(frozen, out, lines_of(tiny, groups, 2))

    def shifted(value):
        total = 0.0
        for i, fact in enumerate(FACTS):
            row = tiny.row(fact.text, fact.subject, fact.target)

            def add(_module, _inputs, output, i=i, at=row.subject):
                output = output.clone()
                output[:, at] += value[i]
                return output

            handle = tiny.projection(2).register_forward_hook(add)
            total -= tiny.score([fact.text], [fact.target])[0].logprob
            handle.remove()
        return total / len(FACTS)

    assert found.planned == pytest.approx(shifted(out[2]), rel=1e-5)
    realised = solvers[2].realised(out[2].T).T.float()
    assert found.gained == pytest.approx(shifted(realised), rel=1e-5)


def test_gradients_are_those_through_the_dense_weights(tiny):
    """One step of steepest descent's gradient against autograd through W + R A in every edited
    weight.
    """
    groups, frozen, _, out = problem(tiny, (1, 2))
    variables = {k: v.clone().requires_grad_() for k, v in out.items()}
    sum(
        part.sum() for part in lines_of(tiny, groups, 1, budget=30).losses(frozen, variables)
    ).backward()

    dense = {k: v.clone().requires_grad_() for k, v in out.items()}
    changed = {}
    for layer in (1, 2):
        delta = dense[layer].T @ frozen[layer].read_in
        changed[tiny.layout.weight_name(layer)] = tiny.weight(layer) + (
            delta.T if tiny.layout.transposed else delta
        )
    loss = torch.zeros(())
    for fact in FACTS:
        row = tiny.row(fact.text, fact.subject, fact.target)
        logits = torch.func.functional_call(tiny.hf, changed, (torch.tensor([row.ids]),)).logits[0]
        answer = torch.tensor(row.ids[row.answer :])
        loss = loss + torch.nn.functional.cross_entropy(logits[row.answer - 1 : -1], answer)
    loss.backward()
    for layer in (1, 2):
        assert (variables[layer].grad - dense[layer].grad).norm() <= 1e-4 * dense[layer].grad.norm()


def test_kl_lines_are_zero_unedited_and_the_divergence_otherwise(tiny):
    groups, frozen, _, out = problem(tiny, (2,))
    row = tiny.row("France is a country", "France")
    lines = TrainedTexts(tiny, [TrainedText(row, 1, 2.0, last=0.6)], 2, len(groups))
    none = {2: torch.zeros_like(out[2])}
    assert sum(part.abs().sum() for part in lines.losses(frozen, none)) < 1e-6
    found = sum(lines.losses(frozen, out))
    texts = [tiny.tokenizer.decode(row.ids[: i + 1]) for i in range(row.subject, len(row.ids))]
    clean = tiny.next_logprobs(texts)
    with tiny.virtual({2: (out[2].T, frozen[2].read_in.T)}):
        now = tiny.next_logprobs(texts)
    kl = (clean.exp() * (clean - now)).sum(1)
    wanted = 2 * (0.6 * kl[-1] + 0.4 * kl[:-1].mean())
    assert float(found[1, 1]) == pytest.approx(float(wanted), rel=1e-4)
    assert float(found.sum() - found[1, 1]) == 0


@pytest.mark.parametrize("contexts", [CONTEXTS, ("{}",)])
def test_gain_and_price_are_the_solvers(tiny_llama, contexts):
    _, frozen, solvers, out = problem(tiny_llama, (2,), contexts)
    delta = out[2].double().T @ frozen[2].read_in.double()
    keys = solvers[2].K
    M = torch.linalg.inv(solvers[2].metric.inverse(torch.eye(tiny_llama.d_ff, dtype=torch.float64)))
    price = (out[2] * (frozen[2].price @ out[2])).sum()
    assert float(price) == pytest.approx(float((delta @ M * delta).sum()), rel=1e-4)
    torch.testing.assert_close(
        frozen[2].gain.T @ out[2], (delta @ keys).T.float(), rtol=1e-4, atol=1e-5
    )


def test_training_lowers_the_loss_keeps_the_clamp_and_repeats_itself(tiny):
    groups, frozen, _, out = problem(tiny, (1, 2))
    lines = lines_of(tiny, groups, 1)
    start = {k: 0.01 * v for k, v in out.items()}
    settings = TrainingSettings(steps=12, lr=0.5, clamp=0.5, price=0, norm=0.01)
    found, again = (
        train_write_outs(frozen, start, lambda step: [(lines, 1.0)], settings) for _ in range(2)
    )
    assert all(torch.equal(found[k], again[k]) for k in found)
    assert (
        disconnect(frozen, found, lines).realised < 0.9 * disconnect(frozen, start, lines).realised
    )
    for layer, value in found.items():
        # rows are scaled one by one, so close keys may leave a little more than the clamp
        assert ((frozen[layer].gain.T @ value).norm(dim=1) <= 0.55 * frozen[layer].norm).all()
    plain = train_write_outs(
        frozen,
        start,
        lambda step: [(lines, 1.0)],
        TrainingSettings(steps=3, lr=9.0, clamp=0.2, clamp_realised=False),
    )
    assert all((plain[k].norm(dim=1) <= 0.2001 * frozen[k].norm).all() for k in plain)


def test_the_price_shrinks_the_edit(tiny_llama):
    groups, frozen, _, out = problem(tiny_llama, (2,))
    lines = lines_of(tiny_llama, groups, 2)

    def paid(price):
        value = train_write_outs(
            frozen,
            out,
            lambda step: [(lines, 1.0)],
            TrainingSettings(steps=6, lr=0.1, price=price, clamp=50),
        )[2]
        return float((value * (frozen[2].price @ value)).sum())

    assert paid(5.0) < 0.8 * paid(0.0)


def test_replaying_from_the_subject_is_exact_when_it_comes_first(tiny_llama):
    _, frozen, _, out = problem(tiny_llama, (2,))
    row = tiny_llama.row("France is near", "France", "Lyon")
    assert row.start == 0
    whole, part = (
        TrainedTexts(tiny_llama, [TrainedText(row, 0)], 2, 3, whole=w) for w in (True, False)
    )
    assert torch.equal(sum(whole.losses(frozen, out)), sum(part.losses(frozen, out)))
    later = tiny_llama.row("In Spain, France is near", "France", "Lyon")
    assert later.start == later.subject - len("France") + 1
    whole, part = (
        float(
            sum(
                TrainedTexts(tiny_llama, [TrainedText(later, 0)], 2, 3, whole=w).losses(frozen, out)
            ).sum()
        )
        for w in (True, False)
    )
    assert whole != part


def test_layer_0_is_refused(tiny_llama):
    with pytest.raises(EditError, match="layer 1"):
        lines_of(tiny_llama, [[FACTS[0]]], 0)


@pytest.mark.parametrize("units, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_draft_is_a_copy_only_where_it_is_another_model(tiny_llama, monkeypatch, units, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    draft = tiny_llama.draft()
    assert (
        draft.dtype == dtype and tiny_llama.dtype == torch.float32 and draft.hf is not tiny_llama.hf
    )
    tiny_llama.hf.to(torch.bfloat16)
    assert tiny_llama.draft().dtype == dtype
    assert tiny_llama.draft().hf is not tiny_llama.hf  # another attention, on a CPU
    monkeypatch.setattr(type(tiny_llama), "device", torch.device("cuda"))
    assert tiny_llama.draft() is tiny_llama


def test_a_draft_keeps_the_attention_that_works(byte_tokenizer):
    """Where transformers' plain code repeats the keys' heads once too often."""
    # dense layers: in bfloat16 a router may choose other experts
    dense = build("deepseek_v3", num_key_value_heads=2, first_k_dense_replace=99)
    model, ids = EditableModel(dense, byte_tokenizer), torch.arange(5, 12)[None]
    wanted, draft = model.hf(ids).logits, model.draft().hf
    assert draft.config._attn_implementation == "sdpa"
    assert off(draft(ids).logits, wanted) < 0.05
    draft.set_attn_implementation("eager")
    with pytest.raises(RuntimeError):
        draft(ids)
    plain = EditableModel(build("llama"), byte_tokenizer).draft()
    assert plain.hf.config._attn_implementation == "eager"
