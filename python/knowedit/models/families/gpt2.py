"""GPT-2 (model type "gpt2"): projections stored `[in, out]`."""

from __future__ import annotations

from knowedit.models.families.preset import Presets, published

PRESETS: Presets = {
    (24, 1024, 4096): published(range(8, 9), 8, 20, 0.5, 3, 0.5),  # medium (ROME only)
    (36, 1280, 5120): published(range(12, 13), 12, 20, 0.5, 4, 0.5),  # large (ROME only)
    (48, 1600, 6400): published(range(13, 18), 17, 20, 0.5, 0.75, 0.5),  # XL
}
