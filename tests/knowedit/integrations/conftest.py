"""The stand-in package, afresh for each test, and what it works on."""

from __future__ import annotations

import copy
import importlib
import random
import string
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from knowedit.integrations import uninstall

HERE = Path(__file__).parent
# letters without an order: keys of many directions, so that nothing hangs on rounding
_CHOICE = random.Random(0)
TEXTS = ["".join(_CHOICE.choices(string.printable, k=_CHOICE.randrange(4, 60))) for _ in range(60)]
REQUESTS = [
    {"prompt": "{} lives in", "subject": "Ada", "target_new": "Rome"},
    {"prompt": "The capital of {} is", "subject": "Peru", "target_new": " Oslo"},
    {"prompt": "They say that {} plays the", "subject": "Bob Ray", "target_new": "harp"},
]


class Standin:
    """The modules of the stand-in, by name."""

    def __getattr__(self, name):
        return importlib.import_module(f"standin.{name}")


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    for name in [name for name in sys.modules if name.partition(".")[0] == "standin"]:
        del sys.modules[name]
    modules = Standin()
    modules.layer_stats.TEXTS += TEXTS
    for name in ("memit_main", "rome_main", "alphaedit_main", "emmet_main", "evaluation"):
        getattr(modules, name)
    yield modules
    uninstall()


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny(request):
    return request.getfixturevalue(request.param)


def hparams_of(model, folder, **changes):
    """Hyper-parameters as the hosts name them."""
    layer = model.layout.layer(0).replace("0", "{}")
    settings = {
        "layers": [1, 2],
        "fact_token": "subject_last",
        "v_num_grad_steps": 6,
        "v_lr": 0.1,
        "v_loss_layer": 3,
        "v_weight_decay": 0.5,
        "clamp_norm_factor": 0.75,
        "kl_factor": 0.0625,
        "mom2_update_weight": 50.0,
        "mom2_n_samples": 50,
        "rewrite_module_tmp": model.layout.projection(0).replace("0", "{}"),
        "layer_module_tmp": layer,
        "mlp_module_tmp": f"{layer}.mlp",
        "ln_f_module": model.layout.norm,
        "lm_head_module": "lm_head",
        "stats_dir": folder,
    }
    return SimpleNamespace(**{**settings, **changes})


@pytest.fixture
def hparams(tiny, tmp_path):
    return hparams_of(tiny, tmp_path / "stats")


@pytest.fixture(params=["text", "dict"])
def requests_given(request):
    """In both dialects: the target as a text, or in a dictionary."""
    given = copy.deepcopy(REQUESTS)
    if request.param == "dict":
        for one in given:
            one["target_new"] = {"str": one["target_new"]}
    return given
