"""GPT-J (model type "gptj")."""

from __future__ import annotations

from knowedit.models.families.preset import Presets, published

PRESETS: Presets = {
    (28, 4096, 16384): published(range(3, 9), 5, 25, 0.5, 0.75, 0.5),  # 6B
}
