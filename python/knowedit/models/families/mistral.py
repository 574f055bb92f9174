"""Mistral (model type "mistral")."""

from __future__ import annotations

from knowedit.models.families.preset import Presets, published

PRESETS: Presets = {
    (32, 4096, 14336): published(range(4, 9), 5, 25, 0.5, 4, 1e-3),  # 7B
}
