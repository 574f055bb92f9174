"""What callers hand over by mistake is named, with what to give instead: by every public function,
for every argument that is a tensor, a size, a device or a list of layers (unit).
"""

import os

import numpy
import pytest
import torch
from torch import nn

import knowedit_kernels as kernels
from knowedit_kernels import jvp
from knowedit_kernels.target_loss import target_loss

KEYS, W, U, V = torch.randn(40, 8), torch.randn(4, 8), torch.randn(4, 2), torch.randn(8, 2)
C = KEYS.double().T @ KEYS.double() / 40
METRIC = kernels.Covariance(C)
SOLVER = kernels.EditSolver(METRIC, torch.randn(8, 3))
R, T = torch.randn(4, 3), torch.randn(5, 40, 8)
HEAD, TARGETS = torch.randn(11, 8), torch.arange(40) % 11
HEADS = torch.randn(1, 2, 5, 8)

# A call and its arguments by name; each is replaced by things that are no tensor.
CALLS = {
    "SecondMoment.update": (kernels.SecondMoment(8).update, {"keys": KEYS}),
    "mask": (kernels.SecondMoment(8).update, {"keys": KEYS, "mask": torch.ones(40).bool()}),
    "second_moment_": (kernels.second_moment_, {"c": C.clone(), "keys": KEYS}),
    "GroupedSecondMoment.update": (
        kernels.GroupedSecondMoment(2, 8).update,
        {"rows": KEYS, "index": torch.arange(40) % 2, "weights": torch.rand(40)},
    ),
    "low_rank_update_": (
        kernels.low_rank_update_,
        {"W": W.clone(), "U": U, "V": V, "probe": torch.randn(8, 3)},
    ),
    "Covariance": (kernels.Covariance, {"C": C}),
    "ShrunkCovariance": (kernels.ShrunkCovariance, {"C": C}),
    "NullSpace": (lambda C: kernels.NullSpace(C, rank=4), {"C": C}),
    "EditSolver": (lambda K: kernels.EditSolver(METRIC, K), {"K": SOLVER.K}),
    "EditSolver.apply": (SOLVER.apply, {"R": R}),
    "weight_for_gain": (lambda K: kernels.weight_for_gain(METRIC, K), {"K": SOLVER.K}),
    "rms_norm_jvp": (
        kernels.rms_norm_jvp,
        {"x": KEYS, "weight": torch.ones(8), "tangents": T},
    ),
    "swiglu_jvp": (
        kernels.swiglu_jvp,
        {"gate": KEYS, "up": KEYS, "gate_tangents": T, "up_tangents": T},
    ),
    "attention_jvp": (
        lambda q, k, v, tq, spans: kernels.attention_jvp(q, k, v, tq, None, None, spans=spans),
        {"spans": torch.tensor([[0, 5]]), "q": HEADS, "k": HEADS, "v": HEADS, "tq": HEADS[None]},
    ),
    "edit_jvp": (
        lambda R, dR: kernels.edit_jvp([SOLVER], [R], [dR]),
        {"R": R, "dR": torch.randn(5, 4, 3)},
    ),
    "target_loss": (
        target_loss,
        {"hidden": KEYS, "head_weight": HEAD, "targets": TARGETS, "ref_hidden": KEYS},
    ),
}
WRONG = {
    "an array": (numpy.zeros((8, 8), numpy.float32), "torch.as_tensor"),
    "a list": ([[1.0, 2.0]], "torch.as_tensor"),
    "a module": (nn.Linear(8, 4), r"\.weight"),
    "a moment": (kernels.SecondMoment(8), r"\.moment\(\)"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_tensor_is_named_with_the_remedy(call):
    function, arguments = CALLS[call]
    function(**arguments)
    for name in arguments:
        for value, remedy in WRONG.values():
            with pytest.raises(TypeError, match=f"must be a tensor, not .*{remedy}"):
                function(**{**arguments, name: value})


def test_a_required_tensor_may_not_be_none():
    with pytest.raises(TypeError, match="up_tangents must be a tensor, not None"):
        kernels.swiglu_jvp(KEYS, KEYS, T, None)


def test_one_solver_is_no_list_of_layers():
    calls = [
        lambda: kernels.edit_jvp(SOLVER, R, torch.randn(5, 4, 3)),
        lambda: kernels.edit_vjp([SOLVER], R, [jvp.Factors(R[None], SOLVER.A[None])]),
        lambda: kernels.effective_gain(SOLVER),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="must be a list, one for each layer"):
            call()
    with pytest.raises(ValueError, match="how must be one of linear, sqrt, full"):
        kernels.effective_gain([SOLVER], [1.0])


def test_a_matrix_is_no_metric():
    with pytest.raises(TypeError, match=r"metric must say what to preserve.*Covariance\(C\)"):
        kernels.EditSolver(C, SOLVER.K)


def test_a_share_is_a_share():
    for energy in (95, 0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"energy is a share of the trace, in \(0, 1\]"):
            kernels.NullSpace(C, energy=energy)
    assert kernels.NullSpace(C, energy=1).rank == 8
    with pytest.raises(TypeError, match="rank must be a whole number, not float 0.5"):
        kernels.NullSpace(C, rank=0.5)


SIZED = {
    "SecondMoment": kernels.SecondMoment,
    "GroupedSecondMoment": lambda dim: kernels.GroupedSecondMoment(2, dim),
    "groups": lambda groups: kernels.GroupedSecondMoment(groups, 8),
    "Identity": kernels.Identity,
}


@pytest.mark.parametrize("make", SIZED)
def test_a_size_is_a_whole_number(make):
    for size in (8.0, "8", None):
        with pytest.raises(TypeError, match="must be a whole number, not"):
            SIZED[make](size)
    for size in (0, -1):
        with pytest.raises(ValueError, match="must be at least 1"):
            SIZED[make](size)
    SIZED[make](numpy.int64(8))


ON_DEVICES = {
    "SecondMoment": lambda device: kernels.SecondMoment(8, device=device),
    "GroupedSecondMoment": lambda device: kernels.GroupedSecondMoment(2, 8, device=device),
    "Identity": lambda device: kernels.Identity(8, device=device),
}


@pytest.mark.parametrize("make", ON_DEVICES)
@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", torch.device("meta")])
def test_a_device_that_is_not_here_is_named_beside_those_that_are(make, device):
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used: here is cpu"):
        ON_DEVICES[make](device)
    ON_DEVICES[make]("cpu")


def test_moments_merge_with_other_moments_only():
    moment = kernels.SecondMoment(8).update(KEYS)
    grouped = kernels.GroupedSecondMoment(2, 8)
    for mine, other in ((moment, C), (moment, grouped), (grouped, moment)):
        with pytest.raises(TypeError, match="merge takes another"):
            mine.merge(other)
    for mine in (moment, grouped):
        with pytest.raises(ValueError, match="itself"):
            mine.merge(mine)
    assert moment.count == 40


def test_a_ledger_takes_names_and_tensors():
    with pytest.raises(TypeError, match=r"not Linear; dict\(it.named_parameters\(\)\) is"):
        kernels.WeightLedger(nn.Linear(8, 4))
    with pytest.raises(TypeError, match=r"weight 'layer' must be a tensor, not Linear; .*\.weight"):
        kernels.WeightLedger({"layer": nn.Linear(8, 4)})


def test_a_delta_that_is_not_finite_is_no_overflow():
    weight = W.clone()
    ledger = kernels.WeightLedger({"layer": weight})
    with pytest.raises(TypeError, match=r"weight must be a tensor, not Linear; give its \.weight"):
        ledger.add(nn.Linear(8, 4), U, V, key="edit")
    for value, why in ((torch.nan, "NaN or infinity in its delta of 'layer'"), (3e38, "overflows")):
        weight.fill_(3e38)
        with pytest.raises(kernels.lowrank.LedgerError, match=why):
            ledger.add_many("edit", {"layer": torch.full_like(W, value)})
        assert not ledger.active


def test_tied_weights_are_registered_once():
    tied = W.clone()
    with pytest.raises(ValueError, match="'b' is the same memory as 'a' .tied"):
        kernels.WeightLedger({"a": tied, "b": tied.view(4, 8)})
    halves = {"a": tied[:2], "b": tied[2:]}  # of one tensor, but each entry is in one of them
    kernels.WeightLedger(halves).add("b", U[2:], V, key="edit")
    ledger = kernels.WeightLedger({"a": tied})
    another = W.clone()
    ledger.follow({"a": another})
    ledger.register("b", tied)  # nobody's any more
    assert "b" in ledger


def test_objects_say_what_they_are():
    moment = kernels.SecondMoment(8).update(KEYS)
    assert repr(moment) == "SecondMoment(dim=8, count=40, precision='exact', device='cpu')"
    assert "groups=2, dim=8, count=0" in repr(kernels.GroupedSecondMoment(2, 8))
    assert repr(METRIC) == "Covariance(dim=8, weight=1, device='cpu')"
    assert repr(METRIC.with_history(SOLVER.K)) == "WithHistory(dim=8, device='cpu')"
    assert "edits=3, constraint='soft'" in repr(SOLVER)
    ledger = kernels.WeightLedger({"layer": W.clone()})
    ledger.add("layer", U, V, key="mine")
    assert repr(ledger) == "WeightLedger(weights=1, active=['mine'])"


def test_a_saved_moment_is_there_for_all_whom_the_umask_lets(tmp_path):
    moment, mask = kernels.SecondMoment(8).update(KEYS), os.umask(0o022)
    try:
        moment.save(tmp_path / "new" / "m.safetensors")  # the folder is made
    finally:
        os.umask(mask)
    assert (tmp_path / "new" / "m.safetensors").stat().st_mode & 0o777 == 0o644
    with pytest.raises(IsADirectoryError, match="name a file"):
        moment.save(tmp_path / "new")
