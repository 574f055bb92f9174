"""Dispatch: preference, reasons, forcing, logging once (unit)."""

import logging
from dataclasses import dataclass

import pytest
import torch

from knowedit_kernels import _dispatch
from knowedit_kernels._dispatch import Call, Candidate, DispatchError, explain


@dataclass(frozen=True, eq=False)
class ToyCall(Call):
    x: torch.Tensor


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(_dispatch, "_candidates", {})
    monkeypatch.setattr(_dispatch, "_calls", {})
    monkeypatch.setattr(_dispatch, "_last", {})
    monkeypatch.setattr(_dispatch, "_logged", set())
    monkeypatch.delenv("KNOWEDIT_IMPL", raising=False)
    _dispatch.register(
        "toy",
        ToyCall,
        Candidate("gpu", lambda call: "gpu", device="cuda"),
        Candidate(
            "small",
            lambda call: "small",
            lambda call: None if call.x.numel() < 4 else "more than 3 elements",
            "cpu",
        ),
        Candidate("plain", lambda call: "plain"),
    )


@pytest.mark.usefixtures("toy")
def test_first_that_can_runs_and_the_record_says_why():
    assert _dispatch.run("toy", torch.zeros(2)) == "small"
    assert explain("toy").chosen == "small" and explain("toy").not_needed == ("plain",)
    assert _dispatch.run("toy", torch.zeros(9)) == "plain"
    assert "refused small: more than 3 elements" in str(explain("toy"))
    assert "refused gpu: runs on cuda, the tensors are on cpu" in str(explain("toy"))


@pytest.mark.usefixtures("toy")
def test_explain_with_arguments_runs_nothing():
    assert explain("toy", torch.zeros(2)).chosen == "small"
    assert explain("toy").chosen is None


@pytest.mark.usefixtures("toy")
def test_forcing(monkeypatch):
    monkeypatch.setenv("KNOWEDIT_IMPL", "plain")
    assert _dispatch.run("toy", torch.zeros(2)) == "plain"
    _dispatch.register("other", ToyCall, Candidate("plain", lambda call: "other"))
    monkeypatch.setenv("KNOWEDIT_IMPL", "other=plain, toy=small")
    assert _dispatch.run("toy", torch.zeros(2)) == "small"
    with pytest.raises(DispatchError, match="more than 3 elements"):
        _dispatch.run("toy", torch.zeros(9))
    monkeypatch.setenv("KNOWEDIT_IMPL", "toy=fast")
    with pytest.raises(DispatchError, match="toy has: gpu, plain, small"):
        _dispatch.run("toy", torch.zeros(2))
    monkeypatch.setenv("KNOWEDIT_IMPL", "plain, nonsense")
    with pytest.raises(DispatchError, match="for nonsense; an op has: gpu, plain, small"):
        _dispatch.run("toy", torch.zeros(2))
    monkeypatch.setenv("KNOWEDIT_IMPL", "tory=plain")
    with pytest.raises(DispatchError, match="tory=plain; the ops are: other, toy"):
        _dispatch.run("toy", torch.zeros(2))


@pytest.mark.usefixtures("toy")
def test_a_fallback_is_logged_once_and_other_devices_are_not(caplog):
    with caplog.at_level(logging.INFO, "knowedit_kernels"):
        for _ in range(3):
            _dispatch.run("toy", torch.zeros(9))
    assert [record.getMessage() for record in caplog.records] == [
        "toy: plain instead of small (more than 3 elements)"
    ]


def test_unknown_op():
    with pytest.raises(DispatchError, match="unknown op 'nonsense'"):
        explain("nonsense")
