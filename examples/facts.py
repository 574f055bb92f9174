"""Facts: build them, word them in other ways, keep them in files, load sets. Needs no model."""

import tempfile
from pathlib import Path

from knowedit.facts import (
    Fact,
    FactError,
    Probe,
    conflict_free,
    known_sets,
    load,
    read_facts,
    write_facts,
)
from knowedit.facts.wordings.forms import held_out_forms, training_forms

# A fact says what to write, and may bring what to test it with.
fact = Fact(
    prompt="The capital of {} is",
    subject="France",
    target="Lyon",
    true="Paris",
    paraphrases=("In France, the seat of government is",),
    neighbours=(Probe("The capital of Italy is", "Rome"),),
    relation="capital",
)
print(fact.text, "->", fact.target)

# A prompt that is written out works too; what cannot be used says why.
assert Fact.parse("The capital of France is", "France", "Lyon").prompt == fact.prompt
try:
    Fact.parse("The capital of Frnace is", "France", "Lyon")
except FactError as error:
    print("refused:", error)

# Wordings to train on and wordings to test with never overlap.
print("trained on:", [form.name for form in training_forms(fact)])
print("tested with:", [form.name for form in held_out_forms(fact)])

# Files: .jsonl, .json or .csv, each also as .gz.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "facts.csv.gz"
    write_facts(path, [fact])
    assert read_facts(path) == [fact]

# Sets by name. Public ones are read from the folder that KNOWEDIT_DATA names.
for known in known_sets():
    print(f"{known.name:26} {'here' if known.present else 'absent':7} {known.what}")
embedded = load("embedded")
print(f"{len(embedded)} facts, {len(conflict_free(embedded))} without conflicts")
