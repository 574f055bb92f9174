"""Shared by the tests of facts: one fact, drawn ones, and files of records."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from knowedit.facts.fact import JOINS, Fact, Probe

FRANCE = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon", "true": "Paris"}
ITALY = {**FRANCE, "subject": "Italy"}

_texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    str.strip
)
_wordings = _texts.filter(lambda text: "{}" not in text)
_probes = st.builds(Probe, _wordings, st.none() | _texts)
_lists = st.lists(_wordings, max_size=3).map(tuple)
_prompts = (
    st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), _wordings)
    .map("{}".join)
    .filter(lambda text: text.count("{}") == 1)
)


#: Draws any fact that can be built.
drawn_facts = st.builds(
    Fact,
    prompt=_prompts,
    subject=_texts,
    target=_texts,
    true=st.none() | _texts,
    paraphrases=_lists,
    neighbours=st.lists(_probes, max_size=3).map(tuple),
    questions=_lists,
    instructions=_lists,
    relation=st.none() | _texts,
    id=st.none() | _texts,
    portability=st.lists(_probes, max_size=2).map(tuple),
    join=st.none() | st.sampled_from(sorted(JOINS)),
)


def save(path, *records):
    """Write `records` to `path`, one a line, strings as they are; returns `path`."""
    lines = (r if isinstance(r, str) else json.dumps(r) + "\n" for r in records)
    path.write_text("".join(lines), "utf-8")
    return path


#: One CounterFact record in EasyEdit's flat schema, the same one in the authors', and its fact.
FLAT = {
    "case_id": 7,
    "prompt": "The mother tongue of Ann Lee is",
    "target_new": "English",
    "subject": "Ann Lee",
    "ground_truth": "French",
    "rephrase_prompt": "Ann Lee grew up with",
    "locality_prompt": "Bob Roy speaks",
    "locality_ground_truth": "Dutch",
    "relation_id": "P103",
}
ROME = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Ann Lee",
    },
    "paraphrase_prompts": ["Ann Lee grew up with"],
    "neighborhood_prompts": ["Bob Roy speaks"],
    "attribute_prompts": [],
    "generation_prompts": [],
}
BASE = Fact(
    "The mother tongue of {} is",
    "Ann Lee",
    "English",
    "French",
    paraphrases=("Ann Lee grew up with",),
    neighbours=(Probe("Bob Roy speaks", "Dutch"),),
    relation="P103",
    id="counterfact:7",
)
