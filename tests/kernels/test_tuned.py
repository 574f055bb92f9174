"""A table of measured block sizes is used where it fits, gated like the built-in sizes, and
harmless when damaged (unit).
"""

import json

import pytest
import torch

from knowedit_kernels.moments import cuda, gpu, reference, schedule, tuned
from knowedit_kernels.moments.call import MomentCall

SMALL = {
    "d": 512,
    "variant": "triton",
    "tile": 64,
    "depth": 32,
    "warps": 4,
    "stages": 5,
    "tma": False,
}
LARGE = {
    "d": 8192,
    "variant": "cuda",
    "tile": 128,
    "depth": 64,
    "warps": 8,
    "stages": 3,
    "tma": True,
    "useful_tflops": 1.0,
}
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU (80GB)")
    tuned.table.cache_clear()
    yield
    tuned.table.cache_clear()


def write(*entries):
    tuned.file_of("Test GPU (80GB)").write_text(json.dumps({"second_moment": entries}))


def test_without_a_table_nothing_changes():
    config = schedule.config(torch.bfloat16, "exact", 90, 20_000)
    assert tuned.refine(config, torch.bfloat16, 4096, GPU) == config
    assert tuned.sources(GPU) == [] and tuned.nearest(GPU, 4096) is None


def test_the_nearest_entry_counts_for_16_bit_keys_only():
    write(LARGE, SMALL)
    config = schedule.config(torch.bfloat16, "exact", 90, 20_000)
    fitted = tuned.refine(config, torch.float16, 900, GPU)
    assert (fitted.tile, fitted.depth, fitted.warps, fitted.stages, fitted.tma, fitted.parts) == (
        64,
        32,
        4,
        5,
        False,
        4,
    )
    assert (fitted.chain, fitted.first, fitted.products) == (
        config.chain,
        config.first,
        config.products,
    )
    assert tuned.refine(config, torch.bfloat16, 14336, GPU).stages == 3
    assert tuned.refine(config, torch.float32, 900, GPU) == config
    assert tuned.refine(config, torch.bfloat16, 900, torch.device("cpu")) == config
    assert tuned.sources(GPU) == [str(tuned.FOLDER / "test-gpu-80gb.json")]


def test_descriptors_stay_off_where_they_cannot_be_used():
    write(LARGE)
    config = schedule.config(torch.bfloat16, "exact", 90, 20_000, tma=False)
    assert not tuned.refine(config, torch.bfloat16, 8192, GPU).tma


@pytest.mark.parametrize(
    "field, value",
    [("depth", 48), ("tma", 1), ("tile", True), ("d", 0), ("variant", ""), ("stages", 9)],
)
def test_a_damaged_table_is_ignored_with_a_warning(field, value):
    write(LARGE, {**SMALL, field: value})
    with pytest.warns(UserWarning, match="ignoring .*test-gpu-80gb.json"):
        assert tuned.entries(GPU) == ()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"second_moment": [{"d": 1}]}', '{"second_moment": 3}']
)
def test_a_file_of_something_else_is_ignored_with_a_warning(text):
    tuned.file_of("Test GPU (80GB)").write_text(text)
    with pytest.warns(UserWarning, match="tune again"):
        assert tuned.entries(GPU) == ()


def test_the_launcher_takes_the_table(monkeypatch):
    write(SMALL)
    entries, seen = tuned.entries(GPU), []
    monkeypatch.setattr(tuned, "entries", lambda device: entries)
    monkeypatch.setattr(gpu, "launch_", lambda cs, keys, config: seen.append(config))
    gpu.accumulate_(
        MomentCall(
            [torch.zeros(48, 48, dtype=torch.float64)],
            [torch.ones(5000, 48, dtype=torch.bfloat16)],
            "exact",
        )
    )
    assert [(config.tile, config.stages) for config in seen] == [(64, 5)]


def test_the_gate_runs_every_entry(monkeypatch):
    write(SMALL, LARGE)
    entries = tuned.entries(GPU)
    monkeypatch.setattr(tuned, "entries", lambda device: entries)

    def wrong_if_tuned(cs, keys, config):
        cs[0] += reference.second_moment(keys[0]).tril() * (1 + 1e-6 * (config.stages == 5))

    monkeypatch.setattr(gpu, "launch_", wrong_if_tuned)
    failure = gpu.gate(torch.device("cpu"))
    assert failure is not None and "stages=5" in failure and "normwise" in failure
    monkeypatch.setattr(tuned, "entries", lambda device: entries[1:])
    assert gpu._gate_tuned(torch.device("cpu")) is None


def test_triton_is_preferred_where_it_was_faster():
    write(SMALL, LARGE)
    assert "slower" in (cuda._slower(GPU, [torch.ones(1, 600)]) or "")
    assert cuda._slower(GPU, [torch.ones(1, 8000)]) is None
