"""The benchmark of Hessians: all ways give one matrix, and layers of one input share it (unit)."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import hessian
from benchmarks.hessian import Exact, Ours, RunningMean


@pytest.fixture
def counted(tiny_llama):
    """Texts and the inputs' widths of the first two blocks, every layer and every input."""
    ids = torch.randint(3, 60, (5, 7), generator=torch.Generator().manual_seed(0))
    layers = {name: one.in_features for name, one in hessian.linears(tiny_llama, 2).items()}
    return ids, layers, {name: layers[name] for name in hessian.distinct(list(layers))}


def test_every_way_gives_the_hessian(tiny_llama, counted):
    ids, layers, _ = counted
    exact, _ = hessian.calibrate(tiny_llama, ids, 2, layers, Exact)
    for kind, limit in ((RunningMean, 1e-5), (Ours, 1e-6)):
        found, spent = hessian.calibrate(tiny_llama, ids, 2, layers, kind)
        assert spent > 0
        for name, H in found.items():
            assert hessian.relative_error(H, exact[name]) < limit


def test_llm_compressors_way(tiny_llama, counted, monkeypatch):
    """With a stand-in for its function: the sum of 2 x x', and the number of texts."""

    def accumulate(inputs, module, total, texts):
        rows = inputs.reshape(-1, module.in_features)
        return total + 2 * rows.T @ rows, texts + len(inputs)

    monkeypatch.setitem(sys.modules, hessian.COMPRESSOR, SimpleNamespace())
    monkeypatch.setattr(sys.modules[hessian.COMPRESSOR], "accumulate_hessian", accumulate, False)
    ids, layers, _ = counted
    exact, _ = hessian.calibrate(tiny_llama, ids, 2, layers, Exact)
    found, _ = hessian.calibrate(tiny_llama, ids, 2, layers, hessian.Compressor)
    for name, H in found.items():
        assert hessian.relative_error(H, exact[name]) < 1e-5


def test_layers_of_one_input_have_one_hessian(tiny_llama, counted):
    ids, layers, once = counted
    exact, _ = hessian.calibrate(tiny_llama, ids, 2, layers, Exact)
    assert len(layers) == 14 and len(once) == 8
    for name in layers:
        assert hessian.leader(name) in once
        assert torch.equal(exact[name], exact[hessian.leader(name)])


def test_divisors_are_gptqs():
    rows = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    H = rows.T @ rows
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped)).mT
    assert torch.allclose(hessian.divisors(H), upper.diagonal())


def test_the_page_has_a_line_a_way(tmp_path):
    header = {
        "benchmark": "hessian",
        "model": "m",
        "environment": {"cpu": "c", "cores": 2, "torch": "2", "date": "2026-01-02T"},
    }
    row = {
        "case": "a way",
        "hessians": 7,
        "cpu_seconds": 1.5,
        "speedup": 0.75,
        "spread": [0.5, 1.0],
        "megabytes": 12.0,
        "checks": [{"value": 3e-7}],
        "divisors": 4e-8,
        "blocks": 3,
        "tokens": 2048,
    }
    lines = [header, row]
    (tmp_path / "hessian.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    page = hessian.table(tmp_path)
    assert "| a way | 7 | 1.50 | 0.75x [0.50, 1.00] | 12 | 3e-07 | 4e-08 |" in page
    assert "2,048 tokens" in page
