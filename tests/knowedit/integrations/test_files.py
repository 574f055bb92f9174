"""The stand-in with hyper-parameters from a YAML file, in a user's working directory (unit)."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from knowedit.integrations import accelerated
from tests.knowedit.integrations.conftest import REQUESTS, TEXTS
from tests.knowedit.integrations.test_acceleration import relative, weights
from tests.knowedit.integrations.test_solves import refuse

#: `5e-2` and `2e2` have no point: YAML reads texts.
FILE = """
layers: [1, 2]
fact_token: "subject_last"
v_num_grad_steps: 6
v_lr: 5e-2
v_loss_layer: 3
v_weight_decay: 0
clamp_norm_factor: 4
kl_factor: 6.25e-2
mom2_update_weight: 2e2
mom2_n_samples: {samples}
nullspace_threshold: 0.5
L2: 2
rewrite_module_tmp: "model.layers.{{}}.mlp.down_proj"
layer_module_tmp: "model.layers.{{}}"
mlp_module_tmp: "model.layers.{{}}.mlp"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
stats_dir: "./data/stats"  # seen from where the script runs
device: {device}
fp16: false
"""


@pytest.fixture
def read(standin, tmp_path, monkeypatch):
    """Reads the file by the stand-in's own loader, in a working directory of the name given."""

    def from_file(where, **changes):
        folder = tmp_path / where
        folder.mkdir()
        monkeypatch.chdir(folder)
        text = FILE.format(**{"samples": 50, "device": "cpu"} | changes)
        (folder / "hparams.yaml").write_text(text, "utf-8")
        return standin.hparams.HyperParams.from_hparams("hparams.yaml")

    return from_file


def statistics(standin, model, hparams):
    for layer in hparams.layers:
        name = hparams.rewrite_module_tmp.format(layer)
        standin.memit_main.get_cov(model.hf, model.tokenizer, name, "texts",
                                   hparams.mom2_n_samples, "float32", hparams=hparams)  # fmt: skip


@pytest.mark.parametrize(("samples", "device"), [(50, "cpu"), ("null", "null"), (len(TEXTS), 0)])
def test_memit(standin, tiny_llama, read, samples, device, tmp_path):
    """The number of a GPU is the host's business; without a number of samples all are taken."""
    main, before = standin.memit_main, weights(tiny_llama)

    def edited(hparams):
        main.COV_CACHE.clear()
        statistics(standin, tiny_llama, hparams)
        main.apply_memit_to_model(tiny_llama.hf, tiny_llama.tokenizer, REQUESTS, hparams)
        found = weights(tiny_llama)
        tiny_llama.hf.load_state_dict(before, strict=False)
        return found

    plain = edited(read("plain", samples=samples, device=device))
    standin.compute_z.RUNS.clear()
    standin.layer_stats.PASSES.clear()
    hparams = read("fast", samples=samples, device=device)
    with accelerated("standin"):
        fast = edited(hparams)
    assert not standin.compute_z.RUNS and not standin.layer_stats.PASSES
    files = [sorted(f.name for f in (tmp_path / way).rglob("*.npz")) for way in ("plain", "fast")]
    assert files[0] == files[1] and len(files[0]) == len(hparams.layers)
    for name in before:
        assert relative(fast[name], plain[name]) < 1e-5


def test_rome(standin, tiny_llama, read, monkeypatch):
    rome, request = standin.rome_main, {**REQUESTS[2], "target_new": " harp"}

    def vectors(hparams):
        rome.inv_mom2_cache.clear()
        given = tiny_llama.hf, tiny_llama.tokenizer, request, hparams, 2
        left = rome.compute_u(*given, rome.CONTEXTS)
        return left, rome.compute_v(*given, left, rome.CONTEXTS)

    plain = vectors(read("plain"))
    # where the working directory is named like a module
    hparams = read("model.layers.2.mlp.down_proj")
    hparams.stats_dir = "."
    with accelerated("standin"):
        monkeypatch.setattr(torch, "inverse", refuse)
        fast = vectors(hparams)
    assert relative(fast[0], plain[0]) < 1e-5
    assert relative(fast[1], plain[1]) < 1e-4


@pytest.mark.parametrize(
    ("name", "value"),
    [("v_lr", "5e-1"), ("v_lr", None), ("clamp_norm_factor", None), ("v_num_grad_steps", "6")],
)
def test_what_is_no_number_meets_the_hosts_own_lines(
    standin, tiny_llama, read, name, value, caplog
):
    """A loader that leaves texts as they are, a key without a value: as the host has it."""
    hparams = read("here")
    setattr(hparams, name, value)
    given = tiny_llama.hf, tiny_llama.tokenizer, REQUESTS[0], hparams, 2
    with pytest.raises(TypeError) as plain:
        standin.compute_z.compute_z(*given, standin.memit_main.CONTEXTS)
    with accelerated("standin"), pytest.raises(TypeError) as fast:
        standin.compute_z.compute_z(*given, standin.memit_main.CONTEXTS)
    assert str(fast.value) == str(plain.value)
    assert f"hparams.{name} is {value!r}, not a number" in caplog.text


def test_a_folder_of_statistics_that_is_not_named_is_the_hosts_own_error(standin, tiny_llama, read):
    hparams = read("here")
    hparams.stats_dir = None
    given = tiny_llama.hf, tiny_llama.tokenizer, hparams.rewrite_module_tmp.format(2), "texts"
    with accelerated("standin"), pytest.raises(TypeError, match="NoneType"):
        standin.rome_main.get_inv_cov(*given, 50, "float32", hparams)


def test_an_inverse_is_of_its_model_and_goes_with_it(standin, tiny_llama, read):
    """An editor made anew for each fact: its model may lie where the last one's has been."""
    from transformers import LlamaForCausalLM

    hparams, kept = read("here"), standin.rome_main.inv_mom2_cache
    name = hparams.rewrite_module_tmp.format(1)

    def inverse(hf, folder):
        hparams.stats_dir = folder
        given = hf, tiny_llama.tokenizer, name, "texts", 50, "float32", hparams
        return standin.rome_main.get_inv_cov(*given) @ torch.eye(tiny_llama.d_ff)

    with accelerated("standin"):
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            hf = LlamaForCausalLM(tiny_llama.hf.config).eval()
            found.append(inverse(hf, f"stats{seed}"))
            assert torch.equal(inverse(hf, "elsewhere"), found[-1])  # from memory
            assert len(kept) == 1
            del hf
            gc.collect()
    assert relative(*found) > 1e-2


def test_a_model_that_the_host_lets_go_is_gone(standin, tiny_llama, read):
    from transformers import LlamaForCausalLM

    hparams, tok = read("here"), tiny_llama.tokenizer
    hf = LlamaForCausalLM(tiny_llama.hf.config).eval()
    with accelerated("standin"):
        standin.memit_main.apply_memit_to_model(hf, tok, REQUESTS, hparams)
        standin.evaluation.test_prediction_acc(hf, tok, hparams, ["Ada lives in"], ["Rome"], "cpu")
        seen = weakref.ref(hf)
        del hf
        gc.collect()
        assert seen() is None
