"""Matrices that remember what they are made of, in the stand-in's own lines, against plain ones
(unit).
"""

from __future__ import annotations

import copy

import pytest
import torch

from knowedit.integrations import accelerated
from knowedit.integrations.replacements import matrices
from knowedit.integrations.replacements.matrices import Inverse, Symmetric
from knowedit_kernels.solver import cache, cached_covariance, forget_factors
from tests.knowedit.integrations.conftest import REQUESTS, hparams_of
from tests.knowedit.integrations.test_acceleration import relative


def covariance(size=40, tokens=200, dtype=torch.float32):
    rows = torch.randn(tokens, size, generator=torch.Generator().manual_seed(3)).double()
    rows = rows * torch.logspace(-1.5, 1, size).double()
    return (rows.T @ rows / tokens).to(dtype)


def keys_of(count, size=40, dtype=torch.float64):
    return torch.randn(size, count, generator=torch.Generator().manual_seed(4), dtype=dtype)


def refuse(*args, **kwargs):
    raise AssertionError("the dense solve ran")


# -- one by one


def test_memits_solve(monkeypatch):
    plain, keys = covariance(), keys_of(3)
    wanted = torch.linalg.solve(15.0 * plain.double() + keys @ keys.T, keys)
    ours = 15.0 * Symmetric(plain).double() + keys @ keys.T
    monkeypatch.setattr(matrices.Symmetric, "dense", refuse)
    found = torch.linalg.solve(ours, keys)
    assert type(found) is torch.Tensor and found.dtype == torch.float64
    assert relative(found, wanted) < 1e-10


def test_a_solve_for_other_keys_is_the_plain_one():
    plain, keys, other = covariance(), keys_of(3), keys_of(5)[:, 3:]
    ours = torch.linalg.solve(2 * Symmetric(plain).double() + keys @ keys.T, other)
    assert torch.equal(ours, torch.linalg.solve(2 * plain.double() + keys @ keys.T, other))


def test_a_matrix_without_a_factor_is_solved_as_it_is():
    rows, keys = torch.randn(10, 40).double(), keys_of(40)
    plain = rows.T @ rows
    ours = torch.linalg.solve(Symmetric(plain) + keys @ keys.T, keys)
    assert relative(ours, torch.linalg.solve(plain + keys @ keys.T, keys)) < 1e-9


def test_emmets_lines(standin, monkeypatch):
    plain, keys = covariance(), keys_of(3)
    wanted = standin.emmet_main.read_in(plain.clone(), keys, 7.0, 0.5)
    monkeypatch.setattr(matrices.Symmetric, "dense", refuse)
    found = standin.emmet_main.read_in(Symmetric(plain), keys, 7.0, 0.5)
    assert relative(found, wanted) < 1e-9


def test_an_inverse_meets_vectors_and_columns_from_both_sides():
    plain = covariance(dtype=torch.float64)
    ours, wanted, keys = Inverse(Symmetric(plain)), torch.linalg.inv(plain), keys_of(3)
    for found, right in (
        (ours @ keys, wanted @ keys),
        (ours @ keys[:, 0], wanted @ keys[:, 0]),
        (keys.T @ ours, keys.T @ wanted),
        (ours.float().double() @ keys, wanted @ keys),
        (ours + 1, wanted + 1),
    ):
        assert found.shape == right.shape and relative(found, right) < 1e-9


def test_singular_values_are_eigenvalues():
    plain = covariance()
    left, sizes, right = torch.linalg.svd(Symmetric(plain).cpu(), full_matrices=False)
    assert relative(sizes, torch.linalg.svdvals(plain)) < 1e-5
    assert relative(left @ sizes.diag() @ right, plain) < 1e-5


def test_what_is_not_known_happens_to_the_plain_tensor():
    plain, ours = covariance(), Symmetric(covariance())
    assert torch.equal(torch.stack([ours, ours]), torch.stack([plain, plain]))
    assert torch.equal(ours[3:5, 2], plain[3:5, 2])
    assert torch.equal(ours - plain, torch.zeros_like(plain))
    assert torch.equal(ours.diagonal(), plain.diagonal())
    assert float(torch.trace(-1 * ours)) == float(torch.trace(-plain))
    assert (ours.shape, ours.T.dtype, len(ours)) == (plain.shape, plain.dtype, len(plain))
    assert ours.double().dtype == torch.float64


def test_a_factor_is_made_once_for_equal_matrices(monkeypatch):
    forget_factors()
    made = []
    real = cache.Covariance
    monkeypatch.setattr(cache, "Covariance", lambda C, **more: made.append(1) or real(C, **more))
    plain, column = covariance(), keys_of(1)
    first = cached_covariance(plain, 2.0)
    again = cached_covariance(plain.clone(), 4.0)
    assert len(made) == 1
    assert relative(2 * again.inverse(column), first.inverse(column)) < 1e-12
    shifted = cached_covariance(plain, shift=0.5)
    wanted = torch.linalg.solve(plain.double() + 0.5 * torch.eye(40).double(), column)
    assert relative(shifted.inverse(column), wanted) < 1e-9
    changed = plain.clone()
    changed[1, 2] += 1e-3
    cached_covariance(changed)
    assert len(made) == 3


# -- in the host


def test_rome(standin, tiny, hparams, monkeypatch):
    rome, request = standin.rome_main, {**REQUESTS[2], "target_new": " harp"}
    given = tiny.hf, tiny.tokenizer, request, hparams, 2

    def vectors():
        left = rome.compute_u(*given, rome.CONTEXTS)
        return left, rome.compute_v(*given, left, rome.CONTEXTS)

    plain = vectors()
    rome.inv_mom2_cache.clear()
    with accelerated("standin"):
        monkeypatch.setattr(torch, "inverse", refuse)
        fast = vectors()
    assert relative(fast[0], plain[0]) < 1e-5
    assert relative(fast[1], plain[1]) < 1e-4


def test_romes_key_is_corrected_on_demand(standin, tiny_llama, tmp_path):
    rome, request = standin.rome_main, {**REQUESTS[2], "target_new": " harp"}
    hparams = hparams_of(tiny_llama, tmp_path)
    left = torch.randn(tiny_llama.d_ff, generator=torch.Generator().manual_seed(0))
    given = tiny_llama.hf, tiny_llama.tokenizer, request, hparams, 2, left, rome.CONTEXTS
    with accelerated("standin"):
        plain = rome.compute_v(*given)
    with accelerated("standin", fix="rome_key"):
        fixed = rome.compute_v(*given)

    def states(contexts):
        return [
            part.mean(0)
            for part in standin.repr_tools.get_reprs_at_word_tokens(
                *(tiny_llama.hf, tiny_llama.tokenizer),
                [context.format(request["prompt"]) for context in contexts],
                [request["subject"]] * len(contexts),
                *(2, hparams.rewrite_module_tmp, "last", "both"),
            )
        ]

    (key, value), (mean_key, mean_value) = states(["{}"]), states(rome.CONTEXTS)
    target = plain * (key @ left) + value
    assert relative(fixed, (target - mean_value) / (mean_key @ left)) < 1e-4
    assert relative(fixed, plain) > 1e-2


def edits(standin, tiny, hparams, way):
    """Two edits in sequence, the host's way; the weights after them and the cache."""
    main = standin.alphaedit_main
    projectors = torch.stack(
        [main.get_project(tiny.hf, tiny.tokenizer, k, hparams) for k in hparams.layers]
    )
    history = torch.zeros_like(projectors)
    requests = [{**one, "target_new": " x" + one["target_new"]} for one in copy.deepcopy(REQUESTS)]
    for part in (requests[:1], requests[1:]):
        given = tiny.hf, tiny.tokenizer, part, hparams
        if way == "arguments":
            main.apply_AlphaEdit_to_model(*given, cache_c=history, P=projectors)
        else:
            main.P, main.cache_c = projectors, history
            main.execute_AlphaEdit(*given)
            assert main.P is projectors
    names = [f"{hparams.rewrite_module_tmp.format(layer)}.weight" for layer in hparams.layers]
    return [tiny.hf.get_parameter(name).detach().clone() for name in names], history, projectors


@pytest.mark.parametrize("way", ["arguments", "names"])
def test_alphaedit(standin, tiny, hparams, way, monkeypatch):
    hparams.L2, hparams.nullspace_threshold = 2.0, 0.5
    before = {name: p.detach().clone() for name, p in tiny.hf.named_parameters()}
    plain = edits(standin, tiny, hparams, way)
    tiny.hf.load_state_dict(before, strict=False)
    with accelerated("standin"):
        monkeypatch.setattr(matrices.ProjectedSum, "dense", refuse)
        fast = edits(standin, tiny, hparams, way)
    assert relative(fast[2], plain[2]) < 1e-4
    assert relative(fast[1], plain[1]) < 1e-4
    for one, other in zip(fast[0], plain[0]):
        assert relative(one, other) < 1e-4


def test_edits_that_were_taken_back_are_no_history_on_demand(standin, tiny_llama, tmp_path):
    """The second edit of clean weights: with `fix="history"` as if there had been no first."""
    tiny, main = tiny_llama, standin.alphaedit_main
    hparams = hparams_of(tiny, tmp_path, L2=2.0, nullspace_threshold=0.5)
    names = [f"{hparams.rewrite_module_tmp.format(layer)}.weight" for layer in hparams.layers]
    clean = {name: p.detach().clone() for name, p in tiny.hf.named_parameters()}
    given = tiny.hf, tiny.tokenizer
    main.P = torch.stack([main.get_project(*given, layer, hparams) for layer in hparams.layers])
    requests = [{**one, "target_new": " x"} for one in REQUESTS]

    def edited(fix, first, back):
        main.cache_c = torch.zeros_like(main.P)
        with accelerated("standin", fix=fix):
            if first:
                main.apply_AlphaEdit_in_place(*given, requests[:2], hparams)
            if back:
                tiny.hf.load_state_dict(clean, strict=False)
            main.apply_AlphaEdit_in_place(*given, requests[2:], hparams)
        found = torch.cat([tiny.hf.get_parameter(name).detach().flatten() for name in names])
        tiny.hf.load_state_dict(clean, strict=False)
        return found - torch.cat([clean[name].flatten() for name in names])

    alone = edited((), first=False, back=False)
    assert relative(edited("history", first=True, back=True), alone) < 1e-4
    assert relative(edited((), first=True, back=True), alone) > 1e-3
    in_sequence = edited((), first=True, back=False)
    assert relative(edited("history", first=True, back=False), in_sequence) < 1e-4


def test_a_bfloat16_model_is_edited_on_demand(standin, tiny_llama, tmp_path):
    tiny, main = tiny_llama, standin.alphaedit_main
    hparams = hparams_of(tiny, tmp_path, L2=2.0, nullspace_threshold=0.5)
    requests = [{**one, "target_new": " x"} for one in REQUESTS]
    given = tiny.hf, tiny.tokenizer
    main.P = torch.stack([main.get_project(*given, layer, hparams) for layer in hparams.layers])
    tiny.hf.bfloat16()
    with accelerated("standin"):
        states = standin.compute_ks.compute_ks(*given, requests, hparams, 2, [["{}"]])
        assert states.dtype == torch.bfloat16
        main.cache_c = torch.zeros_like(main.P)
        with pytest.raises(RuntimeError, match="dtype|type"):
            main.apply_AlphaEdit_in_place(*given, requests, hparams)
    before = [tiny.weight(layer).detach().clone() for layer in hparams.layers]
    with accelerated("standin", fix="half"):
        main.apply_AlphaEdit_in_place(*given, requests, hparams)
    for layer, weight in zip(hparams.layers, before):
        assert tiny.weight(layer).dtype == torch.bfloat16
        assert not torch.equal(tiny.weight(layer), weight)
        assert tiny.weight(layer).isfinite().all()
