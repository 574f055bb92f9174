"""The accuracy gate's bookkeeping: run once, remember passes for this device and source only, never
a failure (unit).
"""

import json

import pytest
import torch

from knowedit_kernels import _device, _gate

DEVICE = torch.device("cuda", 0)
FILES = ("moments/triton.py",)


@pytest.fixture(autouse=True)
def pretend_device(monkeypatch, tmp_path):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(_gate, "_verdicts", {})
    facts = _device.DeviceFacts("Test GPU", "9.0", "580.1", "2.13", "3.6.0")
    monkeypatch.setattr(_device, "cuda_facts", lambda device: facts)


def forget(monkeypatch):
    monkeypatch.setattr(_gate, "_verdicts", {})


def test_a_pass_is_remembered_across_processes(monkeypatch):
    ran = []
    assert _gate.unproven("toy", FILES, DEVICE, lambda device: ran.append(device)) is None
    assert _gate.unproven("toy", FILES, DEVICE, lambda device: ran.append(device)) is None
    forget(monkeypatch)
    assert _gate.unproven("toy", FILES, DEVICE, lambda device: ran.append(device)) is None
    assert ran == [DEVICE]
    (record,) = _gate.passes()
    assert record["gate"] == "toy" and record["driver"] == "580.1" and len(record["version"]) == 16


@pytest.mark.parametrize(
    "changed", [{"driver": "581"}, {"torch": "2.14"}, {"triton": "3.7"}, {"name": "Other GPU"}]
)
def test_anything_that_changes_asks_again(monkeypatch, changed):
    _gate.unproven("toy", FILES, DEVICE, lambda device: None)
    forget(monkeypatch)
    facts = {**_device.cuda_facts(DEVICE).key(), **changed}
    monkeypatch.setattr(_device, "cuda_facts", lambda device: _device.DeviceFacts(**facts))
    ran = []
    _gate.unproven("toy", FILES, DEVICE, lambda device: ran.append(device))
    assert ran


def test_the_version_is_the_source():
    assert _gate.sources_digest(FILES) != _gate.sources_digest(("moments/schedule.py",))


def test_a_failure_warns_once_with_its_figures_and_is_not_remembered(monkeypatch):
    with pytest.warns(
        UserWarning,
        match="toy failed its accuracy gate on Test GPU: bias 3e-5 > 1e-7; falling back",
    ):
        reason = _gate.unproven("toy", FILES, DEVICE, lambda device: "bias 3e-5 > 1e-7")
    assert reason and "bias 3e-5" in reason and _gate.passes() == []
    assert (
        _gate.unproven("toy", FILES, DEVICE, lambda device: None) == reason
    )  # silent, and not asked again
    assert _gate.verdicts() == {("toy", "cuda:0"): reason}
    forget(monkeypatch)
    assert _gate.unproven("toy", FILES, DEVICE, lambda device: None) is None


def test_a_kernel_that_raises_is_a_failure():
    def gate(device):
        raise RuntimeError("misaligned address")

    with pytest.warns(UserWarning, match="RuntimeError: misaligned address"):
        assert "misaligned" in (_gate.unproven("toy", FILES, DEVICE, gate) or "")


def test_a_gate_that_dispatches_to_itself_does_not_recurse():
    inner = []

    def gate(device):
        inner.append(_gate.unproven("toy", FILES, device, gate))
        return None

    assert _gate.unproven("toy", FILES, DEVICE, gate) is None
    assert inner == ["its accuracy gate is running"]


def test_a_damaged_record_counts_as_none():
    _gate.verdict_file().write_text("{not json")
    assert _gate.passes() == []
    assert _gate.unproven("toy", FILES, DEVICE, lambda device: None) is None
    assert len(json.loads(_gate.verdict_file().read_text())) == 1
