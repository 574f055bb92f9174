"""Qwen2 and Qwen2.5 (model type "qwen2")."""

from __future__ import annotations

from knowedit.models.families.preset import Presets, published

PRESETS: Presets = {
    (28, 3584, 18944): published(range(4, 9), 5, 25, 0.5, 4, 1e-3),  # Qwen2.5 7B
}
