"""Tokens with a subject in them, keys, scores and fingerprints, on tiny models and on the real
one (unit, model).
"""

import copy

import pytest
import torch
from torch import nn

from knowedit.errors import EditError, ModelError
from knowedit.evaluation import evaluate
from knowedit.facts.fact import Fact
from knowedit.methods import FTL, MEMIT, FineTuning, LoRA, MetaKE, Session
from knowedit.methods.locate.targets import HiddenState
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.models.load import as_editable, load_model
from knowedit.models.structure import detect
from knowedit.models.tokens import Row, batches, join
from knowedit.statistics import key_statistics
from tests.knowedit.models.tiny import build

TEXTS = [
    ("The capital of France is", "France"),
    ("In Rome, the language of Brazil is", "Brazil"),
    ("Miles Davis plays", "Davis"),
]


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny(request):
    return request.getfixturevalue(request.param)


def test_row_finds_the_subjects_last_token(smollm):
    row = smollm.row("The capital of France, yes France, is", "France", "Lyon")
    assert smollm.tokenizer.decode([row.ids[row.subject]]).strip() == "France"
    assert (
        smollm.tokenizer.decode(row.ids[: row.subject + 1]) == "The capital of France, yes France"
    )
    assert smollm.tokenizer.decode(row.ids[row.answer :]) == " Lyon"


def test_row_of_a_long_subject_points_at_its_last_token(smollm):
    row = smollm.row("The mother tongue of Danielle Darrieux is", "Danielle Darrieux")
    assert (
        smollm.tokenizer.decode(row.ids[: row.subject + 1])
        == "The mother tongue of Danielle Darrieux"
    )


@pytest.mark.parametrize(
    ("prompt", "subject", "answer", "message"),
    [
        ("The capital of France is", "Spain", None, "does not occur"),
        ("The capital of France is", "The capi", None, "ends inside the token ' capital'"),
        ("The capital of France is", "France", " ", "no tokens"),
        ("", None, "Lyon", "no prompt"),
        ("word " * 9000, None, None, "context"),
    ],
)
def test_row_refuses_with_the_reason(smollm, prompt, subject, answer, message):
    with pytest.raises(EditError, match=message):
        smollm.row(prompt, subject, answer)


def test_join_puts_one_space():
    assert join("a", "b") == "a b"
    assert join("a\n", " b ") == "a\nb"
    assert join("", "b") == "b"
    assert join("2+2=", "5") == "2+2=5" and join("2 + 2 =", "5") == "2 + 2 = 5"


def test_batches_stay_within_the_budget_and_lose_nothing():
    lengths = [3, 9, 1, 4, 4, 20, 2]
    found = batches(lengths, 12)
    assert sorted(i for group in found for i in group) == list(range(7))
    assert all(len(g) * max(lengths[i] for i in g) <= 12 or len(g) == 1 for g in found)


def test_keys_are_the_projections_inputs(tiny):
    rows = [tiny.row(text, subject) for text, subject in TEXTS]
    keys, outputs = tiny.keys(rows, [0, 2], outputs=True)
    one_by_one, _ = tiny.keys(rows, [2], budget=1)
    torch.testing.assert_close(keys[2], one_by_one[2], rtol=1e-4, atol=1e-5)
    for i, row in enumerate(rows):
        seen = {}
        handle = tiny.projection(2).register_forward_hook(
            lambda _m, x, y, seen=seen: seen.update(k=x[0])
        )
        states = tiny.hf(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        handle.remove()
        torch.testing.assert_close(keys[2][i], seen["k"][0, row.subject], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs[i], states[3][0, row.subject], rtol=1e-4, atol=1e-5)


def test_a_partial_pass_stops_below_the_next_layer(tiny):
    ran = []
    handles = [
        layer.register_forward_hook(lambda *_a, i=i: ran.append(i))
        for i, layer in enumerate(tiny.layers)
    ]
    projected = []
    handles.append(tiny.projection(1).register_forward_hook(lambda *_a: projected.append(1)))
    tiny.keys([Row([1, 2, 3], 2)], [0, 1])
    for handle in handles:
        handle.remove()
    assert ran == [0] and projected == []


def test_a_missing_layer_is_named(tiny):
    with pytest.raises(ModelError, match=r"layer 7 does not exist.*0\.\.3"):
        tiny.keys([Row([1, 2], 1)], [7])


def test_score_equals_a_plain_forward(tiny):
    prompts = ["The capital of France is", "The capital of France is", "The capital", "Rome"]
    answers = ["Lyon", "Lyons, of course", "of", "is far"]
    for prompt, answer, score in zip(prompts, answers, tiny.score(prompts, answers)):
        row = tiny.row(prompt, answer=answer)
        logp = tiny.hf(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        wanted = [logp[t - 1, row.ids[t]] for t in range(row.answer, len(row.ids))]
        assert score.logprob == pytest.approx(float(sum(wanted)) / len(wanted), rel=1e-5)
        assert score.exact == all(
            int(logp[t - 1].argmax()) == row.ids[t] for t in range(row.answer, len(row.ids))
        )


def test_score_runs_shared_prefixes_once(tiny):
    seen = []
    handle = tiny.hf.base_model.register_forward_pre_hook(
        lambda _m, a, k: seen.append(k["input_ids"]), with_kwargs=True
    )
    tiny.score(["abc", "abc", "abcd"], ["x", "y", "z"])
    handle.remove()
    assert sum(len(ids) for ids in seen) == 2  # "abc " twice over is one row, "abcd " another


def test_next_logprobs_and_generate_agree(smollm):
    prompts = ["The capital of France is", "Two plus two is", "Hello, my name is what? It is"]
    first = [smollm.tokenizer.decode([int(i)]) for i in smollm.next_logprobs(prompts).argmax(-1)]
    for token, text in zip(first, smollm.generate(prompts, 3)):
        assert text.startswith(token)


def test_parameters_that_are_not_in_memory_are_refused(tiny_llama):
    with torch.device("meta"):
        hf = type(tiny_llama.hf)(tiny_llama.hf.config)
    with pytest.raises(
        ModelError, match=r"tensors of .* are not in memory \(model\.embed.*device_map"
    ):
        EditableModel(hf, tiny_llama.tokenizer)


def test_a_model_made_in_inference_mode_is_refused(tiny_llama):
    with torch.inference_mode():
        other = copy.deepcopy(tiny_llama.hf)
    with pytest.raises(ModelError, match="inference_mode.*load it outside"):
        EditableModel(other, tiny_llama.tokenizer)


def test_no_prompts(tiny):
    assert tiny.score([], []) == [] and tiny.generate([]) == []
    assert tiny.next_logprobs([]).shape == (0, tiny.hf.config.vocab_size)


def test_the_default_model_is_the_right_one(smollm):
    assert smollm.score(["The capital of France is"], ["Paris"])[0].probability == pytest.approx(
        0.77, abs=0.05
    )
    assert (len(smollm.layers), smollm.hidden, smollm.d_ff) == (30, 576, 1536)


def test_one_flipped_bit_changes_the_fingerprint(tiny):
    before = weights_fingerprint(tiny.hf)
    weight = tiny.weight(1).view(torch.int32)
    weight[3, 5] ^= 1
    assert weights_fingerprint(tiny.hf) != before
    weight[3, 5] ^= 1
    assert weights_fingerprint(tiny.hf) == before


def test_swapped_weights_change_the_fingerprint(tiny):
    before = weights_fingerprint(tiny.hf)
    weight = tiny.weight(1)
    weight.data = weight.data.flip(0).contiguous()
    assert weights_fingerprint(tiny.hf) != before


def test_virtual_equals_the_written_weight(tiny):
    torch.manual_seed(1)
    left, right = torch.randn(tiny.hidden, 2), torch.randn(tiny.d_ff, 2)
    ids = torch.tensor([[1, 2, 3, 4]])
    with tiny.virtual({1: (left, right)}):
        virtual = tiny.hf(input_ids=ids).logits
    clean = tiny.hf(input_ids=ids).logits
    weight = tiny.weight(1)
    original = weight.clone()
    weight.data += (right @ left.T) if tiny.layout.transposed else (left @ right.T)
    torch.testing.assert_close(virtual, tiny.hf(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    weight.data.copy_(original)
    torch.testing.assert_close(clean, tiny.hf(input_ids=ids).logits)


def test_samples_depend_on_seed_and_number_only(tiny):
    def take(start, count, seed=3):
        source = tiny.samples(seed, start, batch=4, length=8)
        return [next(source) for _ in range(count)]

    assert take(0, 6) == take(0, 6)
    assert take(0, 6)[3:] == take(3, 3)
    assert take(0, 4) != take(0, 4, seed=4)


def test_a_plain_transformers_model_is_left_as_it_is(tiny):
    """In training mode, with dropout and trainable weights."""
    prompts, answers = ["The capital of France is", "Rome"], ["Lyon", "is far"]
    wanted = tiny.score(prompts, answers), tiny.generate(prompts, 3)
    hf = tiny.hf.train().requires_grad_(True)
    names = set(vars(hf))
    model = load_model(hf, tokenizer=tiny.tokenizer)
    assert (model.score(prompts, answers), model.generate(prompts, 3)) == wanted
    model.keys([Row([1, 2, 3], 2)], [0, 1])
    assert all(module.training for module in hf.modules()) and set(vars(hf)) == names
    assert all(p.requires_grad and p.grad is None for p in hf.parameters())


def test_all_around_one_model_see_its_edits(tiny):
    again = as_editable(tiny.hf, tiny.tokenizer)
    fingerprint = again.fingerprint
    name = tiny.layout.weight_name(1)
    change = torch.ones(tiny.hidden, 1), torch.ones(tiny.d_ff, 1)
    tiny.ledger.add_many("some edit", {name: change})
    third = as_editable(tiny.hf, tiny.tokenizer)
    assert again.ledger.active == third.ledger.active == ("some edit",)
    assert third.fingerprint == fingerprint
    third.ledger.remove("some edit")
    assert not tiny.ledger.active


def test_what_is_no_model_is_named(tiny):
    assert as_editable(tiny) is tiny
    with pytest.raises(ModelError, match="got int"):
        as_editable(5)
    with pytest.raises(ModelError, match="pass tokenizer="):
        as_editable(copy.deepcopy(tiny.hf))
    with pytest.raises(ModelError, match="has its tokenizer already"):
        as_editable(tiny, tokenizer=object())
    with pytest.raises(ModelError, match="Linear is not a Hugging Face"):
        as_editable(nn.Linear(2, 2), tiny.tokenizer)
    with pytest.raises(ModelError, match="tokenizer='gpt2' is only a name; pass AutoTokenizer"):
        load_model(tiny.hf, "gpt2")


def test_a_tokenizer_goes_with_a_transformers_model_everywhere(tiny):
    """To a function by name, and to load_model in second place."""
    fact = Fact("The capital of {} is", "France", "Lyon", true="Paris")
    method, hf = FTL(steps=1, layers=(1,)), copy.deepcopy(tiny.hf)
    edit = method.compute(hf, [fact], tokenizer=tiny.tokenizer, progress=False)
    assert edit.key == method.compute(tiny, [fact], progress=False).key
    other = copy.deepcopy(tiny.hf)
    found = evaluate(other, edit, [fact], tokenizer=tiny.tokenizer, progress=False)
    assert found.to_dict() == evaluate(tiny, edit, [fact], progress=False).to_dict()
    assert load_model(copy.deepcopy(tiny.hf), tiny.tokenizer).tokenizer is tiny.tokenizer


def test_arguments_in_the_wrong_order_get_the_right_one(tiny):
    fact = Fact("The capital of {} is", "France", "Lyon", true="Paris")
    with pytest.raises(ModelError, match=r"^Session\(method, model, .*\): .* got MEMIT$"):
        Session(tiny, MEMIT())
    with pytest.raises(ModelError, match=r"^evaluate\(model, edit, facts, .* got list$"):
        evaluate([fact], None, tiny)


def test_the_whole_path_with_a_transformers_model_in_training_mode(tiny):
    """Statistics, an edit, applied, evaluated and undone; nothing of the model is changed."""
    fact = Fact("The capital of {} is", "France", "Lyon", true="Paris")
    method = MEMIT(layers=(1, 2), target=HiddenState(steps=4, lr=0.5))
    wanted = method.compute(
        tiny, [fact], key_statistics(tiny, [1, 2], "self", tokens=2000, progress=False)
    )
    hf = tiny.hf.train().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    statistics = key_statistics(hf, [1, 2], "self", tokens=2000, progress=False)
    edit = method.compute(hf, [fact], statistics, progress=False)
    assert edit.key == wanted.key
    edit.apply(hf)
    assert edit.is_applied(hf) and not torch.equal(
        tiny.weight(1), before[tiny.layout.weight_name(1)]
    )
    edit.undo(hf)
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf.state_dict().items())
    assert all(module.training for module in hf.modules())
    assert all(p.requires_grad and p.grad is None for p in hf.parameters())
    with pytest.raises(ModelError, match="only a name; load it first"):
        edit.apply("some/model")


#: Modes of torch that a caller may be in.
MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_caller_change_nothing(byte_tokenizer, mode):
    fact = Fact("The capital of {} is", "France", "Lyon")
    method = MEMIT(layers=(1, 2), target=HiddenState(steps=3, lr=0.5))

    def made(hf):
        model = EditableModel(hf, byte_tokenizer, name="tiny")
        statistics = key_statistics(model, [1, 2], "self", tokens=2000, progress=False)
        edit = method.compute(hf, [fact], statistics, progress=False)
        edit.apply(hf)
        edit.undo(hf)
        return edit.key

    wanted, hf = made(build("llama")), build("llama")
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    with MODES[mode]():
        assert made(hf) == wanted
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf.state_dict().items())


@pytest.mark.parametrize("kind", ["ft", "lora", "metake"])
def test_training_leaves_no_gradient_behind(tiny_llama, kind):
    fact = Fact("The capital of {} is", "France", "Lyon", true="Paris")
    method = {
        "ft": FineTuning(steps=2),
        "lora": LoRA(steps=2),
        "metake": MetaKE(layers=(1, 2), target=HiddenState(steps=4, lr=0.5)),
    }[kind]
    hf = tiny_llama.hf.train().requires_grad_(True)
    names = set(vars(hf))
    statistics = key_statistics(hf, [1, 2], "self", tokens=2000, progress=False)
    method.compute(hf, [fact], statistics if kind == "metake" else None, progress=False)
    assert all(module.training for module in hf.modules()) and set(vars(hf)) == names
    assert all(p.requires_grad and p.grad is None for p in hf.parameters())


def test_the_tokenizer_saved_with_a_model_is_found(smollm):
    assert load_model(smollm.hf).row("Rome is").ids == smollm.row("Rome is").ids


@pytest.mark.parametrize("what", ["model", "layers"])
def test_compiled_code_runs_as_it_is_written(tiny_llama, what):
    """Compiled code passes over hooks that it was not compiled with."""
    model, row = tiny_llama, tiny_llama.row("Rome is in Italy", "Rome")
    wanted, outputs = model.keys([row], [1, 2], outputs=True)
    for module in [model.hf] if what == "model" else model.layers:
        module.compile(backend="eager")
    with torch.no_grad():
        said = model.hf(torch.tensor([row.ids])).logits  # compiled, without hooks
    again = EditableModel(model.hf, model.tokenizer)
    found, others = again.keys([row], [1, 2], outputs=True)
    assert all(torch.equal(found[layer], wanted[layer]) for layer in (1, 2))
    assert torch.equal(others, outputs)
    pair = torch.ones(32, 1), torch.ones(48, 1)
    with again.virtual({2: pair}):
        moved = again.next_logprobs(["Rome is in Italy"])
    assert not torch.allclose(moved, again.next_logprobs(["Rome is in Italy"]))
    with torch.no_grad():
        assert torch.equal(model.hf(torch.tensor([row.ids])).logits, said)


def test_a_compiled_model_is_the_model_inside(tiny_llama):
    compiled = torch.compile(tiny_llama.hf, backend="eager")
    assert load_model(compiled).hf is tiny_llama.hf
    model = EditableModel(compiled, tiny_llama.tokenizer)
    assert model.hf is tiny_llama.hf and model.ledger is tiny_llama.ledger


def test_a_head_for_fewer_tokens_than_are_read(tiny_llama, byte_tokenizer):
    tiny_llama.hf.lm_head = torch.nn.Linear(32, 200, bias=False).requires_grad_(False)
    with pytest.raises(ModelError, match="has 258 tokens and the model"):
        EditableModel(tiny_llama.hf, byte_tokenizer)
    tiny_llama.hf.lm_head = torch.nn.Linear(32, 257, bias=False).requires_grad_(False)
    model = EditableModel(tiny_llama.hf, byte_tokenizer)  # its last token is an added one
    assert model.score(["<eos>Rome is in"], ["Italy"])[0].logprob < 0
    with pytest.raises(EditError, match="no logit for its token '<eos>'"):
        model.score(["Rome is in"], ["<eos>"])


def test_its_repr_fits_a_screen(tiny):
    tiny.ledger.add_many("an edit", {tiny.layout.weight_name(0): torch.zeros_like(tiny.weight(0))})
    lines = repr(tiny).splitlines()
    assert len(lines) <= 6 and max(map(len, lines)) <= 120 and "an edit" in lines[-1]


class TestRefusals:
    def test_an_encoder_decoder(self):
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            d_model=8,
            d_ff=8,
            d_kv=4,
            num_layers=1,
            num_heads=2,
            vocab_size=16,
            decoder_start_token_id=0,
        )
        with pytest.raises(ModelError, match="encoder-decoder"):
            detect(T5ForConditionalGeneration(config))

    def test_a_model_without_a_head(self):
        from transformers import GPT2Config, GPT2Model

        with pytest.raises(ModelError, match="head"):
            detect(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)))

    def test_experts_that_are_not_held_in_one_parameter(self, tiny_llama):
        for layer in tiny_llama.layers:
            layer.mlp.experts = torch.nn.ModuleList([layer.mlp.up_proj, layer.mlp.gate_proj])
        with pytest.raises(ModelError, match="mixture of experts that are not held in one"):
            detect(tiny_llama.hf)

    def test_quantised_weights(self, tiny_llama):
        projection = tiny_llama.projection(0)
        projection.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
        with pytest.raises(ModelError, match="quantised"):
            detect(tiny_llama.hf)

    @pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "OFTConfig", "LNTuningConfig"])
    def test_adapters_of_peft(self, tiny_llama, kind):
        import peft

        own = {"IA3Config": {"feedforward_modules": []}, "OFTConfig": {"oft_block_size": 4}}
        module = "norm" if kind == "LNTuningConfig" else "q_proj"
        config = getattr(peft, kind)(target_modules=[module], **own.get(kind, {}))
        adapted = peft.get_peft_model(tiny_llama.hf, config)
        for hf in (adapted, adapted.get_base_model()):
            with pytest.raises(ModelError, match=r"has peft adapters.*merge_and_unload\(\)"):
                detect(hf)

    def test_soft_prompts_of_peft(self, tiny_llama):
        import peft

        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        with pytest.raises(ModelError, match="has peft adapters"):
            detect(peft.get_peft_model(tiny_llama.hf, config))

    def test_a_slow_tokenizer(self, tiny_llama):
        with pytest.raises(ModelError, match="fast"):
            EditableModel(tiny_llama.hf, object())

    def test_float16_on_a_cpu(self, tiny_llama):
        with pytest.raises(ModelError, match="float16"):
            EditableModel(tiny_llama.hf.half(), tiny_llama.tokenizer)

    def test_a_model_that_is_nowhere(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ModelError, match="neither a local folder nor reachable"):
            load_model("nobody/has-this-model", say=lambda _: None)

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(ModelError, match="could not be loaded"):
            load_model(str(tmp_path))
