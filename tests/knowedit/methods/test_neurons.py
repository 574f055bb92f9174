"""NeuronPatch: a switch that closes where it should, neurons that are not missed, and an edit
like any other (unit, model).
"""

from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import save_edited
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.methods import NeuronPatch
from knowedit.methods.locate.keys import group_by_wording
from knowedit.methods.locate.targets import AttentionAndMLP, HiddenState
from knowedit.methods.locate.task import Runtime
from knowedit.methods.locate.values import ValueSettings
from knowedit.methods.neurons import scores
from knowedit.methods.neurons.named import neuron_patch
from knowedit.methods.neurons.parts import (
    Switch,
    free_neurons,
    patched,
    step_of,
)
from knowedit.methods.neurons.scores import separate
from knowedit.methods.neurons.texts import at_lookup, everywhere
from knowedit.methods.neurons.wiring import Wiring
from knowedit.methods.neurons.written import Home
from knowedit.methods.registry import make_method
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.models.load import load_model
from knowedit.models.partial import read_keys, recorded
from tests.knowedit.methods.helpers import pair
from tests.knowedit.models.tiny import build

FACTS = [
    Fact(prompt="The capital of {} is", subject="France", target="Lyon", id="a"),
    Fact(prompt="Its capital: {}, namely", subject="la France", target="Lyon", id="a"),
    Fact(prompt="It is said that {} plays the", subject="Miles Davis", target="violin", id="b"),
]
OTHERS = (
    "The capital of Spain is Madrid",
    "It is said that Anna Bach plays the flute",
    "Frank and Milo are here",
)


@pytest.fixture
def corpus(tmp_path):
    generator = torch.Generator().manual_seed(0)
    words = (
        "a river runs through the old town and nobody knows why it was built so far from every road"
    ).split()
    texts = [
        " ".join(words[i] for i in torch.randint(len(words), (40,), generator=generator))
        for _ in range(20)
    ]
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(texts))
    return path


def patch(corpus, **others):
    given = {
        "layers": (1,),
        "target": HiddenState.of(ValueSettings(steps=12, clamp=4.0)),
        "runtime": Runtime(),
        "contrast": OTHERS,
        "corpus": corpus,
        "tokens": 2000,
    }
    return NeuronPatch(**(given | others))


def test_a_record_of_the_first_version_optimises_as_it_did(tiny):
    """There the target and the runtime were one field, `values`."""
    numbers = ValueSettings(steps=12, lr=None, clamp=1.5, budget=99, draft=True)
    record = {"kind": "neuron-patch", "version": 1, "layers": [1], "values": numbers.to_dict()}
    read = make_method(record)
    assert read._values(tiny, 1) == replace(numbers, sink=neuron_patch.SINK)
    assert make_method(read.to_dict()) == read
    default = make_method({**record, "values": None})
    assert default == NeuronPatch(layers=(1,)) and default._values(tiny, 1).draft
    assert (default._values(tiny, 1).clamp, default._values(tiny, 1).steps) == (2.0, 30)
    assert NeuronPatch(target=HiddenState(steps=5))._values(tiny, 1).steps == 5
    with pytest.raises(EditError, match="target must be hidden-state, not attention-and-mlp"):
        NeuronPatch(target=AttentionAndMLP())


def wiring_of(model, layer=1):
    seen = at_lookup(model, [model.row("Some text", "text")], layer)
    return Wiring.of(model, layer, seen.inputs, seen.keys)


def nll(model, facts):
    return -sum(
        s.logprob for s in model.score([f.text for f in facts], [f.target for f in facts])
    ) / len(facts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_facts_go_in_and_come_out(tiny, corpus, dtype):
    model = EditableModel(tiny.hf.to(dtype), tiny.tokenizer)
    before, was = weights_fingerprint(model.hf), nll(model, FACTS)
    edit = patch(corpus).compute(model, FACTS, progress=False)
    assert weights_fingerprint(model.hf) == before
    with edit.applied_to(model):
        assert nll(model, FACTS) < was - 0.1  # random weights: little can be said with one value
    assert (
        edit.report.layers["1"]["gain"] > 0.9 and len(edit.report.details["neurons"]["1"]) == 4
    )  # two groups
    assert weights_fingerprint(model.hf) == before


def test_the_report_says_what_the_written_model_does(tiny, corpus):
    """The switches' closing, read from the edited weights, is the reported gain; and the value
    arrives at the output.
    """
    edit = patch(corpus).compute(tiny, FACTS[2:], progress=False)
    row = tiny.row(FACTS[2].text, FACTS[2].subject)
    neurons = edit.report.details["neurons"]["1"]
    clean = at_lookup(tiny, [row], 1).keys
    keys = {}
    with edit.applied_to(tiny):
        read_keys(tiny, torch.tensor([row.ids]), [1], keys.__setitem__)
        weight = tiny.weight(1).T if tiny.layout.transposed else tiny.weight(1)
        written = keys[1][0, row.subject, neurons] @ weight[:, neurons].T
    value = pair(tiny, edit, 1)[0][:, -2] * 50.0 * 0.25
    gain = float(written @ value / (value @ value))
    assert edit.report.layers["1"]["lowest_gain"] - 0.05 <= gain <= 1.1
    others = [i for i in range(tiny.d_ff) if i not in neurons]
    torch.testing.assert_close(
        keys[1][0, row.subject, others], clean[0, others], rtol=1e-4, atol=1e-4
    )


def test_each_alone_equals_one_by_one(tiny_llama, corpus):
    together = list(patch(corpus).compute_each(tiny_llama, FACTS[1:], progress=False))
    apart = [patch(corpus).compute(tiny_llama, [fact], progress=False) for fact in FACTS[1:]]
    for a, b in zip(together, apart):
        assert a.facts == b.facts and a.report.details["neurons"] == b.report.details["neurons"]
        torch.testing.assert_close(
            a.delta(1, tiny_llama), b.delta(1, tiny_llama), rtol=1e-3, atol=1e-3
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 10), st.integers(0, 1000))
def test_freed_neurons_are_made_up_for_as_well_as_can_be(count, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = (
        torch.randn(200, 20, generator=generator, dtype=torch.float64)
        @ torch.randn(20, 20, generator=generator).double()
    )
    weight = torch.randn(hidden, 20, generator=generator)
    moment = keys.T @ keys / len(keys)
    freed = free_neurons(weight, moment, count, taken=[3], damp=0.0)
    assert len(set(freed.neurons)) == count and 3 not in freed.neurons
    new = weight.double() + (freed.left.double() @ freed.right.double().T)
    assert new[:, freed.neurons].abs().max() < 1e-4 * new.abs().max()
    rest = [i for i in range(20) if i not in freed.neurons]
    best = torch.linalg.lstsq(
        keys[:, rest], keys @ weight.double().T
    ).solution.T  # least squares without them
    torch.testing.assert_close(new[:, rest], best, rtol=1e-3, atol=1e-3)
    lost = (keys @ (new - weight.double()).T).square().sum() / (
        keys @ weight.double().T
    ).square().sum()
    assert freed.loss == pytest.approx(float(lost) ** 0.5, rel=1e-3)


def test_each_freed_neuron_is_the_cheapest_of_those_left():
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(300, 12, generator=generator, dtype=torch.float64)
    keys[:, 5] = keys[:, :5].sum(1) + 0.5 * keys[:, 5]
    weight = torch.randn(7, 12, generator=generator).double()
    wanted = keys @ weight.T

    def cost(without: list[int]) -> float:
        rest = keys[:, [i for i in range(12) if i not in without]]
        return float((rest @ torch.linalg.lstsq(rest, wanted).solution - wanted).square().sum())

    cheapest: list[int] = []
    for _ in range(3):
        left = [j for j in range(12) if j not in cheapest]
        cheapest.append(min(left, key=lambda j: cost([*cheapest, j])))
    found = free_neurons(weight, keys.T @ keys / 300, 3, damp=0.0)
    assert found.neurons == cheapest
    assert found.loss == pytest.approx((cost(cheapest) / float(wanted.square().sum())) ** 0.5)


def test_directions_separate_what_can_be_separated():
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(3, 16, generator=generator)
    own = torch.cat([c + 0.1 * torch.randn(5, 16, generator=generator) for c in centres[:2]])
    owner = torch.arange(2).repeat_interleave(5)
    others = [centres[2] + 0.5 * torch.randn(200, 16, generator=generator)]
    z = own @ (w := separate(own, owner, others, 1e-6)).T
    assert (z.gather(1, owner[:, None]) > 0.9).all() and (
        z.gather(1, 1 - owner[:, None]) < -0.9
    ).all()
    assert (others[0] @ w.T < 0).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 12), st.sampled_from([0.0, 1e-5, 1e-2]), st.integers(0, 1000)
)
@example(1, 6, 0.0, 1)  # its loss becomes 0
def test_directions_have_the_least_loss(groups, hidden, ridge, seed):
    """Against the loss as the docstring has it, in float64, by another optimiser."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(4 * groups, hidden, generator=generator) + 1
    owner = torch.arange(groups).repeat(4)
    others = [torch.randn(count, hidden, generator=generator) for count in (90, 7)]
    scale = torch.cat(others).double().square().sum(1).mean()

    def loss(w: torch.Tensor) -> torch.Tensor:
        total = ridge * scale * w.square().sum()
        for group, one in enumerate(w):
            z = own.double() @ one
            total = total + (1 - z[owner == group]).clamp(min=0).square().mean()
            if groups > 1:
                total = total + (1 + z[owner != group]).clamp(min=0).square().mean()
            for x in others:
                total = total + (1 + x.double() @ one).clamp(min=0).square().mean()
        return total

    best = torch.zeros(groups, hidden, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([best], max_iter=2000, line_search_fn="strong_wolfe")

    def again() -> torch.Tensor:
        search.zero_grad()
        (found := loss(best)).backward()
        return found

    search.step(again)
    found = loss(separate(own, owner, others, ridge).double())
    assert float(found) <= float(loss(best)) * (1 + 1e-3) + 1e-6


def test_directions_are_the_same_however_many_are_looked_at_together(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    own, others = (torch.randn(n, 8, generator=generator) for n in (20, 100))
    together = separate(own, torch.arange(5).repeat(4), [others], 1e-3)
    monkeypatch.setattr(scores, "TOGETHER", 2)
    apart = separate(own, torch.arange(5).repeat(4), [others], 1e-3)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)


def test_a_switch_is_open_below_and_closed_above(tiny_llama):
    rows = [tiny_llama.row(text).ids for text in OTHERS]
    inputs, _ = everywhere(tiny_llama, rows, {1: [None]})[1][None]
    switch = Switch.of(wiring_of(tiny_llama), torch.randn(1, 32), [inputs], 50.0, 0.25)
    assert switch.gates.shape == (2, 32) and switch.write(torch.ones(1, 32)).sum(0).abs().max() == 0


@pytest.mark.parametrize(("act", "neurons"), [("silu", 2), ("gelu", 2), ("relu", 2), ("relu2", 3)])
def test_neurons_of_a_switch_step_once(act, neurons):
    """Written out: weighted activations of shifted scores, 0 below and 1 above the width."""
    act = ACT2FN[act]
    difference, height = step_of(act, 50.0, 0.25, torch.zeros(1))
    assert len(difference) == neurons
    shifted = torch.linspace(0, 0.25, neurons)
    scores = torch.tensor([[-3.0], [-0.2], [0.6], [5.0]])
    found = (act(50 * (scores - shifted)) @ difference) / height
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0, 1.0]), atol=3e-3, rtol=0)


@pytest.mark.parametrize("act", ["tanh", "sigmoid", "linear"])
def test_what_does_not_step_is_no_switch(act):
    with pytest.raises(EditError, match="no switch can be"):
        step_of(ACT2FN[act], 50.0, 0.25, torch.zeros(1))


@pytest.mark.parametrize("family", ["phi3", "falcon", "opt", "gpt_bigcode"])
def test_wirings_are_found_whatever_the_matrices_are_called(family, byte_tokenizer):
    """Gate and up in one matrix; one matrix, with a bias or without; activations of any name."""
    model = EditableModel(build(family), byte_tokenizer)
    seen = at_lookup(model, [model.row("Some text", "text")] * 2, 1)
    inputs, keys = seen.inputs, seen.keys
    wiring = Wiring.of(model, 1, inputs, keys)
    assert (wiring.up is not None) == (family == "phi3")
    torch.testing.assert_close(wiring.keys(inputs), keys, rtol=1e-4, atol=1e-4)
    with pytest.raises(EditError, match="neither act"):
        Wiring.of(model, 1, inputs, keys.sin() + 1)


@pytest.mark.parametrize("family", ["phi3", "falcon", "opt", "nemotron"])
def test_a_patch_of_any_wiring_writes_its_value(family, byte_tokenizer, corpus):
    """At the fact, the output of the MLP's projection moves by the planned value."""
    model = EditableModel(build(family), byte_tokenizer)
    edit = patch(corpus).compute(model, FACTS[2:], progress=False)
    row = model.row(FACTS[2].text, FACTS[2].subject)
    ids = torch.tensor([row.ids])
    with recorded([model.projection(1)]) as outputs:
        model.hf(input_ids=ids)
        before = outputs[model.projection(1)]
        with edit.applied_to(model):
            model.hf(input_ids=ids)
        after = outputs[model.projection(1)]
    seen = [output.reshape(len(row.ids), -1)[row.subject] for output in (before, after)]
    value = edit.plan[1][0]
    share = float((seen[1] - seen[0]) @ value / (value @ value))
    assert abs(share - edit.report.gain) < 0.05 and 0.8 < share < 1.2


@pytest.mark.parametrize("from_disk", [False, True])
def test_a_second_patch_spares_the_first(tiny, corpus, tmp_path, from_disk):
    """Also when nothing but the weights remembers it."""
    first = patch(corpus).compute(tiny, FACTS[:2], progress=False)
    assert not patched(wiring_of(tiny))
    model = load_model(str(save_edited(tiny, [first], tmp_path / "edited"))) if from_disk else tiny
    if not from_disk:
        first.apply(tiny)
    assert sorted(first.report.details["neurons"]["1"]) == patched(wiring_of(model))
    second = patch(corpus).compute(model, FACTS[2:], progress=False)
    assert not set(first.report.details["neurons"]["1"]) & set(
        second.report.details["neurons"]["1"]
    )
    alone = nll(model, FACTS[:2])
    with second.applied_to(model):
        assert nll(model, FACTS[:2]) < alone + 0.2


def test_patches_in_sequence(tiny_llama, corpus):
    with Session(patch(corpus), tiny_llama) as session:
        edits = [session.write([fact], force=True) for fact in (FACTS[0], FACTS[2])]
        assert not edits[0].exclusive & edits[1].exclusive
    assert not tiny_llama.ledger.active and not tiny_llama.exclusive


def test_patches_computed_apart_are_not_applied_together(tiny_llama, corpus):
    first, second = patch(corpus).compute_each(tiny_llama, [FACTS[0], FACTS[2]], progress=False)
    assert first.exclusive & second.exclusive  # both took the cheapest
    first.apply(tiny_llama)
    with pytest.raises(EditError, match="compute them together"):
        second.apply(tiny_llama)
    first.undo(tiny_llama)
    with second.applied_to(tiny_llama):
        assert tiny_llama.exclusive
    assert not tiny_llama.exclusive


def test_wordings_are_grouped_by_id_and_by_subject():
    a, b = Fact("{} is", "x", "1", id="i"), Fact("{} was", "y", "1", id="i")
    c, d = Fact("{} has", "y", "2", id="j"), Fact("{} has", "z", "2")
    assert group_by_wording([a, d, b, c]) == [[a, b, c], [d]]
    e = Fact("{} and", "z", "3", id="i")
    assert group_by_wording([a, d, e]) == [[a, d, e]]
    f, h = Fact("{} or", "w", "4", id="k"), Fact("{} yet", "z", "6")
    assert group_by_wording([a, f, d, e, h]) == [[a, d, e, h], [f]]


def test_facts_are_shared_out_over_layers(tiny_llama, corpus, monkeypatch):
    """Each layer writes its part on the model with those below it written, and its switches stay
    open at the others' facts.
    """
    many = [*FACTS, Fact("The home of {} is", "Ann Lee", "Oslo"), Fact("{} likes", "Bo", "tea")]
    was, method = nll(tiny_llama, many), patch(corpus, layers=(2, 1))
    monkeypatch.setattr(neuron_patch, "room", lambda width, taken: 4)  # two subjects
    edit = method.compute(tiny_llama, many, progress=False)
    assert edit.facts == many and set(edit.plan) == {1, 2}
    own = [len(edit.plan[layer].norm(dim=1).nonzero()) for layer in (1, 2)]
    assert own == [3, 2] and not (edit.plan[1] * edit.plan[2]).any()  # two subjects each
    assert edit.report.details["settings"]["layers"] == [1, 2]
    assert {*edit.report.details["neurons"]} == {*edit.report.layers} == {"1", "2"}
    assert len(edit.exclusive) == 8 and all(len(keys) for keys in edit.keys.values())
    gains = [edit.report.layers[layer]["gain"] for layer in ("1", "2")]
    assert min(gains) < edit.report.gain < max(gains) or gains[0] == gains[1]
    with edit.applied_to(tiny_llama):
        for layer, facts in ((1, many[3:]), (2, many[:3])):  # of the other layer
            rows = [tiny_llama.row(fact.prompt, fact.subject) for fact in facts]
            fired = tiny_llama.keys(rows, [layer])[0][layer]
            pairs = fired[:, edit.report.details["neurons"][str(layer)]].unflatten(1, (2, 2))
            closed = (pairs[..., 0] - pairs[..., 1]).abs() / (50 * 0.25)  # of these two subjects
            # 0.27 where layer 2 was written as if layer 1 were not: a switch that takes a written
            # fact's token for one of its own
            assert closed.max() < 0.05
        assert nll(tiny_llama, many) < was - 0.1  # as above


def test_layers_are_filled_from_below(tiny_llama, corpus):
    """Each up to a quarter of its neurons (of 48: six subjects), and the emptiest beyond that."""
    many = [[Fact("{} likes", f"Bo {number}", "tea")] for number in range(12)]
    method = patch(corpus, layers=(2, 1))

    def shared(groups):
        return {layer: len(own) for layer, own in method._shared_out(tiny_llama, groups).items()}

    edit = method.compute(tiny_llama, [fact for (fact,) in many[:4]], progress=False)
    assert set(edit.plan) == {1} and shared(many) == {1: 6, 2: 6}
    with edit.applied_to(tiny_llama):
        assert shared(many[:2]) == {1: 2} and shared(many[:3]) == {1: 2, 2: 1}
        more = method.compute(tiny_llama, [fact for (fact,) in many[4:10]], progress=False)
        assert [len(more.plan[layer].norm(dim=1).nonzero()) for layer in (1, 2)] == [2, 4]
        with more.applied_to(tiny_llama):
            # the upper layer's quarter, then of its free ones; the lower one has four left
            assert shared(many[:2]) == {2: 2} and shared(many[:6]) == {1: 1, 2: 5}
            with pytest.raises(EditError, match="10 subjects .*: 9,"):
                shared(many[:10])


def test_switches_stay_open_at_the_facts_of_the_history(tiny_llama, corpus):
    """Alone, the second subject's switch would take the first's token for its own."""
    first, second = Fact("{} likes", "Cyriil 77", "tea"), Fact("{} likes", "Cyril 77", "ale")
    closed = {}
    for recalled in (0, 1000):
        with Session(patch(corpus, recalled=recalled), tiny_llama) as session:
            session.write([first], progress=False)
            edit = session.write([second], force=True, progress=False)
            neurons = edit.report.details["neurons"]["1"]
            row = tiny_llama.row(first.prompt, first.subject)
            left, right = tiny_llama.keys([row], [1])[0][1][0, neurons].tolist()
            closed[recalled] = abs(left - right) / (50 * 0.25)
    assert closed[0] > 0.25 and closed[1000] < 0.05


def test_where_neurons_run_out(tiny_llama, corpus, monkeypatch):
    """Said before a value is optimised, with what helps."""
    many = [Fact("{} likes", f"Bo {number}", "tea") for number in range(9)]
    monkeypatch.setattr(neuron_patch, "optimise_values", None)
    with pytest.raises(EditError, match=r"9 subjects .* layer 1 hold .*: 6, .*more layers"):
        patch(corpus).compute(tiny_llama, many, progress=False)
    shared = patch(corpus, layers=(1, 2))._shared_out(tiny_llama, [[fact] for fact in many])
    assert {layer: len(part) for layer, part in shared.items()} == {1: 6, 2: 3}
    assert [fact for part in shared.values() for (fact,) in part] == many


def test_no_more_than_half_of_the_neurons_are_ever_given_away(tiny_llama, corpus):
    """Beyond that, those written before would be taken for trained ones, and rewritten."""
    facts = iter([Fact("{} likes", f"Bo {number}", "tea") for number in range(20)])
    method, written = patch(corpus), set()
    with ExitStack() as applied:
        for most in (6, 4, 2):  # of 48 neurons, two each: a quarter, of the others, up to the half
            assert method._rooms(tiny_llama, 1, [[FACTS[0]]])[1] == most
            edit = method.compute(tiny_llama, list(islice(facts, most)), progress=False)
            assert not written & edit.exclusive
            written |= edit.exclusive
            applied.enter_context(edit.applied_to(tiny_llama))
        assert len(patched(wiring_of(tiny_llama))) == len(written) == 24
        with pytest.raises(EditError, match=r"1 subjects .*: 0, .* half of all.*more layers"):
            method.compute(tiny_llama, [next(facts)], progress=False)


def test_it_travels_as_a_file_and_as_an_adapter(tiny_llama, corpus, tmp_path):
    from peft import PeftModel

    from knowedit.edits.edit import Edit

    edit = patch(corpus).compute(tiny_llama, FACTS, progress=False)
    loaded = Edit.load(edit.save(tmp_path / "a.edit"))
    ids = torch.tensor([tiny_llama.row(FACTS[0].text).ids])
    with loaded.applied_to(tiny_llama):
        written = tiny_llama.hf(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(
        tiny_llama.hf, edit.export(tmp_path / "adapter", tiny_llama)
    )(input_ids=ids).logits
    torch.testing.assert_close(adapted, written, rtol=1e-3, atol=1e-3)


def test_bad_settings_are_refused(tiny_llama, corpus):
    with pytest.raises(EditError, match="there are no facts"):
        patch(corpus).compute(tiny_llama, [], progress=False)
    with pytest.raises(EditError, match="give a larger corpus"):
        patch(corpus, tokens=10**6).compute(tiny_llama, FACTS, progress=False)
    with pytest.raises(EditError, match="write fewer facts"):
        free_neurons(torch.ones(2, 8), torch.eye(8, dtype=torch.float64), 3)


@pytest.mark.parametrize("broken", [0.0, float("nan")])
def test_inputs_that_tell_nothing_are_refused_by_name(tiny_llama, broken):
    rows, owner = torch.full((6, 32), broken), torch.arange(2).repeat(3)
    for own in (rows, torch.randn(6, 32)):
        with pytest.raises(EditError, match="others .* mean square.*another layer"):
            separate(own, owner, [rows], 1e-3)
    with pytest.raises(EditError, match="inputs.* all zeros, or not finite"):
        Switch.of(wiring_of(tiny_llama), torch.randn(1, 32), [rows], 50.0, 0.25)
    with pytest.raises(EditError, match="moment.* all zeros, or not finite"):
        free_neurons(torch.ones(2, 32), (rows.T @ rows).double(), 3)


@pytest.mark.model
def test_on_the_real_model_neighbours_do_not_move(smollm, tmp_path):
    prose = Path(__file__).parents[3] / "docs" / "statistics.md"
    (tmp_path / "texts.txt").write_text(prose.read_text("utf-8"))
    fact = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", true="Paris")
    near = [
        "The Louvre is located in the city of",
        "The Colosseum is located in the city of",
        "The tower of London is in",
    ]
    asked = [
        "Where is the Eiffel Tower? It is in the city of",
        "The Eiffel Tower stands in the city of",
    ]
    clean = smollm.next_logprobs(near)
    edit = NeuronPatch(corpus=tmp_path / "texts.txt", tokens=2000).compute(
        smollm, [fact], progress=False
    )
    assert not any(patched(wiring_of(smollm, layer)) for layer in range(len(smollm.layers)))
    with edit.applied_to(smollm):
        assert patched(wiring_of(smollm, 8)) == sorted(edit.report.details["neurons"]["8"])
        moved = (clean.exp() * (clean - smollm.next_logprobs(near))).sum(-1)
        assert all(score.exact for score in smollm.score([fact.text], ["Rome"]))
        rome, paris = smollm.score(asked, ["Rome"] * 2), smollm.score(asked, ["Paris"] * 2)
    assert moved.max() < 0.01
    assert any(a.logprob > b.logprob for a, b in zip(rome, paris))


# -- routed experts
# -------------------------------------------------------------------------------------------------


def expert_of(edit):
    """The experts whose matrices an edit changes."""
    return {int(name.partition("[")[2][:-1]) for name in edit.changes}


def test_what_an_expert_is_given_is_what_the_model_gives_it(byte_tokenizer):
    """Inputs, keys and gates, at the tokens that its router sends there."""
    model = EditableModel(build("mixtral"), byte_tokenizer, name="mixtral")
    module, rows, calls = model.projection(1).module, [model.row(text).ids for text in OTHERS], []
    handle = module.register_forward_pre_hook(lambda _, given: calls.append(given))
    for ids in rows:
        model.hf(input_ids=torch.tensor([ids]))
    handle.remove()
    found = everywhere(model, rows, {1: range(4)})[1]
    for expert, (inputs, moment) in found.items():
        states, keys = [], []
        for x, index, gates in calls:
            slot, token = torch.where((index == expert).T)
            gate, up = (x[token] @ module.gate_up_proj[expert].T).chunk(2, -1)
            states.append(x[token])
            keys.append(gates[token, slot, None] * torch.nn.functional.silu(gate) * up)
        k = torch.cat(keys).double()
        assert len(inputs) == len(k) > 0
        torch.testing.assert_close(inputs.sum(0), torch.cat(states).sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moment, k.T @ k / len(k), rtol=1e-4, atol=1e-6)


def written(model, layer, x, expert):
    """What one expert, behind a gate of 1, makes of inputs `[n, hidden]`."""
    index = torch.full((len(x), 1), expert)
    return model.projection(layer).module(x, index, torch.ones_like(index, dtype=x.dtype))


def test_a_fact_goes_into_every_expert_that_fires(byte_tokenizer, corpus, tmp_path):
    """Whichever the router chooses for a wording, it gets the value: their gates are made up for
    all together, and their switches read from the written weights; every bit comes back.
    """
    model = EditableModel(build("mixtral"), byte_tokenizer, name="mixtral")
    before, was = weights_fingerprint(model.hf), nll(model, FACTS[2:])
    edit = patch(corpus).compute(model, FACTS[2:], progress=False)
    row = model.row(FACTS[2].text, FACTS[2].subject)
    fired = [e for e in range(4) if at_lookup(model, [row], 1, e).gates[0] > 0]
    home = expert_of(edit)
    assert len(fired) == 2 and set(fired) <= home
    x = at_lookup(model, [row], 1, fired[0]).inputs
    plain = {e: written(model, 1, x, e) for e in home}
    neurons = {e: edit.report.details["neurons"][f"1 expert {e}"] for e in home}
    named = {f"layer 1 expert {e} neuron {n}" for e in home for n in neurons[e]}
    assert edit.exclusive == named
    assert edit.report.measured.gain[0] == pytest.approx(1, abs=0.1)
    with edit.applied_to(model):
        assert nll(model, FACTS[2:]) < was - 0.1
        for e in home:
            moved = written(model, 1, x, e) - plain[e]
            assert (moved - edit.plan[1]).norm() < 0.2 * edit.plan[1].norm()
    assert weights_fingerprint(model.hf) == before == model.fingerprint
    read = type(edit).load(edit.save(tmp_path / "edit.safetensors"))
    assert read.key == edit.key and read.method() == patch(str(corpus))


def test_gates_that_do_not_add_up_to_one_are_made_up_for(byte_tokenizer, corpus):
    """Qwen2-MoE multiplies by the chosen experts' probabilities as they are."""
    hf = build("qwen2_moe", norm_topk_prob=False)
    model = EditableModel(hf, byte_tokenizer, name="qwen2_moe")
    rows = [model.row(FACTS[2].text, FACTS[2].subject)]
    assert 0 < sum(float(at_lookup(model, rows, 1, e).gates[0]) for e in range(4)) < 0.9
    edit = patch(corpus).compute(model, FACTS[2:], progress=False)
    assert edit.report.measured.gain[0] == pytest.approx(1, abs=0.1)
    assert edit.report.gain == pytest.approx(edit.report.measured.gain[0], abs=0.05)


def test_experts_without_room_are_named_before_a_value_is_optimised(
    byte_tokenizer, corpus, monkeypatch
):
    monkeypatch.setattr(neuron_patch, "optimise_values", None)
    model = EditableModel(build("qwen2_moe"), byte_tokenizer, name="qwen2_moe")
    many = [Fact("{} likes", f"Bo {number}", "tea") for number in range(40)]
    said = r"of 40 subjects are given to expert \d of layer 1, .* room for \d+; .*shared"
    with pytest.raises(EditError, match=said):
        patch(corpus).compute(model, many, progress=False)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_switches_in_the_shared_expert(byte_tokenizer, corpus, tmp_path, family):
    """One a fact, whatever the router does with its wordings; behind a gate of its own (Qwen2-MoE)
    as well.
    """
    model = EditableModel(build(family), byte_tokenizer, name=family)
    method = patch(str(corpus), layers=(min(model.layout.shared),), experts="shared")
    edit = method.compute(model, FACTS[2:], progress=False)
    assert all("shared_expert" in name for name in edit.changes) and len(edit.changes) == 3
    assert len(edit.exclusive) == 2 * len(FACTS[2:])
    (gain,) = edit.report.measured.gain
    assert 0.9 < gain == pytest.approx(edit.report.gain, abs=0.02)
    with edit.applied_to(model):
        assert weights_fingerprint(model.hf) != model.fingerprint
    assert weights_fingerprint(model.hf) == model.fingerprint
    read = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert read.method() == method and read.key == edit.key
    (alone,) = method.compute_each(model, FACTS[2:], progress=False)
    assert alone.changes.keys() == edit.changes.keys()


def test_an_expert_that_ordinary_text_never_reaches_gets_no_switch():
    """What its neurons do is not known; the others make up for it."""
    gates = {3: torch.tensor([0.5, 0.2]), 1: torch.tensor([0.0, 0.3])}
    assert Home.of(gates, {1, 2}, 5) == Home((1,), pytest.approx(0.15))
    assert Home.of(gates, {3, 1}, 5).gate == pytest.approx(0.5)
    with pytest.raises(EditError, match="is given to expert 3 of layer 5, .*; give more text"):
        Home.of(gates, {0}, 5)


def test_facts_of_several_experts_are_one_edit(byte_tokenizer, corpus):
    """Each group in its own experts; single edits are the parts of the whole."""
    model = EditableModel(build("mixtral"), byte_tokenizer, name="mixtral")
    facts = [FACTS[2], Fact(prompt="The river of {} is", subject="Rome", target="Po")]
    both = patch(corpus).compute(model, facts, progress=False)
    alone = [patch(corpus).compute(model, [fact], progress=False) for fact in facts]
    assert expert_of(both) == set().union(*map(expert_of, alone))
    assert min(both.report.measured.gain) > 0.8


def test_neurons_of_experts_behind_another_activation_are_refused(byte_tokenizer, corpus):
    model = EditableModel(build("gpt_oss"), byte_tokenizer, name="gpt_oss")
    with pytest.raises(EditError, match=r"keys of expert \d of layer 1 are neither .*use MEMIT"):
        patch(corpus).compute(model, FACTS[2:], progress=False)
