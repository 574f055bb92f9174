"""The benchmarks run, refuse a speed-up without accuracy, and their table goes where it should;
tiny sizes throughout (unit).
"""

import dataclasses
import json
import os
import re
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    common,
    gpu_experiments,
    gpu_lab,
    gpu_suite,
    moments,
    neuron,
    peers,
    quality,
    solve,
    statistics,
    table,
    values,
)
from benchmarks import lowrank as lowrank_benchmark
from benchmarks.common import Check
from knowedit.facts.fact import Fact, Probe
from knowedit.methods import NeuronPatch
from knowedit.methods.locate.values import ValueSettings
from knowedit.statistics import key_statistics
from knowedit_kernels import _native_cuda, lowrank
from knowedit_kernels.bench import machine
from knowedit_kernels.moments import SecondMoment, tuned
from knowedit_kernels.testing import grade_moment

TEXTS = [
    f"Number {i} of a few short texts, which differ in their length. " * (1 + i % 4)
    for i in range(12)
]
FACTS = [
    Fact(
        prompt="The capital of {} is",
        subject=subject,
        target=target,
        true="Paris",
        paraphrases=(f"{subject}'s capital is",),
        neighbours=(Probe("The capital of Spain is", "Madrid"),),
    )
    for subject, target in (("France", "Lyon"), ("Brazil", "Rome"), ("Norway", "Kyiv"))
]
ROUNDS = {"ours": [1.0, 2.0], "peer": [3.0, 8.0]}


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def report(tmp_path):
    return common.Report("test", tmp_path / "test.jsonl")


def test_ratios_are_taken_within_a_round(report):
    report.compare("case", ROUNDS, "peer", [Check("e", 1e-9, 1e-8)], target=3.0)
    row = rows_of(report.output)[1]
    assert row["speedup"] == 3.5 and row["spread"] == [3.0, 4.0]
    assert report.finish() == 0


@pytest.mark.parametrize("error", [2e-8, float("nan")])
def test_no_speed_up_without_accuracy(report, capsys, error):
    report.compare("case", ROUNDS, "peer", [Check("e", error, 1e-8)])
    assert "speedup" not in rows_of(report.output)[1]
    assert "MISSES" in capsys.readouterr().out
    assert report.finish() == 1


def test_a_control_must_be_rejected(report):
    report.compare("right", ROUNDS, "peer", [Check("e", 1.0, 1e-8)], control=True)
    assert report.finish() == 0
    report.compare("wrong", ROUNDS, "peer", [Check("e", 0.0, 1e-8)], control=True)
    assert report.finish() == 1


def test_a_missed_floor_fails(report):
    report.floor("case", "efficacy", 0.99, 0.99)
    assert report.finish() == 0
    report.floor("case", "efficacy", 0.98, 0.99)
    assert report.finish() == 1


def test_interleave_alternates():
    order = []
    common.interleave({name: lambda name=name: order.append(name) for name in "ab"}, 2, least=0)
    assert "".join(order) == "ab" + "ab" + "ba"


@pytest.mark.parametrize("script", [lowrank_benchmark, moments, solve])
def test_kernel_scripts(script, tmp_path):
    output = tmp_path / "out.jsonl"
    assert (
        script.main(["--quick", "--threads", "1", "--repeats", "1", "--output", str(output)]) == 0
    )
    header, *rows = rows_of(output)
    assert torch.__version__.startswith(header["environment"]["torch"])
    assert all(row["accurate"] != row.get("control", False) for row in rows)
    assert any("target" in row for row in rows)


def test_statistics_equal_the_peer(tiny_llama, report):
    for peer in (statistics.Peer("small", 40), statistics.Peer("large, short pieces", 200, 30)):
        statistics.measure(report, tiny_llama, None, TEXTS, [1, 2], peer, 1)
    assert [row["accurate"] for row in report.rows[1:]] == [True, True]


def test_the_peers_batches_hold_everything_within_budget():
    pieces = [[0] * n for n in (3, 50, 7, 7, 1, 20)] * 40
    found = list(peers.padded_batches(pieces, 100))
    assert sorted(map(len, (p for batch in found for p in batch))) == sorted(map(len, pieces))
    assert max(len(batch) * max(map(len, batch)) for batch in found) <= 100


@pytest.mark.parametrize("tiny", ["tiny_llama", "tiny_gpt2"])
def test_values_equal_the_peer(tiny, request, report):
    settings = ValueSettings(steps=4, contexts=values.CONTEXTS[:2])
    values.measure(report, request.getfixturevalue(tiny), FACTS, 2, 1, settings, 1)
    assert report.rows[1]["accurate"] and report.rows[1]["delta_error"] < 1e-4
    assert report.finish() == 0


def test_quality_judges_both_protocols(tiny_llama, report, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(TEXTS))
    collected = key_statistics(tiny_llama, [1], corpus, 500, directory=tmp_path / "s")
    quality.run(report, tiny_llama, FACTS, collected, 2)
    judged = [row for row in report.rows[1:] if "floor" in row]
    assert len(judged) == sum(map(len, quality.FLOORS.values()))
    assert {row["records"] for row in judged} == {2, 3}
    assert not tiny_llama.ledger.active


def test_neuron_patches_are_judged_as_the_others(tiny_llama, report, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(TEXTS))
    editor = NeuronPatch(layers=(1,), corpus=corpus, tokens=300)
    neuron.run(report, tiny_llama, FACTS, editor, 2, 1)
    assert len([row for row in report.rows[1:] if "floor" in row]) == sum(
        map(len, quality.FLOORS.values())
    )
    assert not tiny_llama.ledger.active


def test_options_are_spelled_as_the_command_line_spells_them():
    """One spelling an idea; what takes several values is repeated."""
    plural = r'"--(methods|layers|facts|edits|records|subjects|sets|seeds|peers)"'
    for script in sorted(common.HERE.glob("*.py")):
        text = script.read_text("utf-8")
        assert not re.search(rf'{plural}|"--[a-z-]+",[^)]*nargs="[+*]"', text), script.name


def test_a_repeated_option_replaces_its_default():
    parser = common.parser("x", None, 1)
    assert parser.parse_args([]).threads == [1, 2]
    assert parser.parse_args(["--threads", "4", "--threads", "8"]).threads == [4, 8]
    assert parser.parse_args([]).threads == [1, 2]


@pytest.fixture
def ceilings(monkeypatch):
    """Not measured: a bfloat16 product takes seconds on a CPU without bfloat16 units."""
    rates = {str(dtype).removeprefix("torch."): 1.0 for dtype in gpu_experiments.DTYPES.values()}
    found = {"copy_gbps": 1.0, "matmul_tflops": rates}
    monkeypatch.setattr(machine, "ceilings", lambda device, dtypes: found)


@pytest.mark.usefixtures("ceilings")
def test_gpu_suite_dry_run(tmp_path, capsys, monkeypatch):
    done = subprocess.CompletedProcess([], 0, stdout="9 skipped", stderr="")
    apart = SimpleNamespace(run=lambda *a, **k: done, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu_experiments, "subprocess", apart)  # tests/gpu run by themselves
    assert gpu_suite.main(["--dry-run", "--repeats", "1", "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "gpu-dry-run.jsonl")[1:]
    done = [row["step"] for row in rows if row.get("failure", "") is None and "seconds" in row]
    assert done == [step.name for step in gpu_suite.STEPS] + ["outcome"]
    assert all("reference" in row["path"] and not row["red"] for row in rows)
    checked = [row for row in rows if row.get("case") == "correctness"]
    assert {row["op"] for row in checked} == {"moments", "lowrank", "target_loss"}
    assert all(row["errors"] and row["implementation"] for row in checked)
    assert {(row["start"], row["chain"]) for row in rows if "chain" in row} == {
        (start, chain) for start in ("zero", "centred") for chain in gpu_lab.DRY.chains
    }
    entries = json.loads((tmp_path / "tuned" / "dry-run.json").read_text())["second_moment"]
    assert [tuned.parse(entry).d for entry in entries] == list(gpu_lab.DRY.dims)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "gpu-dry-run-bias.png",
        "gpu-dry-run-roofline.png",
    ]
    assert "0 red" in capsys.readouterr().out
    assert not list(tuned.FOLDER.glob("dry*"))


def test_gpu_suite_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


def wrong_update(W, U, V, **options):
    return W.addmm_(U.to(W.dtype), V.T.to(W.dtype), alpha=1.5)


@pytest.mark.usefixtures("ceilings")
@pytest.mark.parametrize(
    "holder, name, wrong, step",
    [
        (SecondMoment, "sum", lambda self: self._lower + 1e-3, "correctness"),
        (lowrank, "low_rank_update_", wrong_update, "correctness"),
        (
            gpu_lab.Way,
            "add_",
            lambda self, c, keys: c.add_((1 + 1e-6) * keys.double().T @ keys.double()),
            "E2",
        ),
        (gpu_lab.Way, "add_", lambda self, c, keys: c.fill_(float("nan")), "E1"),
    ],
    ids=["moments", "lowrank", "launch", "nan"],
)
def test_gpu_suite_rejects_a_wrong_kernel(holder, name, wrong, step, monkeypatch, capsys):
    monkeypatch.setattr(holder, name, wrong)
    assert gpu_suite.main(["--dry-run", "--repeats", "1", "--only", step]) == 1
    assert "RED" in capsys.readouterr().out


def test_gpu_suite_goes_on_after_a_failure_and_skips_what_no_longer_fits(monkeypatch, capsys):
    def fails(lab):
        raise RuntimeError("an illegal memory access")

    late = gpu_suite.Step("late", lambda lab: pytest.fail("ran without time"), 30, 60)
    steps = (
        gpu_suite.Step("bad", fails, 0, 9),
        late,
        gpu_suite.Step("good", lambda lab: None, 0, 9),
    )
    monkeypatch.setattr(gpu_suite, "STEPS", steps)
    assert gpu_suite.main(["--dry-run", "--budget", "20"]) == 1
    said = capsys.readouterr().out
    assert "RuntimeError: an illegal memory access" in said and "skipped: needs 30 s" in said
    assert said.index("skipped") < said.index("good") < said.index("1 red")


def test_nan_and_bias_show_in_the_checks_on_the_device():
    keys = moments.gated_keys(3000, 40).bfloat16()
    expected, c = gpu_lab.sum64(keys), gpu_lab.sum64(keys).tril()
    c += (
        torch.randn(c.shape, generator=torch.Generator().manual_seed(0), dtype=c.dtype).tril()
        * 1e-7
        * expected.abs()
    )
    whole = grade_moment(c + c.tril(-1).T, expected)
    for check in gpu_lab.moment_checks(c, expected, rows=16):
        assert check.value == pytest.approx(getattr(whole, check.name), rel=1e-9)
    c[30, 2] = float("nan")
    assert [check.ok for check in gpu_lab.moment_checks(c, expected, rows=16)] == [
        False,
        False,
        True,
    ]


@pytest.fixture
def gpu_like(monkeypatch, report):
    """A lab that believes it is on a Hopper."""
    monkeypatch.setattr(gpu_lab.Lab, "dry", False)
    monkeypatch.setattr(gpu_lab.Lab, "capability", 90)
    lab = gpu_lab.Lab(torch.device("cpu"), "NVIDIA H200", gpu_lab.DRY, report, 1, 0.0)
    lab.until = time.monotonic() + 10
    return lab


def raises(device, **options):
    raise RuntimeError("an illegal memory access")


@pytest.mark.parametrize(
    "cuda_verdict, proven", [(lambda device, seconds: None, True), (raises, False)]
)
def test_every_gate_is_heard(gpu_like, cuda_verdict, proven, monkeypatch):
    monkeypatch.setattr(
        gpu_experiments._native_cuda, "load", lambda: _native_cuda.NativeCuda(tuned.FOLDER)
    )
    monkeypatch.setattr(gpu_experiments.gpu, "gate", lambda device: None)
    monkeypatch.setattr(gpu_experiments.grouped_gpu, "gate", lambda device: None)
    monkeypatch.setattr(gpu_experiments.lowrank_gpu, "gate", lambda device: "bias 1e-3")
    monkeypatch.setattr(gpu_experiments.loss_gpu, "gate", raises)
    monkeypatch.setattr(gpu_experiments.cuda, "gate_apart", cuda_verdict)
    gpu_experiments.gates(gpu_like)
    verdicts = {row["case"]: row["red"] for row in gpu_like.report.rows[1:]}
    assert verdicts == {
        "moments.triton": False,
        "moments.grouped": False,
        "lowrank.triton": True,
        "target_loss.triton": True,
        "moments.cuda": not proven,
    }
    assert gpu_like.cuda_proven is proven and gpu_like.report.failed
    assert any(way.variant == "cuda" for way in gpu_like.ways()) is proven


@pytest.mark.parametrize("variant", tuned.VARIANTS)
def test_the_profiled_program_runs_dry_whichever_way_was_fastest(variant):
    config = dataclasses.asdict(
        gpu_lab.schedule.config(torch.bfloat16, "exact", 90, gpu_lab.LAUNCH)
    )
    gpu_experiments.profile(16, variant, config, tokens=64, device="cpu")


def test_predictions_are_those_of_the_device(gpu_like):
    assert gpu_like.predicted("rome")[14336] == 8.44
    gpu_like.name = "NVIDIA B300"
    assert gpu_like.predicted("rome") is None


COUNTERS = """cat <<'EOF'
"ID","Metric Name","Metric Unit","Metric Value"
"0","Waves","","4"
EOF"""


@pytest.mark.parametrize(
    "says, expected",
    [
        (COUNTERS, "Waves: 4"),
        ("echo ERR_NVGPUCTRPERM", "no counters: ERR_NVGPUCTRPERM"),
        ("exec sleep 60", "no result"),
    ],
)
def test_the_profiler_is_asked_and_may_refuse(
    gpu_like, says, expected, tmp_path, monkeypatch, capsys
):
    gpu_like.until = time.monotonic() + 1
    (tmp_path / "ncu").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gpu_experiments.e6_counters(gpu_like)
    assert expected in capsys.readouterr().out and not gpu_like.report.failed


@pytest.mark.parametrize(
    "code, said, red",
    [(0, "3 passed", False), (0, "3 skipped", True), (1, "FAILED tests/gpu/x - y\n1 failed", True)],
)
def test_the_device_tests_must_run_and_pass(gpu_like, code, said, red, monkeypatch):
    done = subprocess.CompletedProcess([], code, stdout=said, stderr="")
    monkeypatch.setattr(gpu_experiments.subprocess, "run", lambda *args, **options: done)
    gpu_experiments.device_tests(gpu_like)
    assert gpu_like.report.failed is red


def test_counters_are_read_from_between_other_output():
    text = (
        'hello\n"ID","Metric Name","Metric Unit","Metric Value"\n"0","L2 Hit '
        'Rate","%","61.5"\n"0","Waves","","4"\n'
    )
    assert gpu_experiments.counters_of(f"==PROF== connected\n{text}") == {
        "L2 Hit Rate": "61.5 %",
        "Waves": "4",
    }
    assert gpu_experiments.counters_of("==ERROR== ERR_NVGPUCTRPERM") == {}


def test_every_processor_keeps_its_results(report, tmp_path, monkeypatch):
    path = tmp_path / "solve.jsonl"
    for name, target in (("One CPU", 1.0), ("Other (R) CPU", 2.0)):
        monkeypatch.setattr(common, "_cpu_name", lambda name=name: name)
        report.rows[0]["environment"]["cpu"] = name
        del report.rows[1:]
        report.output = common.of_this_processor(path)
        report.compare("a solve", ROUNDS, "peer", [Check("e", 1e-9, 1e-8)], target=target)
        assert common.of_this_processor(path) == report.output
    assert {p.name for p in tmp_path.glob("*.jsonl")} == {"solve.jsonl", "solve.other-cpu.jsonl"}
    first, second = table.table(tmp_path).split("**Other (R) CPU**")
    assert first.startswith("**One CPU**") and "| 1x |" in first and "| 2x |" in second


def test_table_is_written_and_checked(report, tmp_path):
    report.output = tmp_path / "solve.jsonl"
    report.compare("a solve", ROUNDS, "peer", [Check("e", 1e-9, 1e-8)], target=4.0)
    report.floor("edits", "efficacy", 0.98, 0.99, low=0.9, high=1.0)
    readme = tmp_path / "benchmarks.md"
    arguments = ["--results", str(tmp_path), "--page", str(readme)]
    readme.write_text("before")
    assert table.main([*arguments, "--write"]) == 2
    readme.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    assert table.main([*arguments, "--check"]) == 1
    assert table.main([*arguments, "--write"]) == 0
    assert table.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "3.5x [3.0, 4.0] | 4x (short)" in text and "**no**" in text
