"""`knowedit recommend` as a user types it, on a tiny model (unit)."""

import json


def test_one_table_one_sentence_and_a_folder_of_results(place, knowedit):
    words = ("recommend", "model", "facts.jsonl", "--corpus", "corpus.txt", "--tokens", "500")
    settings = ("--method", "memit", "--method", "emmet", "--set", "layers=1")
    steps = ("--set", "target.steps=2", "-o", "run")
    found = json.loads(knowedit(*words, *settings, *steps, "--json"))
    assert [row["method"] for row in found["rows"]] == ["MEMIT", "EMMET"] and found["facts"] == 2
    assert found["sentence"].endswith(".")
    assert "MEMIT" in knowedit("report", "run") and (place / "run" / "report.html").exists()
