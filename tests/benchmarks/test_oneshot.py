"""llm-compressor's call is measured where it is installed; here its table, and what is compared
(unit).
"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import oneshot

ROW = {
    "whole_call": 80.04,
    "cpu_seconds": 12.345,
    "speedup": 1.5,
    "spread": [1.4, 1.6],
    "megabytes": 17.4,
    "checks": [{"name": "Hessian", "value": 1.4e-7}],
    "other_weights": 0.0123,
    "perplexity": 21.98764,
    "perplexity_of_float64": 21.9,
    "perplexity_before": 20.0,
    "blocks": 6,
    "tokens": 4096,
    "compressor": "1.2",
}


def test_a_line_for_each_way(tmp_path):
    header = {"benchmark": "oneshot", "model": "a model", "environment": {
        "cpu": "a CPU", "cores": 2, "torch": "2", "date": "2026-01-01T00:00"}}  # fmt: skip
    rows = [{"case": oneshot.THEIRS, **ROW}, {"case": oneshot.OURS, **ROW, "other_weights": 0.0}]
    lines = [json.dumps(line) for line in (header, *rows)]
    (tmp_path / "oneshot.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    page = oneshot.table(tmp_path)
    line = "| its own, float32 | 80.0 | 12.35 | 1.50x [1.40, 1.60] | 17 | 1e-07 | 1.2 % | 21.9876 |"
    assert line in page and "| SecondMoment |" in page and "| 0 % |" in page
    assert "20.0000 before, 21.9000 with float64 Hessians" in page


def test_only_the_quantised_layers_are_compared(tiny_llama):
    whole = oneshot.weights(tiny_llama.hf, 2)
    layers = [tiny_llama.hf.model.layers[i] for i in range(2)]
    linear = [m for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert len(whole) == sum(m.weight.numel() for m in linear)


def test_perplexity_of_a_model_that_knows_nothing(tiny_llama):
    hf = tiny_llama.hf
    with torch.no_grad():
        hf.get_output_embeddings().weight.zero_()
    ids = torch.randint(0, 20, (2, 9))
    assert oneshot.perplexity(hf, ids) == pytest.approx(hf.config.vocab_size, rel=1e-4)
