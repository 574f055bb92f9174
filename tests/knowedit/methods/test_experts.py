"""Locate-then-edit on routed experts: one wide layer, written exactly, all experts together
(unit).
"""

from dataclasses import replace

import pytest
import torch

from knowedit.edits.changes import Dense
from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.errors import EditError, ModelError, StatisticsError
from knowedit.facts.fact import Fact, Probe
from knowedit.facts.wordings.ordinary import held_out
from knowedit.methods import EMMET, FTL, MEMIT, ROME, AlphaEdit, LoRA, MetaKE
from knowedit.methods.base import statistics_for
from knowedit.methods.gradient.trainable import linear_names
from knowedit.methods.locate.keysets import ContextKeys
from knowedit.methods.locate.metrics import Blend, Covariance, NullSpace
from knowedit.methods.locate.targets import HiddenState
from knowedit.methods.locate.trainings import ThroughSolver
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.models.structure import linears
from knowedit.statistics import KeyStatistics, key_statistics
from knowedit.statistics.files.store import CollectionRecipe, LayerStatistics
from tests.knowedit.methods.helpers import FACTS, SAME
from tests.knowedit.models.tiny import build

LAYER = 2
TARGET = HiddenState(steps=4, lr="calibrated", contexts=("{}",))
FAMILIES = ("mixtral", "gpt_oss", "granitemoe")


@pytest.fixture(params=FAMILIES)
def mixture(request, byte_tokenizer):
    return EditableModel(build(request.param), byte_tokenizer, name=request.param)


@pytest.fixture
def mixtral(byte_tokenizer):
    return EditableModel(build("mixtral"), byte_tokenizer, name="mixtral")


def statistics_of(model, layers, count=5000):
    """Statistics with random covariances of the experts, which differ in how often they ran."""
    generator = torch.Generator().manual_seed(0)
    recipe = CollectionRecipe(model.fingerprint, {"name": "test"}, count, 64, True, 0)
    found = {}
    for layer in layers:
        experts = model.layout.experts(layer)
        counts = [count * (expert + 1) // 8 for expert in range(experts.count)]
        keys = torch.randn(
            experts.count, 4 * experts.width, experts.width, generator=generator
        ).double() * torch.linspace(0.2, 2, experts.width)
        share = torch.tensor(counts)[:, None, None] / (4 * experts.width)
        found[layer] = LayerStatistics(
            layer, "m", model.name, recipe, count, keys.mT @ keys * share, 1.0, 1.0, {},
            tuple(counts),
        )  # fmt: skip
    return KeyStatistics(found)


def wide_keys(model, layer=LAYER, facts=FACTS):
    """`[width, n]` float64, from the model as it is."""
    rows = [model.row(fact.text, fact.subject) for fact in facts]
    return model.keys(rows, [layer])[0][layer].double().T


def wide(model, edit, layer=LAYER):
    """The edit's update `[hidden, width]` of the wide layer."""
    experts, name = model.layout.experts(layer), model.layout.weight_name(layer)
    zero = torch.zeros(model.hidden, experts.width)
    parts = [edit.changes.get(f"{name}[{e}]") for e in range(experts.count)]
    return torch.cat([zero if part is None else part.dense() for part in parts], 1).double()


def test_the_write_is_the_dense_one_of_the_wide_layer(mixture):
    """MEMIT's `R K^T (lambda C + K K^T)^-1` with the block diagonal C, in float64."""
    statistics = statistics_of(mixture, [LAYER])
    method = MEMIT(layers=(LAYER,), target=TARGET, metric=Covariance(weight=0.05))
    edit = method.compute(mixture, FACTS, statistics, progress=False)
    K, C = wide_keys(mixture), torch.block_diag(*statistics.moment(LAYER))
    R = edit.plan[LAYER].double().T
    wanted = R @ K.T @ torch.linalg.inv(0.05 * C + K @ K.T)
    torch.testing.assert_close(
        wide(mixture, edit), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max()
    )
    before = weights_fingerprint(mixture.hf)
    with edit.applied_to(mixture):
        assert weights_fingerprint(mixture.hf) != before
    assert weights_fingerprint(mixture.hf) == before


def test_methods_solve_the_dense_stacked_formula_in_float64(mixtral):
    """The metric of the recipe: its solver's write, gain, price and derivatives."""
    statistics, K = statistics_of(mixtral, [LAYER]), wide_keys(mixtral)
    C = torch.block_diag(*statistics.moment(LAYER))
    solver, _ = Covariance(weight=0.05).solver(statistics, LAYER, K)
    generator = torch.Generator().manual_seed(0)
    R, dR = torch.randn(2, 32, K.shape[1], generator=generator).double()
    X = torch.randn(len(C), 5, generator=generator).double()
    g = torch.randn(32, 5, generator=generator).double()
    read = torch.linalg.solve(0.05 * C + K @ K.T, K).T
    delta = R @ read
    wanted = {
        "delta": (solver.delta(R), delta),
        "gain": (solver.gain, (read @ K).diagonal()),
        "price": (solver.price(R), (delta @ C * delta).sum() * 0.05),
        "jvp": (solver.jvp(dR, X), dR @ read @ X),
        "vjp": (solver.vjp(g, X), g @ X.T @ read.T),
    }
    for name, (found, dense) in wanted.items():
        assert float((found - dense).norm() / dense.norm()) < 1e-11, name


def test_the_gain_that_is_said_is_realised(mixture):
    """At the facts' own prompts: through gates, biases and what is behind the experts."""
    statistics = statistics_of(mixture, [LAYER])
    alone = FACTS[:1]
    exact = ROME(layers=(LAYER,), target=TARGET).compute(mixture, alone, statistics, progress=False)
    assert exact.report.measured.gain[0] == pytest.approx(1, abs=2e-3)
    method = MEMIT(layers=(LAYER,), target=TARGET, metric=Covariance(gain=0.7))
    edit = method.compute(mixture, alone, statistics, progress=False)
    said = edit.report.layers[str(LAYER)]["gain"]
    assert said == pytest.approx(0.7, abs=1e-3)
    assert edit.report.gain == pytest.approx(said, abs=2e-3)


@pytest.mark.parametrize("kind", ["top-1", "ties"])
def test_one_expert_a_token_and_a_router_that_cannot_choose(byte_tokenizer, kind):
    """With equal gates the router takes some experts, and always the same ones."""
    hf = build("mixtral", **({"num_experts_per_tok": 1} if kind == "top-1" else {}))
    if kind == "ties":
        hf.model.layers[LAYER].mlp.gate.weight.zero_()
    model = EditableModel(hf, byte_tokenizer, name=kind)
    assert model.layout.experts(LAYER).top_k == (1 if kind == "top-1" else 2)
    exact = ROME(layers=(LAYER,), target=TARGET)
    edit = exact.compute(model, FACTS[:1], statistics_of(model, [LAYER]), progress=False)
    assert edit.report.measured.gain[0] == pytest.approx(1, abs=2e-3)
    assert len(edit.changes) == model.layout.experts(LAYER).top_k


def test_experts_that_the_statistics_have_hardly_seen_are_warned_of(mixtral):
    statistics = statistics_of(mixtral, [LAYER])
    seen = replace(statistics[LAYER], counts=(0, 0, 0, 5000))
    method = MEMIT(layers=(LAYER,), target=TARGET)
    edit = method.compute(mixtral, FACTS, KeyStatistics({LAYER: seen}), progress=False)
    seldom = {int(name[-2]) for name in edit.changes} - {3}
    said = f"layer 2: {len(seldom)} of {len(edit.changes)} edited experts were given fewer than 96"
    assert any(said in warning for warning in edit.warnings)


def test_more_facts_than_an_expert_has_tokens_are_written_under_the_mean_of_all(mixtral):
    """Six facts reach experts with no token and with one: a metric of full rank, and a warning."""
    names = ("Rome", "Bonn", "Oslo", "Lima", "Kyiv", "Bern")
    facts = [Fact(prompt="The river of {} is", subject=name, target="Po") for name in names]
    given = statistics_of(mixtral, [LAYER])[LAYER]
    few = torch.tensor([0, 1, 0, 5000])
    kept = given.total * (few / torch.tensor(given.counts))[:, None, None]
    statistics = KeyStatistics({LAYER: replace(given, total=kept, counts=tuple(few.tolist()))})
    edit = MEMIT(layers=(LAYER,), target=TARGET).compute(mixtral, facts, statistics, progress=False)
    K, C = wide_keys(mixtral, facts=facts), torch.block_diag(*statistics.moment(LAYER))
    reached = mixtral.layout.experts(LAYER).by_expert(K.T).ne(0).any(-1).sum(0)
    assert (reached > few).any()
    weight = edit.report.layers[str(LAYER)]["lambda"]
    wanted = edit.plan[LAYER].double().T @ K.T @ torch.linalg.inv(weight * C + K @ K.T)
    torch.testing.assert_close(
        wide(mixtral, edit), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max()
    )
    assert any("held by the mean of all experts" in warning for warning in edit.warnings)


def test_statistics_of_other_shapes_are_refused(mixtral, byte_tokenizer):
    """As a file imported from elsewhere may have them, under this model's fingerprint."""
    given, method = statistics_of(mixtral, [LAYER])[LAYER], MEMIT(layers=(LAYER,), target=TARGET)
    fewer = replace(given, total=given.total[:3], counts=given.counts[:3])
    flat = replace(given, total=torch.block_diag(*given.total), counts=())
    for other, says in (
        (fewer, r"\[3, 48, 48\] with counts of 3 experts"),
        (flat, r"\[192, 192\]"),
    ):
        with pytest.raises(StatisticsError, match=says + r".* need \[4, 48, 48\] with 4"):
            method.compute(mixtral, FACTS, KeyStatistics({LAYER: other}), progress=False)


def plain_sets(model, prompts, layers):
    """The experts of each token by plain transformers, `[tokens, layers, top_k]`."""
    found = []
    for prompt in prompts:
        seen = []
        modules = [model.projection(layer).module for layer in layers]
        handles = [
            module.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[1]))
            for module in modules
        ]
        model.hf(input_ids=torch.tensor([model.row(prompt).ids]))
        for handle in handles:
            handle.remove()
        found.append(torch.stack(seen, 1).sort(-1).values)
    return torch.cat(found)


def test_the_report_says_what_later_routers_choose_otherwise(mixtral, tmp_path):
    near = Probe("The capital of Spain is", "Madrid")
    facts = [replace(FACTS[0], neighbours=(near,)), *FACTS[1:]]
    method = MEMIT(layers=(1,), target=replace(TARGET, clamp=8.0, steps=8))
    edit = method.compute(mixtral, facts, statistics_of(mixtral, [1]), progress=False)
    routing = edit.report.measured.routing
    groups = {
        "facts": [fact.text for fact in facts], "neighbours": [near.prompt], "text": held_out()
    }  # fmt: skip
    before = {name: plain_sets(mixtral, texts, (2, 3)) for name, texts in groups.items()}
    with edit.applied_to(mixtral):
        after = {name: plain_sets(mixtral, texts, (2, 3)) for name, texts in groups.items()}
    for name in groups:
        wanted = (before[name] != after[name]).any(-1).double().mean()
        assert getattr(routing, name) == pytest.approx(float(wanted), abs=0.01)
    assert routing.layers == (2, 3) and routing.facts > 0
    assert "other experts at 2 later layers" in str(edit.report.measured)
    read = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert read.report.measured == edit.report.measured


def test_what_works_on_one_matrix_says_so(mixtral, byte_tokenizer):
    with pytest.raises(ModelError, match="layer 1 has routed experts, and this works on .* edits$"):
        linears(mixtral, 1, mlp=True)
    some_dense = EditableModel(build("deepseek_v3"), byte_tokenizer)
    with pytest.raises(ModelError, match="or one of the dense layers 0-1"):
        linears(some_dense, 2, mlp=True)


def test_fine_tuning_takes_all_experts(mixtral):
    edit = FTL(layers=(LAYER,), steps=1).compute(mixtral, FACTS[:1], progress=False)
    name = mixtral.layout.weight_name(LAYER)
    assert list(edit.changes) == [name] and float(edit.changes[name].delta.abs().max()) > 0
    assert weights_fingerprint(mixtral.hf) == mixtral.fingerprint


@pytest.mark.parametrize("modules", [("mlp.experts",), ("experts", "q_proj")])
def test_lora_trains_experts_as_one_wide_layer(mixture, modules):
    """What is trained is what the edit does, and the answer is learned."""
    if mixture.name == "granitemoe":
        modules = tuple(name.removeprefix("mlp.") for name in modules)
    method = LoRA(layers=(LAYER,), modules=modules, steps=12, lr=0.02)
    edit = method.compute(mixture, FACTS[:1], progress=False)
    parts = [part for change in edit.changes.values() for part in change.tensors().values()]
    assert not any(part.requires_grad for part in parts)
    name = mixture.layout.weight_name(LAYER)
    of_experts = [key for key in edit.changes if key.startswith(f"{name}[")]
    assert len(of_experts) == mixture.layout.experts(LAYER).count
    assert len(edit.changes) == len(of_experts) + (len(modules) > 1)
    fact = FACTS[0]
    before = mixture.score([fact.text], [fact.target])[0].logprob
    with edit.applied_to(mixture):
        after = mixture.score([fact.text], [fact.target])[0].logprob
    assert after > before + 0.2
    assert -after == pytest.approx(edit.report.details["loss"], rel=1e-3)
    assert weights_fingerprint(mixture.hf) == mixture.fingerprint


def test_linear_layers_are_those_that_each_layer_has(byte_tokenizer):
    """DeepSeek's first layers are dense and have no shared expert."""
    model = EditableModel(build("deepseek_v3"), byte_tokenizer)
    found = linear_names(model, None, ("down_proj",))
    assert found == [
        f"model.layers.{layer}.mlp.{where}down_proj"
        for layer, where in ((0, ""), (1, ""), (2, "shared_experts."), (3, "shared_experts."))
    ]
    with pytest.raises(EditError, match="no linear layers experts: .*shared_experts.down_proj"):
        LoRA(layers=(0,), modules=("experts",)).part(model)


def test_quantised_experts_are_refused(mixtral, byte_tokenizer):
    """As gpt-oss's MXFP4 blocks are held: whole numbers."""
    experts = mixtral.projection(LAYER).module
    blocks = torch.zeros(4, 32, 24, dtype=torch.uint8)
    experts.down_proj_blocks = torch.nn.Parameter(blocks, requires_grad=False)
    with pytest.raises(ModelError, match="experts.down_proj_blocks is quantised .* dequantise"):
        EditableModel(mixtral.hf, byte_tokenizer)


@pytest.mark.parametrize(
    "method",
    [
        EMMET(layers=(LAYER,), target=TARGET),
        AlphaEdit(layers=(LAYER,), target=TARGET, metric=NullSpace(gain=0.95)),
        MEMIT(layers=(LAYER,), target=TARGET, metric=Blend(gain=0.95)),
        MetaKE(layers=(LAYER,), target=TARGET, training=ThroughSolver(when="always", gain=0.95)),
    ],
    ids=lambda method: type(method).__name__ + method.metric.kind,
)
def test_every_recipe_writes_experts(mixtral, method, tmp_path):
    statistics = statistics_of(mixtral, [LAYER])
    edit = method.compute(mixtral, FACTS[:1], statistics, progress=False)
    assert edit.report.gain == pytest.approx(1, abs=0.06)
    read = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert read.key == edit.key and read.method() == method
    assert method.compute(mixtral, FACTS[:1], statistics, progress=False).key == edit.key


def test_later_layers_see_the_keys_and_gates_that_earlier_ones_leave(mixtral):
    """Two layers: the second's keys are those of the model with the first edited."""
    statistics = statistics_of(mixtral, [1, 2])
    method = MEMIT(
        layers=(1, 2), target=TARGET, metric=Covariance(gain=0.95), keys=ContextKeys(mean=True)
    )
    edit = method.compute(mixtral, FACTS, statistics, progress=False)
    first = {n: change for n, change in edit.changes.items() if ".layers.1." in n}
    part = Edit("first", first, FACTS, mixtral.fingerprint)
    with part.applied_to(mixtral):
        after = wide_keys(mixtral).T.float()
    assert (after - wide_keys(mixtral).T).abs().max() > 1e-3
    torch.testing.assert_close(edit.keys[2], after, rtol=1e-3, atol=1e-4)


def test_a_history_of_experts_spares_earlier_keys(mixtral, tmp_path):
    statistics = statistics_of(mixtral, [LAYER])
    method = MEMIT(layers=(LAYER,), target=TARGET, metric=Covariance(gain=0.95))
    session = Session(method, mixtral, statistics)
    session.write(FACTS[:1], force=True, progress=False)
    second = session.write([SAME, *FACTS[1:]], force=True, progress=False)
    read = History.load(session.history.save(tmp_path / "history.safetensors"))
    torch.testing.assert_close(read.keys(LAYER), session.history.keys(LAYER))
    session.undo()
    free = method.compute(mixtral, [SAME, *FACTS[1:]], statistics, progress=False)
    old = wide_keys(mixtral, facts=FACTS[:1])
    spared, unspared = (float((wide(mixtral, e) @ old).norm()) for e in (second, free))
    assert spared < 0.8 * unspared
    session.undo()
    assert weights_fingerprint(mixtral.hf) == mixtral.fingerprint


# -- the shared expert
# -------------------------------------------------------------------------------------------------


def test_a_fact_of_experts_is_corrected_forgotten_and_merged(mixture):
    """Alone, what was forgotten was never there; merged edits are their sum, expert by expert."""
    method = MEMIT(layers=(LAYER,), target=TARGET, metric=Covariance(weight=30.0))
    with Session(method, mixture, statistics_of(mixture, [LAYER])) as session:
        made = session.write(FACTS[:1], force=True, progress=False)
        gone = session.forget(FACTS[:1], force=True, progress=False)
        both = wide(mixture, made) + wide(mixture, gone)
        assert both.norm() <= 1e-5 * wide(mixture, made).norm()
        session.undo()
        session.write(FACTS[1:], force=True, progress=False)
        session.correct([replace(FACTS[0], target="Nice")], force=True, progress=False)
        assert [fact.target for fact in session.history.facts] == ["Norse", "violin", "Nice"]
        total = sum(wide(mixture, edit) for edit in session.history.edits)
        keys = session.history.keys(LAYER)
        session.compact()
        changes, name = session.history.edits[0].changes, mixture.layout.weight_name(LAYER)
        for expert, part in enumerate(total.split(mixture.layout.experts(LAYER).width, 1)):
            if f"{name}[{expert}]" in changes:
                found = changes[f"{name}[{expert}]"].dense().double()
                turned = dense_is_turned(mixture, changes, f"{name}[{expert}]")
                found = found.T if turned else found
                torch.testing.assert_close(found, part, rtol=1e-5, atol=1e-6)
        found = session.history.keys(LAYER)
        torch.testing.assert_close(found @ found.T, keys @ keys.T, rtol=1e-6, atol=1e-8)


def dense_is_turned(model, changes, name):
    """Whether the change is dense, as the model stores it, and that is `[d, hidden]`."""
    return isinstance(changes[name], Dense) and model.is_transposed(name)


def collected(model, tmp_path, layers):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(held_out() * 6))
    where = tmp_path / model.experts
    return key_statistics(
        model, layers, text, 200, directory=where, halves=False, progress=False, max_length=32
    )


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "granitemoeshared", "llama4_text"])
def test_the_shared_expert_is_edited_as_the_dense_mlp_it_is(byte_tokenizer, tmp_path, family):
    """Behind a gate of its own (Qwen2-MoE), or beside experts that are not understood (Llama 4):
    what is said to be realised is, and it is undone bit for bit.
    """
    more = {"moe_layers": [1]} if family == "llama4_text" else {}
    model = EditableModel(build(family, **more), byte_tokenizer, name=family)
    layer = min(model.layout.shared)
    statistics = collected(model.editing("shared"), tmp_path, [layer])
    exact = ROME(layers=(layer,), target=TARGET, experts="shared")
    edit = exact.compute(model, FACTS[:1], statistics, progress=False)
    assert list(edit.changes) == [model.layout.shared[layer].weight]
    assert edit.report.measured.gain[0] == pytest.approx(1, abs=2e-3)
    before = weights_fingerprint(model.hf)
    with edit.applied_to(model):
        assert weights_fingerprint(model.hf) != before
    assert weights_fingerprint(model.hf) == before == model.fingerprint
    read = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert read.method() == exact and read.key == edit.key
    assert (edit.report.measured.routing is None) == (family == "llama4_text")


def test_statistics_say_of_which_experts_they_are(byte_tokenizer, tmp_path):
    model = EditableModel(build("qwen2_moe"), byte_tokenizer, name="qwen2_moe")
    shared = collected(model.editing("shared"), tmp_path, [LAYER])
    rows = [model.row(fact.text, fact.subject) for fact in FACTS]
    seen = model.editing("shared").keys(rows, [LAYER])[0][LAYER]
    given = []
    module = model.hf.get_submodule(model.layout.shared[LAYER].projection)
    handle = module.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    for row in rows:
        model.hf(input_ids=torch.tensor([row.ids[: row.subject + 1]]))
    handle.remove()
    plain = torch.stack([keys.reshape(-1, keys.shape[-1])[-1] for keys in given])
    torch.testing.assert_close(seen, plain, rtol=1e-4, atol=1e-5)
    with pytest.raises(StatisticsError, match="of its shared experts, and its routed ones"):
        MEMIT(layers=(LAYER,), target=TARGET).compute(model, FACTS, shared, progress=False)
    with pytest.raises(StatisticsError, match=r"of its routed .*model.editing\('shared'\)"):
        statistics_of(model, [LAYER]).check(model.editing("shared"), [LAYER])
    both = [MEMIT(layers=(LAYER,)), MEMIT(layers=(LAYER,), experts="shared")]
    with pytest.raises(StatisticsError, match="different experts"):
        statistics_for(both, model, None, None)


def test_models_without_a_shared_expert_say_so(mixtral, byte_tokenizer):
    for one in (mixtral, EditableModel(build("llama"), byte_tokenizer)):
        with pytest.raises(EditError, match="no layer has a shared expert"):
            MEMIT(layers=(LAYER,), experts="shared").compute(one, FACTS[:1], progress=False)
    with pytest.raises(EditError, match="one of routed, shared, both, got 'all'"):
        mixtral.editing("all")
    with pytest.raises(EditError, match="experts='both': no layer has a shared expert"):
        mixtral.editing("both")


def test_a_session_keeps_to_the_experts_it_began_with(byte_tokenizer, tmp_path):
    model = EditableModel(build("qwen2_moe"), byte_tokenizer, name="qwen2_moe")
    statistics = collected(model.editing("shared"), tmp_path, [LAYER])
    method = MEMIT(layers=(LAYER,), target=TARGET, metric=Covariance(weight=0.1), experts="shared")
    session = Session(method, model, statistics)
    session.write(FACTS[:1], force=True, progress=False)
    session.write(FACTS[1:], force=True, progress=False)
    session.forget(FACTS[:1], force=True, progress=False)
    assert [fact.text for fact in session.history.facts] == [fact.text for fact in FACTS[1:]]
    routed = MEMIT(layers=(LAYER,), target=TARGET)
    with pytest.raises(EditError, match="changes .*shared_expert.* same `experts`"):
        Session(routed, model, statistics_of(model, [LAYER]), session.history)
    session.close()
    assert weights_fingerprint(model.hf) == model.fingerprint


# -- routed and shared experts together
# -------------------------------------------------------------------------------------------------


def plain_keys(model, row, layer):
    """By plain transformers: the routed experts' gated keys in a row, then the shared one's."""
    block, states, shared = model.layers[layer].mlp, [], []
    home = model.hf.get_submodule(model.layout.shared[layer].projection)
    handles = [
        model.projection(layer).module.register_forward_pre_hook(lambda _, x: states.append(x)),
        home.register_forward_pre_hook(lambda _, x: shared.append(x[0])),
    ]
    model.hf(input_ids=torch.tensor([row.ids]))
    for handle in handles:
        handle.remove()
    x, index, gates = (given[row.subject].double() for given in states[0])
    experts, found = block.experts, []
    for expert in range(len(experts.down_proj)):
        gate, up = (experts.gate_up_proj[expert].double() @ x).chunk(2)
        weight = (gates * (index == expert)).sum()
        found.append(weight * torch.nn.functional.silu(gate) * up)
    own = shared[0].reshape(-1, shared[0].shape[-1])[row.subject].double()
    if hasattr(block, "shared_expert_gate"):
        own = own * torch.sigmoid(block.shared_expert_gate.weight[0].double() @ x)
    return torch.cat([*found, own])


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_both_kinds_of_experts_are_one_projection(byte_tokenizer, tmp_path, family):
    """Keys by hand, behind a gate or not; the write of the dense formula with a block more; all
    that is said to be realised is; every bit comes back.
    """
    model = EditableModel(build(family), byte_tokenizer, name=family)
    seen = model.editing("both")
    rows = [model.row(fact.text, fact.subject) for fact in FACTS]
    keys = seen.keys(rows, [LAYER])[0][LAYER].double()
    wanted = torch.stack([plain_keys(model, row, LAYER) for row in rows])
    torch.testing.assert_close(keys, wanted, rtol=1e-3, atol=1e-5)
    statistics = collected(seen, tmp_path, [LAYER])
    method = MEMIT(layers=(LAYER,), target=TARGET, metric=Covariance(weight=0.05), experts="both")
    edit = method.compute(model, FACTS, statistics, progress=False)
    shared = model.layout.shared[LAYER]
    assert shared.weight in edit.changes and len(edit.changes) > 1
    C = torch.block_diag(*statistics.moment(LAYER), statistics.shared.moment(LAYER))
    K, R = keys.T, edit.plan[LAYER].double().T
    expected = R @ K.T @ torch.linalg.inv(0.05 * C + K @ K.T)
    routed = wide(model, edit)
    found = torch.cat([routed, edit.changes[shared.weight].dense().double()], 1)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * expected.abs().max())
    exact = ROME(layers=(LAYER,), target=TARGET, experts="both")
    alone = exact.compute(model, FACTS[:1], statistics, progress=False)
    assert alone.report.measured.gain[0] == pytest.approx(1, abs=2e-3)
    assert set(alone.statistics) == {str(LAYER), f"{LAYER} shared"}
    with alone.applied_to(model):
        assert weights_fingerprint(model.hf) != model.fingerprint
    assert weights_fingerprint(model.hf) == model.fingerprint
    read = Edit.load(alone.save(tmp_path / "edit.safetensors"))
    assert read.method() == exact and read.key == alone.key
    with pytest.raises(StatisticsError, match=r"routed experts alone, .*editing\('both'\)"):
        exact.compute(model, FACTS[:1], KeyStatistics(statistics._layers), progress=False)
    with pytest.raises(EditError, match="metric blend .* not offered for experts='both'"):
        replace(method, metric=Blend()).compute(model, FACTS, statistics, progress=False)


def test_a_fact_of_both_kinds_of_experts_is_forgotten(byte_tokenizer, tmp_path):
    """Over two layers, the second seeing what the first has written in both its matrices."""
    model = EditableModel(build("qwen2_moe"), byte_tokenizer, name="qwen2_moe")
    statistics = collected(model.editing("both"), tmp_path, [1, LAYER])
    method = MEMIT(layers=(1, LAYER), target=TARGET, metric=Covariance(weight=30.0), experts="both")
    before = model.editing("both").keys([model.row(FACTS[0].text, FACTS[0].subject)], [LAYER])
    with Session(method, model, statistics) as session:
        made = session.write(FACTS[:1], force=True, progress=False)
        below = {n: c for n, c in made.changes.items() if ".layers.1." in n}
        part = Edit("first", below, FACTS[:1], model.fingerprint)
        gone = session.forget(FACTS[:1], force=True, progress=False)
        assert set(made.changes) == set(gone.changes)
        for name, change in made.changes.items():
            both = change.dense() + gone.changes[name].dense()
            assert both.norm() <= 1e-5 * change.dense().norm()
        routed = replace(method, experts="routed")
        with pytest.raises(EditError, match="keys are others; .* same `experts`"):
            Session(routed, model, KeyStatistics(statistics._layers), session.history)
    row = model.row(FACTS[0].text, FACTS[0].subject)
    with part.applied_to(model):
        after = model.editing("both").keys([row], [LAYER])[0][LAYER]
    assert (after - before[0][LAYER]).abs().max() > 1e-4
    torch.testing.assert_close(made.keys[LAYER], after, rtol=1e-3, atol=1e-4)
    assert weights_fingerprint(model.hf) == model.fingerprint
