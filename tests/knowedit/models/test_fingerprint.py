"""A model that is changed in memory has another fingerprint, and nothing of the old one is taken
for it (unit).
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig

from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import save_edited
from knowedit.edits.history import History
from knowedit.errors import EditError, ModelError, StatisticsError
from knowedit.methods.learned.mend.network import MendNetwork
from knowedit.models import fingerprint as module
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import difference, setup_of, weights_fingerprint
from knowedit.statistics import KeyStatistics, key_statistics
from tests.knowedit.edits.test_edit import a_trained_edit, an_edit
from tests.knowedit.models.tiny import build
from tests.knowedit.statistics.helpers import varied_texts


def step(model):
    """One of an optimiser, on every weight."""
    with torch.enable_grad():
        model.hf.requires_grad_(True)
        model.hf(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
        torch.optim.SGD(model.hf.parameters(), lr=0.1).step()


def doubled(model):
    return {name: 2 * tensor for name, tensor in model.hf.state_dict().items()}


def replaced(model):
    model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(48, 32), requires_grad=False)


def tied(model):
    model.hf.lm_head.weight = model.hf.model.embed_tokens.weight


def assigned(model):
    model.hf.load_state_dict(doubled(model), assign=True)


CHANGES = {
    "an optimiser's step": step,
    "multiplied": lambda model: model.weight(2).detach().mul_(1.5),
    "behind torch's back": lambda model: model.weight(2).data.mul_(1.5),
    "one number": lambda model: model.weight(2).detach()[3, 5].add_(1),
    "other memory": lambda model: setattr(model.weight(2), "data", model.weight(2).data * 2),
    "cast": lambda model: model.hf.to(torch.bfloat16),
    "loaded": lambda model: model.hf.load_state_dict(doubled(model)),
    "another parameter": replaced,
    "tied": tied,
    "assigned": assigned,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_memory_is_noticed_before_anything_is_written(tiny_llama, tmp_path, change):
    edit, history = an_edit(tiny_llama), History(tiny_llama.fingerprint)
    CHANGES[change](tiny_llama)
    found = weights_fingerprint(tiny_llama.hf)
    assert tiny_llama.fingerprint == found != edit.fingerprint
    for refused in (
        lambda: edit.apply(tiny_llama),
        lambda: save_edited(tiny_llama, [edit], tmp_path / "edited"),
        lambda: history.check(tiny_llama),
    ):
        with pytest.raises(EditError, match="other weights or another dtype"):
            refused()
    assert weights_fingerprint(tiny_llama.hf) == found and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change", ["one number", "behind torch's back", "cast", "another parameter"]
)
def test_a_change_beside_an_edit_in_force_is_noticed(tiny_llama, change):
    edit, other = an_edit(tiny_llama), an_edit(tiny_llama, seed=3)
    edit.apply(tiny_llama)
    CHANGES[change](tiny_llama)
    with pytest.raises(EditError, match="other weights or another dtype"):
        other.apply(tiny_llama)
    assert tiny_llama.ledger.active == (edit.key,)


def test_what_was_not_changed_is_not_read_again(tiny_llama, monkeypatch):
    read, original = [], module._bit_sum
    shown = tiny_llama.fingerprint
    monkeypatch.setattr(module, "_bit_sum", lambda t: read.append(t) or original(t))
    edits = [an_edit(tiny_llama), a_trained_edit(tiny_llama, 1)]
    for edit in edits:
        edit.apply(tiny_llama)
        assert tiny_llama.fingerprint == shown
    for edit in edits:
        edit.undo(tiny_llama)
        assert tiny_llama.fingerprint == shown
    assert not read
    tiny_llama.weight(1).detach().mul_(1)  # written to, with the same bits
    assert tiny_llama.fingerprint == shown and len(read) == 1
    assert weights_fingerprint(tiny_llama.hf) == shown


def test_the_sum_of_bits_is_that_of_one_pass():
    """Fingerprints in files of the first version were made so."""
    for dtype in (torch.float32, torch.bfloat16):
        words = torch.randn(70_001).to(dtype)
        whole = words.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).long()
        places = torch.arange(1, 2 * len(words), 2)
        assert module._bit_sum(words) == int((whole * places).sum()) % 2**64


def test_the_sum_of_bits_of_a_tensor_of_several_chunks(monkeypatch):
    """Whose last one ends inside a slice."""
    words = torch.randn(70_001)
    whole, places = words.view(torch.int32).long(), torch.arange(1, 2**15, 2)
    wanted = 0
    for number, chunk in enumerate(whole.split(2**14)):
        block = int((chunk * places[: len(chunk)]).sum())
        wanted = (wanted * 0x9E3779B97F4A7C15 + block * (2 * number + 1)) % 2**64
    monkeypatch.setattr(module, "CHUNK", 2**14)
    monkeypatch.setattr(module, "SLICE", 2**12)
    assert module._bit_sum(words) == wanted


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny_llama, bad):
    tiny_llama.weight(2).detach()[1, 1] = bad
    with pytest.raises(ModelError, match="NaN or infinite"):
        _ = tiny_llama.fingerprint
    assert module._is_finite(torch.full((4,), 3e38))


# -- parameters that the model has no longer ------------------------------------------------------


def with_new_parameters(model):
    state = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    model.hf.load_state_dict(state, assign=True)


def test_an_edit_goes_into_the_parameters_that_the_model_has_now(tiny_llama):
    edit, shown = a_trained_edit(tiny_llama), tiny_llama.fingerprint
    edit.apply(tiny_llama)
    wanted = {name: p.detach().clone() for name, p in tiny_llama.hf.named_parameters()}
    edit.undo(tiny_llama)
    with_new_parameters(tiny_llama)
    edit.apply(tiny_llama)
    for name, parameter in tiny_llama.hf.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    edit.undo(tiny_llama)
    assert tiny_llama.fingerprint == shown


def test_an_undo_on_other_parameters_is_refused(tiny_llama):
    edit = an_edit(tiny_llama)
    edit.apply(tiny_llama)
    with_new_parameters(tiny_llama)
    with pytest.raises(EditError, match="another tensor than the one that was edited"):
        edit.undo(tiny_llama)
    with pytest.raises(EditError, match="another tensor than the one that was edited"):
        an_edit(tiny_llama, seed=2).apply(tiny_llama)


# -- configuration and tokenizer ------------------------------------------------------------------


def another(model, **config):
    """The same weights with another configuration."""
    hf = copy.deepcopy(model.hf)
    for name, value in config.items():
        setattr(hf.config, name, value)
    hf = type(hf)(hf.config)
    hf.load_state_dict(model.hf.state_dict())
    return EditableModel(hf.requires_grad_(False).eval(), model.tokenizer)


ROPE = {"rope_type": "default", "rope_theta": 77.0}


@pytest.mark.parametrize(
    "config", [{"hidden_act": "gelu"}, {"rms_norm_eps": 1e-2}, {"rope_parameters": ROPE}]
)
def test_another_configuration_is_another_model(tiny_llama, tmp_path, config):
    edit = an_edit(tiny_llama)
    edit.setup = tiny_llama.setup
    loaded = Edit.load(edit.save(tmp_path / "a.safetensors"))
    other = another(tiny_llama, **config)
    assert other.fingerprint == edit.fingerprint
    with pytest.raises(EditError, match="the same weights, but another configuration"):
        loaded.apply(other)
    history = History(edit.fingerprint, [loaded])
    with pytest.raises(EditError, match="the same weights, but another configuration"):
        history.check(other)


def test_statistics_of_another_configuration_are_refused(tiny_llama, tmp_path):
    other, corpus = another(tiny_llama, hidden_act="gelu"), tmp_path / "corpus.txt"
    corpus.write_text(varied_texts(20))
    key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s", progress=False)
    with pytest.raises(StatisticsError, match="another configuration"):
        KeyStatistics.load(tmp_path / "s").check(other, [1])
    with pytest.raises(StatisticsError, match="another configuration or tokenizer"):
        key_statistics(other, [1], corpus, 100, directory=tmp_path / "s", progress=False)
    KeyStatistics.load(tmp_path / "s").check(another(tiny_llama, use_cache=False), [1])
    key_statistics(another(tiny_llama), [1], corpus, 100, directory=tmp_path / "s", progress=False)


def test_the_cache_keeps_statistics_of_several_configurations(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path / "cache"))
    other, corpus = another(tiny_llama, hidden_act="gelu"), tmp_path / "corpus.txt"
    corpus.write_text(varied_texts(20))
    first, second, again, back = (
        key_statistics(model, [1], corpus, 100, progress=False)
        for model in (tiny_llama, other, other, tiny_llama)
    )
    assert second[1].digest == again[1].digest != first[1].digest
    assert back[1].digest == first[1].digest
    assert len(list((tmp_path / "cache").rglob("layer-001.safetensors"))) == 2


def test_another_tokenizer_is_another_model(tiny_llama):
    edit = an_edit(tiny_llama)
    edit.setup = tiny_llama.setup
    tiny_llama.tokenizer = copy.deepcopy(tiny_llama.tokenizer)
    tiny_llama.tokenizer.add_tokens(["Paris"])
    with pytest.raises(EditError, match="the same weights, but another tokenizer"):
        edit.apply(tiny_llama)
    edit.setup = ""  # of an earlier version, which did not know
    edit.check(tiny_llama)


#: Parts of names of fields that are of training, of shapes, or of how a model is called.
UNCOUNTED = (
    "_id token vocab use_cache output_ return_dict initializer dropout pdrop tie_ decoder".split()
)
SCANNED = (
    "bloom deepseek_v3 ernie4_5_moe gemma3_text gpt_neo gpt_oss granite llama llama4_text mamba2 "
    "minicpm3 olmo olmoe phimoe qwen2_moe recurrent_gemma".split()
)


def other_values(value: Any) -> list[Any]:
    """What a field of a configuration could hold instead."""
    if value is None:
        return [0.37, 2, True]
    if isinstance(value, list):
        return [value[::-1]]
    kinds = {
        bool: lambda: [not value],
        int: lambda: [value + 1],
        float: lambda: [1.7 * value + 0.1],
    }
    return kinds.get(type(value), list)()


@pytest.mark.parametrize("kind", SCANNED)
def test_every_field_that_changes_logits_is_counted(kind):
    """Fields are changed one by one, and the model made anew with the same weights."""
    model, ids = build(kind), torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 97, 9, 32, 38] * 2])
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wanted = model(input_ids=ids, use_cache=False).logits
    uncounted = []
    for name, value in model.config.to_dict().items():
        if module.COMPUTES.search(name) or any(part in name for part in UNCOUNTED):
            continue
        for other in other_values(value):
            config = copy.deepcopy(model.config)
            try:
                setattr(config, name, other)
                made = type(model)(config).eval()
                if {n: tensor.shape for n, tensor in made.state_dict().items()} != shapes:
                    continue
                made.load_state_dict(model.state_dict())
                found = made(input_ids=ids, use_cache=False).logits
            except Exception:  # a value that this class does not take
                continue
            if found.shape == wanted.shape and not torch.allclose(found, wanted, 1e-4, 1e-5):
                uncounted.append((name, other))
    assert uncounted == []


def test_what_does_not_change_logits_is_not_in_the_setup(tiny_llama):
    config, tokenizer = copy.deepcopy(tiny_llama.hf.config), copy.deepcopy(tiny_llama.tokenizer)
    config.use_cache, config.knowedit, config._name_or_path = False, {"edits": []}, "x"
    config.eos_token_id, config.max_position_embeddings = 3, 9
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert setup_of(config, tokenizer) == tiny_llama.setup
    assert difference(tiny_llama, tiny_llama.fingerprint, tiny_llama.setup) is None


def test_what_a_configuration_class_fills_in_is_not_in_the_setup(byte_tokenizer):
    """Fields that another version of transformers has with a default, or derives, are no other
    model; a value that is the model's own is.
    """

    class Newer(LlamaConfig):
        attention_scaling: float = 1.0
        layer_types: Any = None

        def __post_init__(self, **others):
            super().__post_init__(**others)
            self.layer_types = self.layer_types or ["full_attention"] * self.num_hidden_layers

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    old = LlamaConfig(**sizes, rms_norm_eps=1e-3, head_dim=16)
    new = Newer(**sizes, rms_norm_eps=1e-3, head_dim=16)
    assert "attention_scaling" in new.to_dict() and new.layer_types == ["full_attention"] * 4
    found = setup_of(old, byte_tokenizer)
    assert setup_of(new, byte_tokenizer) == found
    assert setup_of(LlamaConfig(**sizes, rms_norm_eps=1e-3), byte_tokenizer) != found
    assert setup_of(MistralConfig(**sizes, rms_norm_eps=1e-3, head_dim=16), byte_tokenizer) != found
    for field, value in (("attention_scaling", 2.0), ("layer_types", ["sliding_attention"] * 4)):
        setattr(new, field, value)
        assert setup_of(new, byte_tokenizer) != found, field
        setattr(new, field, None)


def test_a_digest_of_every_field_is_understood(tiny_llama):
    """Files of earlier versions hold one."""
    fields = sorted(set(module._named(tiny_llama.hf.config.to_dict(), module.COUNTED)))
    earlier = f"{module._digest(fields)}-{tiny_llama.setup.split('-')[1]}"
    assert difference(tiny_llama, tiny_llama.fingerprint, earlier) is None
    other = another(tiny_llama, hidden_act="gelu")
    assert "another configuration" in difference(other, tiny_llama.fingerprint, earlier)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox", "gptj", "opt"])
def test_a_model_that_was_saved_and_loaded_is_the_same(family, byte_tokenizer, tmp_path):
    made = build(family)
    made.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert weights_fingerprint(loaded) == weights_fingerprint(made)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert setup_of(loaded.config, tokenizer) == setup_of(made.config, byte_tokenizer)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert setup_of(half.config, tokenizer) == setup_of(made.config, byte_tokenizer)


def test_networks_know_the_setup_they_were_trained_in(tiny_llama, tmp_path):
    network = MendNetwork.new(tiny_llama, [1], 2)
    network.report = {"seconds": 1}
    path = network.save(tmp_path / "n.safetensors")
    assert MendNetwork.load(path, tiny_llama).setup == tiny_llama.setup
    with pytest.raises(EditError, match="the same weights, but another configuration"):
        MendNetwork.load(path, another(tiny_llama, hidden_act="gelu"))
