"""`knowedit try` as a user types it, on a tiny model (unit)."""

import json


def test_a_prompt_is_put_to_both_models(place, knowedit):
    quick = ("--corpus", "corpus.txt", "--tokens", "500", "--layer", "1", "--set", "target.steps=2")
    knowedit("edit", "model", "facts.jsonl", "-o", "a.safetensors", *quick)
    words = ("try", "model", "a.safetensors", "--prompt", "The capital of France is")
    (found,) = json.loads(knowedit(*words, "--json"))
    assert found["facts"][0]["target"] == "Lyon" and len(found["after"]["next"]) == 5
    assert "unedited" in knowedit(*words)
    (alone,) = json.loads(knowedit("try", "model", *words[3:], "--json"))
    assert alone["before"] == alone["after"] == found["before"] and alone["facts"] == []
    assert "unedited" not in knowedit("try", "model", *words[3:])
    assert "name an edit" in knowedit("try", "model", code=1)
    assert "no chat template" in knowedit(*words, "--chat", code=1)
