"""Models with a norm or a factor between an MLP's projection and the layer's output: values are
planned where they are written, and what is said of the edit is what plain transformers shows
(unit).
"""

import pytest
import torch
import transformers
from torch.nn import functional as F

from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.methods import EMMET, MEMIT, ROME, AlphaEdit, MetaKE, NeuronPatch, RoSE
from knowedit.methods.locate import values
from knowedit.methods.locate.metrics import Covariance
from knowedit.methods.locate.targets import HiddenState, MergedFacts
from knowedit.methods.locate.task import Runtime
from knowedit.methods.locate.training import TrainingSettings
from knowedit.methods.locate.trainings import ThroughForms, ThroughSolver
from knowedit.methods.locate.values import (
    AtGates,
    AtProjections,
    Problem,
    ValueSettings,
    optimise_values,
    problem_of,
)
from knowedit.models.editable import EditableModel
from knowedit.models.partial import hooked
from knowedit.models.presets import preset_for
from knowedit.models.probing import first_of
from tests.conftest import frozen
from tests.knowedit.methods.helpers import FACTS, MEAN, SAME, statistics_of, target_of
from tests.knowedit.models.tiny import build

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
NORM_INSIDE = {"BitNet": {}}
KINDS = {
    "Gemma2": {"sliding_window": 16},
    "Gemma3": {"sliding_window": 16},
    "Olmo2": {},
    "Glm4": {"partial_rotary_factor": 0.5},
    "Granite": {"residual_multiplier": 0.22},
}
VALUES = ValueSettings(steps=20, lr=None, clamp=4.0, contexts=("{}",))
TARGET = target_of(VALUES)


def built(kind, tokenizer):
    """A model of four layers with random weights, its norms' weights too."""
    torch.manual_seed(0)
    config = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{config}Config")(**SHAPE, **(KINDS | NORM_INSIDE)[kind])
    hf = frozen(getattr(transformers, f"{kind}ForCausalLM")(config))
    for name, parameter in hf.named_parameters():
        if "norm" in name:
            parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return EditableModel(hf, tokenizer, name=kind)


@pytest.fixture(params=KINDS)
def other(request, byte_tokenizer):
    return built(request.param, byte_tokenizer)


@pytest.fixture
def optimised(monkeypatch):
    """The targets that methods optimise, in order: tests need not optimise them again."""
    found, values = [], HiddenState.values

    def kept(target, task):
        found.append(values(target, task))
        return found[-1]

    monkeypatch.setattr(HiddenState, "values", kept)
    return found


@pytest.fixture
def gemma(byte_tokenizer):
    return built("Gemma3", byte_tokenizer)


def state(model, fact, layer, deltas=None):
    """The layer's output at the subject, by plain transformers, with `deltas` `{layer: vector}`
    added to the projections' outputs there.
    """
    row, seen, handles = model.row(fact.text, fact.subject), [], []

    def add(delta):
        def hook(_module, _inputs, output):
            output = output.clone()
            output[0, row.subject] += delta
            return output

        return hook

    def see(_module, _inputs, output):
        seen.append((output[0] if isinstance(output, tuple) else output)[0, row.subject])

    for at, delta in (deltas or {}).items():
        handles.append(model.projection(at).register_forward_hook(add(delta)))
    handles.append(model.layers[layer].register_forward_hook(see))
    model.hf(input_ids=torch.tensor([row.ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen[0]


@torch.no_grad()
def realised(model, made, facts, deltas):
    """The share of the planned change that the edited model shows, by plain transformers."""
    last, shares = max(deltas), []
    for i, fact in enumerate(facts):
        clean = state(model, fact, last)
        plan = state(model, fact, last, {at: d[i] for at, d in deltas.items()}) - clean
        with made.applied_to(model):
            found = state(model, fact, last) - clean
        shares.append(float(found @ plan / (plan @ plan)))
    return shares


def nll(model, fact):
    """Of the answer, by plain transformers."""
    row = model.row(fact.text, fact.subject, fact.target)
    logits = model.hf(input_ids=torch.tensor([row.ids])).logits[0]
    first = row.answer
    return float(F.cross_entropy(logits[first - 1 : -1], torch.tensor(row.ids[first:])))


def test_rome_reaches_what_it_planned(other, optimised):
    """Delta k = delta, so the edited model's NLL is the planned one and the gain is 1."""
    made = ROME(layers=(1,), target=TARGET).compute(
        other, FACTS[:1], statistics_of(other, [1]), progress=False
    )
    (share,) = realised(other, made, FACTS[:1], {1: optimised[-1].delta})
    assert share == pytest.approx(1, abs=1e-3)
    assert made.report.gain == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("layers", [(1,), (1, 2)])
def test_the_gain_said_is_the_gain_shown(other, layers, optimised):
    editor = MEMIT(layers=layers, target=TARGET, metric=Covariance(gain=0.9))
    made = editor.compute(other, FACTS, statistics_of(other, layers), progress=False)
    deltas = dict(zip(layers, optimised[-1].of_layers().unbind(1)))
    shares = realised(other, made, FACTS, deltas)
    assert list(made.report.measured.gain) == pytest.approx(shares, abs=1e-3)
    assert made.report.gain == pytest.approx(sum(shares) / len(shares), abs=1e-3)
    assert min(shares) > 0.5 and sum(shares) / len(shares) > 0.8


def test_values_of_several_layers_are_those_of_a_naive_loop(gemma):
    """The whole model, a delta on each projection, Adam on all; each within half of the clamp."""
    fact, settings = FACTS[0], ValueSettings(steps=8, lr=0.05, clamp=0.6, kl=0.0, contexts=("{}",))
    row = gemma.row(fact.text, fact.subject, fact.target)
    deltas = [torch.zeros(gemma.hidden, requires_grad=True) for _ in range(2)]
    clean = {}

    def hook(part):
        def add(_module, _inputs, output):
            clean.setdefault(part, output[0, row.subject].detach().clone())
            output = output.clone()
            output[0, row.subject] += deltas[part]
            return output

        return add

    handles = [gemma.projection(1 + i).register_forward_hook(hook(i)) for i in range(2)]
    adam = torch.optim.Adam(deltas, lr=settings.lr)
    for step in range(settings.steps):
        logits = gemma.hf(input_ids=torch.tensor([row.ids])).logits[0]
        loss = F.cross_entropy(logits[row.answer - 1 : -1], torch.tensor(row.ids[row.answer :]))
        if step == settings.steps - 1:
            break
        loss = loss + sum(0.5 * d.norm() / clean[i].norm() ** 2 for i, d in enumerate(deltas))
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for i, d in enumerate(deltas):
                d *= (0.3 * clean[i].norm() / d.norm()).clamp(max=1)
    for handle in handles:
        handle.remove()
    found = optimise_values(gemma, [[fact]], (1, 2), settings)
    assert float(found.nll) == pytest.approx(float(loss.detach()), rel=1e-3)
    for mine, wanted in zip(found.of_layers()[0], deltas):
        assert (mine - wanted.detach()).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize(
    "editor",
    [
        EMMET(layers=(1,), target=TARGET),
        AlphaEdit(layers=(1,), target=TARGET, keys=MEAN),
        MetaKE(layers=(1, 2), target=TARGET, training=ThroughSolver(when="always", gain=0.9)),
        RoSE(
            layers=(1, 2),
            target=MergedFacts(**vars(TARGET)),
            training=ThroughForms(settings=TrainingSettings(steps=3)),
        ),
    ],
    ids=lambda editor: editor.name,
)
def test_every_method_says_what_it_does(gemma, editor):
    facts = FACTS if editor.name != "RoSE" else [FACTS[0], SAME]
    made = editor.compute(gemma, facts, statistics_of(gemma, editor.layers), progress=False)
    shares = realised(gemma, made, facts, made.plan)
    assert list(made.report.measured.gain) == pytest.approx(shares, abs=2e-3)
    assert sum(shares) / len(shares) > 0.5
    with made.applied_to(gemma):
        after = [nll(gemma, fact) for fact in facts]
    assert sum(after) < sum(nll(gemma, fact) for fact in facts)


def test_a_neuron_patch_writes_through_the_norm(gemma, tmp_path):
    (tmp_path / "c.txt").write_text("Some text about nothing. " * 40)
    editor = NeuronPatch(layers=(1,), target=TARGET, corpus=str(tmp_path / "c.txt"), tokens=500)
    made = editor.compute(gemma, FACTS[:1], progress=False)
    (share,) = realised(gemma, made, FACTS[:1], made.plan)
    assert made.report.gain == pytest.approx(share, abs=2e-3) and share > 0.9


def test_neurons_behind_a_norm_are_not_patched(byte_tokenizer, tmp_path):
    """BitNet has a norm between the neurons and the output projection."""
    (tmp_path / "c.txt").write_text("Some text about nothing. " * 40)
    editor = NeuronPatch(layers=(1,), target=TARGET, corpus=str(tmp_path / "c.txt"), tokens=500)
    with pytest.raises(EditError, match="keys of layer 1 are neither"):
        editor.compute(built("BitNet", byte_tokenizer), FACTS[:1], progress=False)


def test_a_target_a_layer_needs_the_whole_edit(gemma):
    training = ThroughSolver(when="always", settings=TrainingSettings(through="proxy"))
    editor = MetaKE(layers=(1, 2), target=TARGET, training=training)
    with pytest.raises(EditError, match="a target of its own"):
        editor.compute(gemma, FACTS, statistics_of(gemma, (1, 2)), progress=False)


def test_the_default_clamp_is_relative_to_the_projections_output(gemma, tiny_llama):
    fact = [Fact("The capital of {} is", "France", "Lyon")]
    for model, clamp in ((gemma, 4.0), (tiny_llama, 0.75)):
        task = MEMIT(layers=(1,)).prepare(model, [fact], statistics_of(model, [1]), progress=False)
        assert task.values.clamp == clamp and task.values.lr is None
        assert task.problem is (AtProjections if model is gemma else Problem)
        assert task.of_mlp == (model is gemma)
    mine = HiddenState(clamp=1.0).resolved(preset_for(gemma), Runtime(), AtProjections)
    assert mine.clamp == 1.0


def test_the_problem_is_chosen_by_the_stream(other, tiny_llama, tiny_gpt2):
    assert problem_of(other, (1,)) is (AtGates if other.name == "Granite" else AtProjections)
    assert all(problem_of(model, (1, 2)) is Problem for model in (tiny_llama, tiny_gpt2))


FACTOR = 0.22


def in_granites_layout(llama):
    """The same function: Granite multiplies what attention and MLPs write by a factor, so they
    write so much more.
    """
    shared = llama.hf.config.to_dict()
    shape = {name: shared[name] for name in SHAPE if name in shared}
    head = shape["hidden_size"] // shape["num_attention_heads"]
    config = transformers.GraniteConfig(
        **shape,
        rope_parameters=shared["rope_parameters"],
        rms_norm_eps=shared["rms_norm_eps"],
        residual_multiplier=FACTOR,
        attention_multiplier=head**-0.5,
        attn_implementation="sdpa",
    )
    hf = frozen(transformers.GraniteForCausalLM(config))
    given = llama.hf.state_dict()
    for name, tensor in hf.state_dict().items():
        larger = "o_proj" in name or "down_proj" in name
        tensor.copy_(given[name] / (FACTOR if larger else 1))
    return EditableModel(hf, llama.tokenizer, name="granite")


def test_behind_a_factor_values_are_those_of_the_model_without_one(tiny_llama):
    """Steps and limits follow from the layer's output, as they do there, and not from what the MLP
    writes, which is a small part of it.
    """
    granite = in_granites_layout(tiny_llama)
    ids = torch.arange(9)[None]
    wanted = tiny_llama.hf(input_ids=ids).logits
    torch.testing.assert_close(granite.hf(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    settings = ValueSettings(steps=12, lr=None, weight_decay=0.0, contexts=("{}", "So: {}"))
    groups = [[fact] for fact in FACTS]
    plain, gated = (optimise_values(model, groups, 1, settings) for model in (tiny_llama, granite))
    far = plain.delta.norm(dim=1)
    assert float(far.min()) > 0
    assert float(((FACTOR * gated.delta - plain.delta).norm(dim=1) / far).max()) < 1e-2
    torch.testing.assert_close(gated.nll, plain.nll, rtol=1e-2, atol=1e-3)


def test_behind_a_gate_lengths_are_the_layers_outputs_seen_through_it(byte_tokenizer):
    model = EditableModel(build("qwen2_moe"), byte_tokenizer).editing("shared")
    assert model.layout.stream(1).kind == "gate" and problem_of(model, (1,)) is AtGates
    rows = [model.row(fact.prompt, fact.subject) for fact in FACTS]
    layer, gate = model.layers[1], model.layers[1].mlp.shared_expert_gate
    for row, length in zip(rows, AtGates.state_lengths(model, rows, 1)):
        seen = {}
        with hooked(
            {
                layer: lambda _, y, seen=seen: seen.update(out=first_of(y)),
                gate: lambda _, y, seen=seen: seen.update(gate=y.sigmoid()),
            }
        ):
            model.hf(input_ids=torch.tensor([row.ids]), use_cache=False)
        at = row.subject
        wanted = seen["out"][0, at].norm() / seen["gate"].flatten()[at]
        assert float(length) == pytest.approx(float(wanted), rel=1e-4)


def test_a_gate_that_is_shut_at_a_subject_is_refused(byte_tokenizer, monkeypatch):
    model = EditableModel(build("qwen2_moe"), byte_tokenizer).editing("shared")

    def shut(_model, rows, _layer):
        return torch.tensor([0.5] * (len(rows) - 1) + [0.0], dtype=torch.float64), 0.0

    monkeypatch.setattr(values, "gates", shut)
    with pytest.raises(EditError, match=r"layer 1's MLP is shut .* edit another layer"):
        optimise_values(model, [[fact] for fact in FACTS], 1, VALUES)
