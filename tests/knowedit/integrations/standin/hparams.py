"""Hyper-parameters from a YAML file, as hosts read them: texts that are numbers become numbers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass
class HyperParams:
    layers: list[int]
    fact_token: str
    v_num_grad_steps: int
    v_lr: float
    v_loss_layer: int
    v_weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    mom2_update_weight: float
    mom2_n_samples: int
    nullspace_threshold: float
    L2: float
    rewrite_module_tmp: str
    layer_module_tmp: str
    mlp_module_tmp: str
    ln_f_module: str
    lm_head_module: str
    stats_dir: str
    device: Any = None
    fp16: bool = False

    @classmethod
    def from_hparams(cls, path):
        config = yaml.safe_load(Path(path).read_text("utf-8"))
        for key, value in config.items():
            if isinstance(value, str):
                with suppress(ValueError):
                    config[key] = float(value)
        return cls(**config)
