"""The benchmark: no speed-up without accuracy, exit codes, peers that are absent, results files and
their picture (unit).
"""

import json
import math
import sys
import types
from xml.etree import ElementTree

import pytest
import torch

from knowedit_kernels.bench import __main__ as bench
from knowedit_kernels.bench import machine, moments, results, timing
from knowedit_kernels.bench.problem import Check, Provider

SMALL = {
    "moments": ["--d", "40", "--tokens", "600"],
    "grouped": ["--d", "40", "--rows", "600", "--experts", "5"],
    "lowrank": ["--rows", "24", "--d", "40", "--rank", "3"],
    "solver": ["--d", "48", "--edits", "2,5"],
    "target_loss": ["--rows", "5", "--d", "16", "--vocabulary", "300"],
    "jvp": ["--tokens", "9", "--d", "128", "--tangents", "3"],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings that need no measuring, and short rounds."""
    monkeypatch.setattr(machine, "ceilings", lambda device, dtypes: fixed_ceilings(dtypes))
    real = timing.interleave
    monkeypatch.setattr(
        timing, "interleave", lambda runs, device, rounds, least: real(runs, device, rounds, 0.0)
    )


def fixed_ceilings(dtypes):
    names = [
        str(machine.ceiling_dtype(dtype, torch.device("cpu"))).removeprefix("torch.")
        for dtype in dtypes
    ]
    return {"copy_gbps": 10.0, "matmul_tflops": dict.fromkeys(names, 0.1)}


def bench_to(path, operation, *arguments):
    shape = [] if "--d" in arguments else SMALL[operation]
    status = bench.main(
        [operation, *shape, "--device", "cpu", "--rounds", "2", "--json", str(path), *arguments]
    )
    return status, results.read(path)[1]


@pytest.mark.parametrize("operation", bench.OPERATIONS)
def test_every_provider_of_every_operation(operation, tmp_path, capsys):
    providers = bench.OPERATIONS[operation].providers
    status, rows = bench_to(tmp_path / "a.jsonl", operation, "--providers", ",".join(providers))
    assert status == 0
    ran = [row for row in rows if "ms" in row]
    assert {row["provider"] for row in rows} - {row["provider"] for row in ran} <= {
        "quack",
        "cublas",
    }
    assert all(row["status"] == "ok" and row["errors"] and row["useful_tflops"] > 0 for row in ran)
    assert all(("speedup" in row) == (row["provider"] != "torch") for row in ran)
    assert next(row for row in ran if row["provider"] == "ours")["implementation"]
    out = capsys.readouterr().out
    assert "measured ceilings: copy 10.0 GB/s" in out and "n/a (no counter for a CPU)" in out
    with open(tmp_path / "a.jsonl") as file:
        assert json.loads(file.readline())["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
def test_moments_in_every_dtype(dtype, tmp_path):
    status, rows = bench_to(
        tmp_path / "a.jsonl", "moments", "--dtype", dtype, "--providers", "ours,ours-stream"
    )
    assert status == 0 and [row["status"] for row in rows] == ["ok", "ok"]


def test_useful_flops_of_a_second_moment_are_half_the_nominal(tmp_path):
    _, (row,) = bench_to(tmp_path / "a.jsonl", "moments", "--providers", "ours")
    assert row["useful_tflops"] == pytest.approx(600 * 40 * 41 / row["ms"]["p50"] / 1e9)
    assert row["nominal_tflops"] / row["useful_tflops"] == pytest.approx(2 * 40 / 41)
    assert row["peak_percent"] == pytest.approx(1000 * row["useful_tflops"])


def wrong(factor, slack=1.0):
    """A second moment off by `factor`."""

    def build(inputs):
        run = moments.OPERATION.providers["ours"].build(inputs)
        return lambda: run() * factor

    return Provider("wrong", build, slack=slack)


@pytest.mark.parametrize("factor", [1 + 1e-6, float("nan")])
def test_a_wrong_provider_is_red(factor, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(moments.OPERATION.providers, "wrong", wrong(factor))
    status, rows = bench_to(tmp_path / "a.jsonl", "moments", "--providers", "torch,wrong,ours")
    by_name = {row["provider"]: row for row in rows}
    assert status == 1 and by_name["wrong"]["status"] == "over budget" and by_name["wrong"]["red"]
    assert "speedup" not in by_name["wrong"] and "speedup" in by_name["ours"]
    captured = capsys.readouterr()
    assert "OVER" in next(line for line in captured.out.splitlines() if line.startswith("wrong"))
    assert "1 of 3 rows" in captured.err


def test_no_speed_up_relative_to_a_red_baseline(tmp_path, monkeypatch):
    monkeypatch.setitem(moments.OPERATION.providers, "torch", wrong(1.5, slack=1e3))
    status, rows = bench_to(tmp_path / "a.jsonl", "moments", "--providers", "ours,torch")
    assert status == 1 and not any("speedup" in row for row in rows)


def test_a_provider_that_fails_is_red_and_the_others_still_run(tmp_path, monkeypatch):
    def build(inputs):
        raise MemoryError("too large")

    monkeypatch.setitem(moments.OPERATION.providers, "broken", Provider("broken", build))
    status, rows = bench_to(tmp_path / "a.jsonl", "moments", "--providers", "broken,ours")
    assert (
        status == 1
        and rows[0]["status"] == "failed: MemoryError: too large"
        and rows[1]["status"] == "ok"
    )


def test_without_the_check_there_is_no_speed_up(tmp_path):
    status, rows = bench_to(
        tmp_path / "a.jsonl", "lowrank", "--no-check", "--providers", "ours,torch"
    )
    assert status == 0 and [row["status"] for row in rows] == ["not checked"] * 2
    assert not any("speedup" in row for row in rows)


def test_absent_peers_are_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(moments.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(moments, "_cublas_library", lambda: None)
    status, rows = bench_to(
        tmp_path / "a.jsonl", "moments", "--providers", "quack,cublas,liger,ours"
    )
    expected = ["unavailable: not installed"] * 2 + ["unavailable: liger has no moments", "ok"]
    assert status == 0 and [row["status"] for row in rows] == expected
    assert "quack         unavailable: not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--d", "0"], ["--dtype", "int8"], ["--d", "x"], ["--rounds", "0"]]
)
def test_bad_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["moments", *arguments])
    assert stopped.value.code == 2 and arguments[1] in capsys.readouterr().err


def test_explain_says_why_not(capsys):
    assert bench.main(["explain", "moments", "--d", "8", "--tokens", "4", "--device", "cpu"]) == 0
    assert "refused triton: runs on cuda, the tensors are on cpu" in capsys.readouterr().out
    for operation in ("lowrank", "solver", "target_loss"):
        assert bench.main(["explain", operation, *SMALL[operation], "--device", "cpu"]) == 0
    assert "no implementation can run" not in capsys.readouterr().out


def row(p50, red=False, **changes):
    times = {"p20": 0.99 * p50, "p50": p50, "p80": 1.01 * p50}
    base = {
        "op": "moments",
        "shape": {"d": 8},
        "provider": "ours",
        "status": "ok",
        "red": red,
        "ms": times,
    }
    return {**base, "useful_tflops": 0.05 / p50, "intensity": 40.0, **changes}


@pytest.mark.parametrize(
    "after, verdict, worse",
    [
        (row(1.02), "same", False),
        (row(0.5), "faster", False),
        (row(1.05), "same", False),
        (row(1.5), "SLOWER", True),
        (row(0.5, red=True), "NOW OVER BUDGET", True),
        (row(1.0, provider="torch"), "ran -> absent", True),
    ],
)
def test_compare(after, verdict, worse, tmp_path, capsys):
    paths = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, record in zip(paths, (row(1.0), after)):
        results.write(path, {}, [record])
    assert bench.main(["compare", *map(str, paths)]) == int(worse)
    assert verdict in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"environment": {}}\n{"op": 1}'])
def test_a_file_that_is_not_ours(content, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    assert bench.main(["roofline", str(path), "-o", str(tmp_path / "x.svg")]) == 2
    assert "was not written by" in capsys.readouterr().err
    assert bench.main(["compare", str(tmp_path / "absent"), str(path)]) == 2


def test_roofline(tmp_path, capsys):
    environment = {
        "cpu": "a machine",
        "ceilings": {"copy_gbps": 10.0, "matmul_tflops": {"bfloat16": 0.1}},
    }
    results.write(
        tmp_path / "a.jsonl", environment, [row(1.0), row(2.0, red=True, provider="torch")]
    )
    assert bench.main(["roofline", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "a.svg")]) == 0
    text = (tmp_path / "a.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for label in (
        "a machine",
        "bfloat16 matmul, 0.1 TFLOP/s",
        "copy, 10 GB/s",
        "moments: ours",
        "torch (over budget)",
    ):
        assert label in text
    results.write(
        tmp_path / "b.jsonl",
        environment,
        [{key: row(1.0)[key] for key in ("op", "shape", "provider", "status")}],
    )
    assert (
        bench.main(["roofline", str(tmp_path / "b.jsonl")]) == 2
        and "nothing to draw" in capsys.readouterr().err
    )


def test_interleaving_and_percentiles():
    order = []
    seconds = timing.interleave(
        {name: lambda name=name: order.append(name) for name in "ab"}, torch.device("cpu"), 2, 0.0
    )
    assert "".join(order) == "ab" + "ab" + "ba" and {len(times) for times in seconds.values()} == {
        2
    }
    assert [timing.percentile([3.0, 1.0, 2.0], p) for p in (0, 25, 50, 100)] == [1.0, 1.5, 2.0, 3.0]
    assert timing.speedup([1.0, 8.0, 3.0], [1.0, 2.0, 1.0]) == 3.0
    with pytest.raises(ValueError, match="round"):
        timing.percentile([], 50)


def test_nan_is_too_much():
    assert (
        not Check("e", math.nan, 1.0).ok
        and Check("e", -1.0, 1.0).ok
        and not Check("e", -1.1, 1.0).ok
    )


def test_energy_from_the_counter(monkeypatch):
    used = iter(range(1000, 10**9, 8000))  # millijoules
    fake = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(used),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="0")
    )
    monkeypatch.setattr(timing, "synchronise", lambda device: None)
    meter, calls = machine.EnergyMeter(torch.device("cuda"), 0.01), []
    joules = meter.joules(lambda: calls.append(0))
    assert meter.reason == "" and joules == pytest.approx(8 / len(calls))
    fake.nvmlInit = lambda: 1 / 0
    assert "division" in machine.EnergyMeter(torch.device("cuda"), 1.0).reason
    assert machine.EnergyMeter(torch.device("cuda"), 0.0).reason == "turned off"


def test_measured_ceilings(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(machine, "_best", lambda run, device: run() is not None and 0.5)
    found = machine.ceilings(torch.device("cpu"), [torch.float16, torch.float32])
    assert found == {
        "copy_gbps": 2 * 2**26 / 0.5 / 1e9,
        "matmul_tflops": {"float32": 2 * 1024**3 / 0.5 / 1e12},
    }
