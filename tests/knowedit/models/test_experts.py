"""Routed experts as one wide linear layer: its keys and weights are what the model multiplies,
in every layout, and what is not such a layer is refused with the figures (unit).
"""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from knowedit.errors import ModelError
from knowedit.models import experts
from knowedit.models.editable import EditableModel
from knowedit.models.experts import Experts, Routed, WideProjection, as_keys, recognise
from knowedit.models.partial import PartialModel, hooked, read_keys, virtual
from tests.knowedit.models.tiny import build

FAMILIES = ("mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v3")
LAYER = 2
IN_TURN = torch.tensor([[0, 2], [3, 1], [2, 0]])  # experts of three tokens
TEXTS = [("The capital of France is", "France"), ("Old Rome", "Rome")]


@pytest.fixture(params=FAMILIES)
def mixture(request, byte_tokenizer):
    return EditableModel(build(request.param), byte_tokenizer, name=request.param)


@pytest.fixture
def mixtral(byte_tokenizer):
    return EditableModel(build("mixtral"), byte_tokenizer, name="mixtral")


def seen(model, ids, layer=LAYER):
    """What plain transformers gives the experts of a layer, and what these give back."""
    found = []
    module = model.hf.get_submodule(model.layout.projection(layer))
    handle = module.register_forward_hook(lambda _, args, out: found.append((*args, out)))
    model.hf(input_ids=ids)
    handle.remove()
    return found[0]


def by_hand(module, state, expert):
    """One expert's key at one token, in float64, from the parameters alone."""
    gate_up, state = module.gate_up_proj[expert].double(), state.double()
    if type(module).__name__ == "GptOssExperts":
        both = state @ gate_up + module.gate_up_proj_bias[expert].double()
        gate, up = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
        return gate * torch.sigmoid(module.alpha * gate) * (up + 1)
    gate, up = (gate_up @ state).chunk(2)
    return nn.functional.silu(gate) * up


def test_keys_are_what_the_output_matrices_are_given(mixture):
    rows = [mixture.row(*text) for text in TEXTS]
    keys, outputs = mixture.keys(rows, [LAYER], outputs="projection")
    projection = mixture.projection(LAYER)
    experts, module = projection.experts, projection.module
    for line, row in enumerate(rows):
        states, index, gates, out = seen(mixture, torch.tensor([row.ids]))
        at = row.subject
        wanted = torch.zeros(experts.count, experts.width, dtype=torch.float64)
        for expert, gate in zip(index[at].tolist(), gates[at].double()):
            wanted[expert] = gate * by_hand(module, states[at], expert)
        found = experts.by_expert(keys[LAYER][line])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs[line], out[at], rtol=1e-4, atol=1e-5)


def test_all_tokens_are_read_with_their_experts_and_gates(mixture):
    ids, found = mixture.pad([mixture.row(*text).ids for text in TEXTS])[0], {}
    read_keys(mixture, ids, [LAYER], found.__setitem__)
    _, index, gates, _ = seen(mixture, ids)
    routed = found[LAYER]
    assert routed.index.shape == (*ids.shape, 2) and torch.equal(routed.index.flatten(0, 1), index)
    torch.testing.assert_close(routed.gates.flatten(0, 1), gates)
    assert routed.keys().shape == (*ids.shape, 2, mixture.projection(LAYER).experts.width)
    torch.testing.assert_close(routed.wide()[1, 3], routed[1, 3].wide(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def runs(monkeypatch):
    """How often experts are run for their keys."""
    runs, run = [], experts._run
    monkeypatch.setattr(experts, "_run", lambda *given: runs.append(1) or run(*given))
    return runs


def through_identities(routed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(experts, "_seen", lambda *_: None)
        return routed.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_seen_in_one_run_without_products(mixture, dtype, runs, monkeypatch):
    """They are what products with rows of the identity give, of more rows than a digit has."""
    mixture.hf.to(dtype)
    projection = mixture.projection(LAYER)
    count = projection.experts.count
    index = torch.stack([torch.randperm(count)[:2] for _ in range(150)])
    routed = Routed(projection, torch.randn(150, 32).to(dtype), index, torch.rand(150, 2))
    found = routed.keys()
    assert len(runs) == 1 and found.dtype == dtype
    torch.testing.assert_close(
        found, through_identities(routed, monkeypatch), rtol=0, atol=0, equal_nan=False
    )
    assert len(runs) > 1


def test_experts_run_one_by_one_within_a_block_and_say_the_same(mixture):
    ids = mixture.pad([mixture.row(*text).ids for text in TEXTS])[0]
    module = mixture.projection(LAYER).module
    before = mixture.final_states(ids)
    assert module.config._experts_implementation == "grouped_mm"
    with pytest.raises(KeyError), experts.one_by_one(mixture.hf), Grouped() as products:
        after = mixture.final_states(ids)
        raise KeyError
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert products.grouped == 0 and module.config._experts_implementation == "grouped_mm"
    with Grouped() as products:
        mixture.final_states(ids)
    assert products.grouped > 0


def test_experts_whose_outputs_have_a_factor_have_it_in_their_keys(mixtral, runs):
    """They are not one product, so their keys are not seen, but asked for."""
    routed = Routed(mixtral.projection(LAYER), torch.randn(3, 32), IN_TURN, torch.rand(3, 2))
    plain, module = routed.keys(), routed.projection.module
    kind = type(module)

    class Threefold(kind):
        def forward(self, *given, **named):
            return 3 * kind.forward(self, *given, **named)

    module.__class__ = Threefold
    del runs[:]
    torch.testing.assert_close(routed.keys(), 3 * plain)
    assert len(runs) > 1


class Grouped(TorchFunctionMode):
    """Counts products of all experts at once."""

    grouped = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.grouped += func is torch._grouped_mm
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("replay", [True, False])
def test_a_virtual_change_is_that_of_the_weights(mixture, replay):
    """Also where a part of the model is run: by single layers, or as a window of the whole."""
    if replay and not mixture.replays:
        pytest.fail(f"{mixture.name} should run layer by layer")
    generator = torch.Generator().manual_seed(1)
    projection, parameter = mixture.projection(LAYER), mixture.weight(LAYER)
    width = mixture.layout.width(LAYER)
    left, right = (0.2 * torch.randn(n, 2, generator=generator) for n in (32, width))
    rows = [mixture.row(*text) for text in TEXTS]
    part = PartialModel(mixture, rows, LAYER, [0, 0], _replay=replay)
    with torch.no_grad(), virtual(mixture, {LAYER: (left, right)}):
        found = part.run()
    before = parameter.clone()
    parameter.data += projection.stored(left @ right.T)
    for line, row in enumerate(rows):
        wanted = mixture.final_states(torch.tensor([row.ids]))[0]
        torch.testing.assert_close(found[line, : len(row.ids)], wanted, rtol=1e-4, atol=1e-4)
    parameter.data.copy_(before)
    plain = mixture.final_states(torch.tensor([rows[0].ids]))[0]
    assert (found[0, : len(rows[0].ids)] - plain).abs().max() > 1e-2  # it does something


def test_the_keys_have_gradients(mixtral):
    """With respect to the states, against differences in float64."""
    hf = mixtral.hf.double()
    hf.config._experts_implementation = "eager"  # the grouped product takes no float64
    module = hf.get_submodule(mixtral.layout.projection(LAYER))
    projection = WideProjection(module, mixtral.layout.experts(LAYER))
    states = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 2], [3, 1], [2, 2]])  # a token may have an expert twice
    gates = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def wide(states, gates):
        return projection.given((states, index, gates), {}).wide()

    out = torch.randn(mixtral.layout.width(LAYER), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *given: wide(*given) @ out, (states, gates))
    made = projection(wide(states, gates))
    torch.testing.assert_close(made, module(states, index, gates))


def test_hooks_see_what_the_experts_are_given_and_change_what_they_give(mixtral):
    ids, given = mixtral.pad([mixtral.row(*text).ids for text in TEXTS])[0], []

    def see(routed, output):
        given.append(as_keys(routed))
        return torch.zeros_like(output)

    with hooked({mixtral.projection(LAYER): see}):
        mixtral.final_states(ids)
    assert given[0].shape == (ids.numel(), mixtral.layout.width(LAYER))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(seen(mixtral, ids)[3], torch.zeros(ids.numel(), 32))


class Twice(nn.Module):
    """Experts whose outputs are not linear in their output matrices."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, x, chosen, weights):
        out = torch.zeros_like(x)
        for slot in range(chosen.shape[1]):
            hidden = torch.einsum("nh,ndh->nd", x, self.up[chosen[:, slot]]).relu()
            made = torch.einsum("nd,nhd->nh", hidden, self.down[chosen[:, slot]])
            out = out + weights[:, slot, None] * self.after(made)
        return out

    def after(self, made):
        return made.tanh()


class Once(Twice):
    def after(self, made):
        return made


def a_call(module):
    torch.manual_seed(0)
    given = torch.randn(5, 4), torch.randint(0, 3, (5, 2)), torch.rand(5, 2)
    return given, {}, module(*given)


def test_experts_are_known_by_what_they_do_not_by_their_names():
    module = Once()
    assert recognise(module, *a_call(module)) == Experts(
        "down", False, "", 3, 8, 2, "x", "chosen", "weights"
    )


def test_what_is_behind_the_experts_is_refused_with_the_figures():
    module = Twice()
    with pytest.raises(ModelError, match=r"Twice differs by \d\.\de[-+]\d+ .* is not known"):
        recognise(module, *a_call(module))
    given, _, out = a_call(module)
    with pytest.raises(ModelError, match="not called with tokens, the experts chosen"):
        recognise(module, given[:2], {"weights": None}, out)


def test_a_layer_of_unknown_experts_is_refused_and_the_others_are_not(byte_tokenizer):
    hf = build("mixtral")
    experts = hf.model.layers[1].mlp.experts
    own = type(experts).forward

    class Behind(type(experts)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return own(self, hidden_states, top_k_index, top_k_weights).tanh()

    experts.__class__ = Behind
    model = EditableModel(hf, byte_tokenizer)
    assert model.layout.editable == (0, 2, 3)
    with pytest.raises(ModelError, match=r"layer 1 .*experts.* taken apart: .*Behind differs by"):
        model.projection(1)
