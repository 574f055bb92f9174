"""`knowedit recommend` as a user types it, on a tiny model (unit)."""

import json


def test_one_table_one_sentence_and_a_folder_of_results(place, knowedit):
    words = ("recommend", "model", "facts.jsonl", "--corpus", "corpus.txt", "--tokens", "500")
    settings = ("--method", "memit", "--method", "emmet", "--set", "layers=1")
    steps = ("--set", "target.steps=2", "-o", "run")
    found = json.loads(knowedit(*words, *settings, *steps, "--json"))
    assert [row["method"] for row in found["rows"]] == ["MEMIT", "EMMET"] and found["facts"] == 2
    assert found["sentence"].endswith(".")
    told = knowedit("report", "run")
    assert "MEMIT" in told and (place / "run" / "report.html").exists()
    assert "--corpus corpus.txt --tokens 500" in told and "MEMIT: knowedit eval model --me" in told
    again = json.loads(knowedit(*words, *settings, *steps, "--json"))
    assert again == found
