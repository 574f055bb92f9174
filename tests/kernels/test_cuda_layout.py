"""The sm_90a second moment without a GPU: every address emulated, its tiles and chains, who may use
it, and its gate (unit).
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from knowedit_kernels import _gate, _native_cuda
from knowedit_kernels.moments import cuda, schedule
from knowedit_kernels.moments.call import MomentCall
from tests.kernels.cuda_emulation import Emulation
from tests.negative.tensor_core import lengths


@pytest.fixture(scope="module")
def emulation():
    return Emulation()


def test_the_constants_are_those_of_the_header(emulation):
    found = emulation.constants
    assert (found["rows"], found["columns"], found["layers"]) == (
        cuda.ROWS,
        cuda.COLUMNS,
        cuda.LAYERS,
    )
    assert (
        found["shared"] <= 232_448
        and 2 * found["accumulators"] + 40 <= 240
        and found["threads"] == 384
    )


@pytest.mark.parametrize("tokens, d", [(1, 8), (64, 128), (200, 200), (700, 392)])
@pytest.mark.parametrize("cap", [0, 256])
def test_every_entry_of_the_lower_triangle_is_exact(emulation, tokens, d, cap):
    keys = torch.randint(-3, 4, (tokens, d), generator=torch.Generator().manual_seed(d)).float()
    tiles = schedule.tile_table(d, 1, cuda.ROWS, width=cuda.COLUMNS)
    c, stages = emulation.run(keys, tiles, cap, 64)
    assert torch.equal(c.tril(), (keys.double().T @ keys.double()).tril())
    assert stages == len(tiles) * -(-tokens // 64)  # the producer counts on it


@pytest.mark.parametrize("dims", [8, 128, 136, 192, 200, 384, 1048])
def test_rectangular_tiles_cover_the_triangle_once(dims):
    count = torch.zeros(dims, dims, dtype=torch.int32)
    table = schedule.tile_table(dims, 2, cuda.ROWS, width=cuda.COLUMNS)
    for layer, i, j, _ in table.tolist():
        rows, columns = (
            slice(i * cuda.ROWS, (i + 1) * cuda.ROWS),
            slice(j * cuda.COLUMNS, (j + 1) * cuda.COLUMNS),
        )
        count[rows, columns] += layer == 1
        assert (
            count[rows, columns].tril(dims - 1).numel()
            and i * cuda.ROWS < dims
            and j * cuda.COLUMNS < dims
        )
    assert torch.all(count.tril() == torch.ones_like(count).tril()) and int(count.max()) == 1


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300, 2048, 5001])
@pytest.mark.parametrize("cap", [64, 256, 512])
def test_chains_are_those_of_the_scheme(emulation, tokens, cap):
    chains, count = [], emulation.chain(0, tokens, cap, 64)[1]
    for index in range(count):
        (begin, end), _ = emulation.chain(index, tokens, cap, 64)
        assert begin % 64 == 0 or begin == tokens
        chains.append((begin, end))
    kept = [(begin, end) for begin, end in chains if end > begin]
    assert [end - begin for begin, end in kept] == lengths(tokens, cap, 64)
    assert [begin for begin, _ in kept] == [0, *(end for _, end in kept[:-1])]


def of(tokens=5000, d=64, dtype=torch.bfloat16):
    return [torch.zeros(d, d, dtype=torch.float64)], [torch.zeros(tokens, d, dtype=dtype)]


@pytest.mark.parametrize(
    "capability, arguments, precision, reason",
    [
        ((9, 0), {}, "exact", None),
        ((9, 0), {"dtype": torch.float16}, "fp32", None),
        ((9, 0), {"tokens": 10}, "fast", None),
        ((10, 0), {}, "exact", "for Hopper"),
        ((8, 0), {}, "exact", "for Hopper"),
        ((9, 0), {"dtype": torch.float32}, "exact", "bfloat16 and float16 keys only"),
        ((9, 0), {}, "fp64", "bfloat16 and float16 keys only"),
        ((9, 0), {"d": 12}, "exact", "multiple of 8"),
        ((9, 0), {"tokens": 4095}, "exact", "float64"),
    ],
)
def test_who_may_use_it(capability, arguments, precision, reason):
    found = cuda.refusal(capability, MomentCall(*of(**arguments), precision))
    assert found is None if reason is None else reason in found


def test_an_unaligned_sum_is_refused():
    _, keys = of()
    buffer = torch.zeros(64 * 64 + 1, dtype=torch.float64)
    assert cuda.refusal((9, 0), MomentCall([buffer[1:].view(64, 64)], keys, "exact"))


def test_a_crash_or_a_hang_of_the_gate_is_only_a_refusal(monkeypatch):
    real = subprocess.run

    def child(code):
        monkeypatch.setattr(
            cuda.subprocess, "run", lambda command, **k: real([sys.executable, "-c", code], **k)
        )
        return cuda.gate_apart(torch.device("cuda", 0))

    assert child("") is None
    assert "bias 3e-5 (exit status 1)" in child("import sys; sys.exit('bias 3e-5')")
    assert "exit status -11" in child("import os; os.kill(os.getpid(), 11)")
    monkeypatch.setattr(cuda, "_GATE_SECONDS", 0.2)
    assert "no result after" in child("import time; time.sleep(60)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here")
def test_the_gate_in_its_own_process_says_why_it_cannot_run():
    """There is no library; or there is one, as a CUDA build of torch brings it, and no driver."""
    said = cuda.gate_apart(torch.device("cuda", 0))
    assert said is not None and said.endswith(" (exit status 1)")
    assert (_native_cuda.load().reason or "NVIDIA driver") in said


def test_a_library_without_cuda_is_never_built(monkeypatch):
    monkeypatch.setattr(_native_cuda, "build", lambda folder: pytest.fail("built"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _native_cuda.load.__wrapped__().reason == "this torch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        _native_cuda,
        "compiler",
        lambda: (_ for _ in ()).throw(_native_cuda.NativeBuildError("no nvcc")),
    )
    assert _native_cuda.load.__wrapped__().reason == "no nvcc"
    monkeypatch.setenv("KNOWEDIT_NATIVE", "0")
    assert "turned off" in _native_cuda.load.__wrapped__().reason


def test_the_kernels_version_covers_the_cuda_sources():
    files = cuda._files()
    assert [Path(name).name for name in files[:4]] == [
        "hopper.cuh",
        "syrk.cu",
        "syrk_kernel.cuh",
        "syrk_layout.h",
    ]
    assert _gate.sources_digest(files) != _gate.sources_digest(files[1:])
