"""A few hundred of the inputs and sequences that `make faults` (`run.py`) tries (unit)."""

import contextlib
import json
import random
from collections import Counter

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knowedit.cli.app import app
from knowedit.facts.records import read_facts
from tests.faults.fuzzing import Inputs, Target, quiet, trial
from tests.faults.kills import COMMANDS
from tests.faults.sequences import Workbench, model_of, synthetic
from tests.faults.tally import Tally

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["prompt", "subject", "target", "str", "x"]), inner)
    ),
    max_leaves=6,
)

ANY = Target("any.jsonl", read_facts, lambda _: b"")


def test_damaged_files_of_every_kind(tmp_path):
    inputs, tally = Inputs(tmp_path), Tally()
    with contextlib.closing(inputs):
        for number in range(400):
            inputs.try_one(number, 0, tally)
    ends = Counter(label.rpartition(": ")[2] for label in tally.outcomes.elements())
    assert not tally.failed and ends["read"] + ends["refused"] == 400
    assert ends["read"] > 40 and ends["refused"] > 130


@given(value=ANY_JSON)
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_json_is_a_fact_or_refused(tmp_path, value):
    with quiet():
        trial(ANY, json.dumps(value).encode(), tmp_path)


@pytest.mark.parametrize("layout", ["llama-tied", "gpt-oss-bf16"])
def test_sequences_of_edits(byte_tokenizer, tmp_path, layout):
    model = model_of(layout, byte_tokenizer)
    bench = Workbench(model, synthetic(model))
    for number in range(4):
        bench.run(random.Random(number), tmp_path / "edited")
    assert len(bench.states) > 3


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.words != "session"])
def test_the_commands_that_are_killed_are_of_today(command):
    found, words = typer.main.get_command(app), command.words.split()
    while hasattr(found, "commands"):
        found, words = found.commands[words[0]], words[1:]
    found.make_context(command.name, words)
