"""The stand-in accelerated against the stand-in as it is (unit)."""

from __future__ import annotations

import copy
import sys
import types

import numpy as np
import pytest
import torch

from knowedit.errors import ConfigError
from knowedit.integrations import accelerate, accelerated, explain, uninstall
from knowedit.integrations.replacements.kept import Kept
from knowedit.integrations.replacements.states import states_at
from knowedit.models.editable import EditableModel
from knowedit.models.partial import PartialModel
from tests.knowedit.integrations.conftest import REQUESTS


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def weights(model):
    return {name: p.detach().clone() for name, p in model.hf.named_parameters()}


# -- in place and back


def test_every_holder_is_replaced_and_given_back(standin):
    main, ks = standin.memit_main, standin.compute_ks
    before = main.compute_z, main.apply_memit_to_model, ks.get_module_input_output_at_words
    sys.modules["__main__"].borrowed = main.compute_z
    try:
        done = accelerate("standin")
        assert main.compute_z is standin.compute_z.compute_z is not before[0]
        assert sys.modules["__main__"].borrowed is main.compute_z
        table = main.ALGORITHMS
        assert table["MEMIT"] is table["MEMIT, named"][1] is main.apply_memit_to_model
        assert main.apply_memit_to_model is not before[1]
        assert "standin.compute_z.compute_z" in done.explain()
        assert "ALGORITHMS['MEMIT, named'][1]" in done.explain()
        done.uninstall()
        assert (main.compute_z, main.apply_memit_to_model) == before[:2]
        assert sys.modules["__main__"].borrowed is before[0]
        assert table["MEMIT"] is table["MEMIT, named"][1] is before[1]
        assert ks.get_module_input_output_at_words is before[2]
    finally:
        del sys.modules["__main__"].borrowed


def test_twice_is_once(standin):
    original = standin.compute_z.compute_z
    accelerate("standin")
    accelerate("standin")
    assert explain().count("standin.compute_z.compute_z:") == 1
    uninstall("standin")
    assert standin.compute_z.compute_z is original
    assert explain() == "nothing is accelerated"


def test_a_block_gives_back_what_an_error_leaves(standin):
    original = standin.compute_z.compute_z
    with pytest.raises(KeyError), accelerated("standin"):
        assert standin.compute_z.compute_z is not original
        raise KeyError
    assert standin.compute_z.compute_z is original


def test_an_unknown_signature_is_left_alone_with_the_difference(standin, caplog):
    def compute_z(model, tok, request, hparams, layer, context_templates, temperature):
        return None

    compute_z.__module__ = "standin.compute_z"
    standin.compute_z.compute_z = compute_z
    done = accelerate("standin")
    assert standin.compute_z.compute_z is compute_z
    assert "unknown parameters: temperature" in done.explain()
    assert "unknown parameters: temperature" in caplog.text


def other_loss(model, tok, request, hparams, layer, context_templates):
    return hparams.nll_loss_factor + request


def other_end(model, tok, request, hparams, layer, context_templates):
    loss = request
    return layer + 1 if loss < 0.01 else layer + 2


def other_value(model, tok, request, hparams, layer, context_templates):
    target = layer + request
    target = target * hparams.v_lr
    return target


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (other_loss, "it reads hparams.nll_loss_factor: another method"),
        (other_end, "it ends at `loss < 0.01`, not at a loss of 0.05"),
        (other_value, "it returns `target * hparams.v_lr`, not the clean state plus"),
    ],
)
def test_another_method_of_the_same_signature_is_left_alone(standin, function, reason):
    changed = types.FunctionType(function.__code__, vars(standin.compute_z), "compute_z")
    changed.__module__ = "standin.compute_z"
    standin.compute_z.compute_z = changed
    done = accelerate("standin")
    assert standin.compute_z.compute_z is changed
    assert reason in done.explain()


@pytest.mark.parametrize("fix", ["speed", ("rome_key", "speed")])
def test_an_unknown_correction_is_refused(standin, fix):
    with pytest.raises(ConfigError, match="speed is not known; known: "):
        accelerate("standin", fix=fix)


def test_a_host_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder, nor a package"):
        accelerate("no_such_host")
    with pytest.raises(ConfigError, match="import the host's modules first"):
        accelerate(tmp_path)


# -- the same results


@pytest.mark.parametrize("track", ["in", "out", "both"])
def test_states(standin, tiny, hparams, track):
    texts = ["Ada lives in", "a much longer text about Bob", "b"]
    places = [[2], [25, 3], [0]]
    for template in (hparams.rewrite_module_tmp, hparams.layer_module_tmp):
        given = tiny.hf, tiny.tokenizer, texts, places, 2, template, track
        plain = standin.repr_tools.get_reprs_at_idxs(*given)
        with accelerated("standin"):
            fast = standin.repr_tools.get_reprs_at_idxs(*given)
        for one, other in zip(fast, plain) if track == "both" else [(fast, plain)]:
            assert one.shape == other.shape
            assert relative(one, other) < 1e-6


def test_from_layer_to_layer_only_what_was_written_runs_again(tiny):
    tiny = EditableModel(
        copy.deepcopy(tiny.hf).double(), tiny.tokenizer
    )  # rounding is no difference
    texts = [tiny.tokenizer(text)["input_ids"] for text in ("Ada lives in", "a longer text", "b")]
    places, kept, ran = [[2], [9, 3], [0]], Kept(), []
    first = tiny.hf.get_submodule(tiny.layout.layer(0))
    handle = first.register_forward_hook(lambda *_: ran.append(1))

    def states(layer, rows, kept=None, whole=False):
        name = (tiny.layout.layer if whole else tiny.layout.projection)(layer)
        both = {"inputs": not whole, "outputs": True}
        found = states_at(tiny, rows, places, name, **both, kept=kept)
        return [part for part in found if part is not None]

    def write(layer):
        with torch.no_grad():
            tiny.weight(layer).mul_(1.5)

    def check(layer, rows, again, whole=False):
        """The same as from the bottom; layer 0 runs for the kept states only if it must."""
        plain = states(layer, rows, whole=whole)
        ran.clear()
        fast = states(layer, rows, kept, whole=whole)
        assert bool(ran) == again
        for one, other in zip(fast, plain):
            assert relative(one, other) < 1e-12

    try:
        kept.part = PartialModel.for_texts(tiny, 1, 20)  # made with passes of the whole model
        kept.longest = 20
        check(1, texts, again=True)
        check(3, texts[:1], again=False, whole=True)
        write(1)
        check(2, texts, again=False)
        write(2)
        check(3, texts, again=False)
        check(3, [texts[0] + [1], *texts[1:]], again=False)  # the token behind is not read
        check(3, [list(reversed(texts[0]))], again=True)
        check(2, texts, again=True)  # below what is kept
        write(0)
        check(3, texts, again=True)
    finally:
        handle.remove()


def test_keys_weigh_groups_of_contexts_alike(standin, tiny, hparams):
    given = tiny.hf, tiny.tokenizer, REQUESTS, hparams, 2, standin.memit_main.CONTEXTS
    plain = standin.compute_ks.compute_ks(*given)
    with accelerated("standin"):
        assert relative(standin.compute_ks.compute_ks(*given), plain) < 1e-6


@pytest.mark.parametrize("token", ["subject_last", "subject_first"])
def test_values(standin, tiny, hparams, token):
    hparams.fact_token = token
    for request in REQUESTS:
        given = tiny.hf, tiny.tokenizer, request, hparams, 2, standin.memit_main.CONTEXTS
        plain = standin.compute_z.compute_z(*given)
        with accelerated("standin"):
            assert relative(standin.compute_z.compute_z(*given), plain) < 1e-5
    assert len(standin.compute_z.RUNS) == len(REQUESTS)


def test_values_that_are_not_ours_are_the_hosts_own(standin, tiny, hparams, caplog):
    hparams.v_loss_layer = 2
    given = tiny.hf, tiny.tokenizer, REQUESTS[0], hparams, 1, standin.memit_main.CONTEXTS
    plain = standin.compute_z.compute_z(*given)
    with accelerated("standin"):
        assert torch.equal(standin.compute_z.compute_z(*given), plain)
    assert "the loss is taken at layer 2, not at the last, 3" in caplog.text


@pytest.mark.parametrize("precision", ["float32", "float64", None])
def test_statistics(standin, tiny, hparams, tmp_path, precision):
    stats = standin.layer_stats
    names = [hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers]

    def collect(folder, name):
        return stats.layer_stats(
            *(tiny.hf, tiny.tokenizer, name, folder, "texts", ["mom2"]),
            sample_size=50,
            precision=precision,
            hparams=hparams,
        )

    plain = {name: collect(tmp_path / "plain", name).mom2 for name in names}
    stats.PASSES.clear()
    with accelerated("standin"):
        fast = {names[0]: collect(tmp_path / "fast", names[0]).mom2}
        files = sorted((tmp_path / "fast").rglob("*.npz"))
        assert len(files) == len(names)
        fast[names[1]] = collect(tmp_path / "fast", names[1]).mom2
    assert not stats.PASSES
    for name in names:
        assert fast[name].count == plain[name].count
        assert fast[name].mom2.dtype == plain[name].mom2.dtype
        assert relative(fast[name].mom2, plain[name].mom2) < 1e-6
        assert collect(tmp_path / "fast", name).mom2.count == plain[name].count  # read by the host
    with np.load(files[0]) as members:
        assert int(members["sample_size"]) == 50
    assert not stats.PASSES


def test_statistics_anew_write_no_file(standin, tiny, hparams, tmp_path):
    name = hparams.rewrite_module_tmp.format(1)
    with accelerated("standin"):
        standin.layer_stats.layer_stats(
            *(tiny.hf, tiny.tokenizer, name, tmp_path, "texts", ["mom2"]),
            sample_size=50,
            force_recompute=True,
        )
    assert not list(tmp_path.rglob("*.npz"))


def test_an_edit(standin, tiny, hparams, requests_given, tmp_path):
    main, before = standin.memit_main, weights(tiny)
    # statistics of the clean model; asked for in the middle of an edit, the stand-in, like the
    # hosts, would take those of a later layer from a model that is half edited
    for layer in hparams.layers:
        name = hparams.rewrite_module_tmp.format(layer)
        main.get_cov(tiny.hf, tiny.tokenizer, name, "texts", 50, "float32", hparams=hparams)
    main.apply_memit_to_model(tiny.hf, tiny.tokenizer, requests_given, hparams)
    plain = weights(tiny)
    tiny.hf.load_state_dict(before, strict=False)
    main.COV_CACHE.clear()
    standin.compute_z.RUNS.clear()
    standin.layer_stats.PASSES.clear()
    hparams.stats_dir = tmp_path / "fast"
    with accelerated("standin"):
        main.ALGORITHMS["MEMIT"](tiny.hf, tiny.tokenizer, requests_given, hparams)
    fast = weights(tiny)
    assert not standin.compute_z.RUNS and not standin.layer_stats.PASSES
    changed = [name for name in before if not torch.equal(before[name], plain[name])]
    assert len(changed) == len(hparams.layers)
    for name in before:
        if name in changed:
            assert relative(fast[name] - before[name], plain[name] - before[name]) < 1e-3
            assert relative(fast[name], plain[name]) < 1e-5
        else:
            assert torch.equal(fast[name], before[name])


def test_values_of_a_job_are_made_together_and_only_for_these_weights(
    standin, tiny, hparams, monkeypatch
):
    from knowedit.integrations.replacements import values

    batches = []
    real = values.optimise_plans

    def counted(model, plans, *rest, **options):
        batches.append(len(plans))
        return real(model, plans, *rest, **options)

    monkeypatch.setattr(values, "optimise_plans", counted)
    weight = tiny.weight(0)

    def execute_changing(model, tok, requests, hparams, cache_template=None):
        found = []
        for request in requests:
            found.append(
                standin.compute_z.compute_z(
                    model, tok, request, hparams, 2, standin.memit_main.CONTEXTS
                )
            )
            with torch.no_grad():
                weight.mul_(1.5)
        return found

    execute_changing.__module__ = "standin.memit_main"
    standin.memit_main.execute_changing = execute_changing
    given = tiny.hf, tiny.tokenizer, [{**r, "target_new": " x"} for r in REQUESTS], hparams
    clean = weight.detach().clone()
    plain = standin.memit_main.execute_changing(*given)
    with torch.no_grad():
        weight.copy_(clean)
    with accelerated("standin"):
        fast = standin.memit_main.execute_changing(*given)
    assert batches == [3, 2, 1]
    assert max(relative(one, other) for one, other in zip(fast, plain)) < 1e-5
