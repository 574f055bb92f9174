"""Llama and the models built like it (model type "llama"), SmolLM2 among them."""

from __future__ import annotations

from knowedit.models.families.preset import Preset, Presets, published

PRESETS: Presets = {
    # SmolLM2-135M, benchmarks/quality.py: 100 CounterFact records; layers 3-6 are good
    (30, 576, 1536): Preset((5,), 5, (3, 4, 5, 6, 7, 8), {"steps": 20, "lr": 0.5}),
    (32, 4096, 11008): published(range(4, 9), 5, 25, 0.5, 4, 1e-3),  # Llama and Llama 2, 7B
    (32, 4096, 14336): published(range(4, 9), 5, 25, 0.1, 0.75, 0.5),  # Llama 3 and 3.1, 8B
    (28, 3072, 8192): published(range(4, 9), 5, 25, 0.5, 4, 1e-3),  # Llama 3.2, 3B
}
