"""Settings that are written by hand, damaged or hostile (unit)."""

import json

import pytest

from knowedit.errors import ConfigError
from knowedit.io.documents import read_document

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


def read(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return read_document(path)


def test_yaml_and_json_are_read(tmp_path):
    wanted = {"model": "x", "grid": {"target.steps": [5, 10]}, "seed": 0, "limit": None}
    assert read(tmp_path, json.dumps(wanted)) == wanted
    assert read(tmp_path, "a: &it {b: [1, 2]}\nc: *it\n") == {
        "a": {"b": [1, 2]},
        "c": {"b": [1, 2]},
    }
    assert read(tmp_path, "d: &d {a: 1, b: 2}\ne:\n  <<: *d\n  a: 3\n")["e"] == {"a": 3, "b": 2}
    assert read(tmp_path, "") is None and read(tmp_path, "# nothing\n") is None


@pytest.mark.parametrize(
    "text, said",
    [
        ("seed: 1\nmodel: x\nseed: 2\n", "run.yaml:3: 'seed' is there twice"),
        ('{"grid": {"a": [1],\n "a": [2]}}', "run.yaml:2: 'a' is there twice"),
        ("a: &a [1, *a]\n", "run.yaml:1: this refers to itself"),
        ("a: &a {b: *a}\n", "run.yaml:1: this refers to itself"),
        (BOMB, r"run.yaml:\d+: this is more than 100,000 values"),
        ("a: [", "run.yaml: neither YAML nor JSON"),
        ("[" * 50_000, "run.yaml: neither YAML nor JSON"),
        ("{a: " * 3_000 + "1" + "}" * 3_000, "run.yaml: neither YAML nor JSON"),
        ("a: 1\n---\nb: 2\n", "run.yaml: neither YAML nor JSON"),
        ("!!python/object/apply:os.getcwd []", "run.yaml: neither YAML nor JSON"),
        ("a: 2020-99-99", "run.yaml: neither YAML nor JSON"),
        ("a: " + "9" * 5000, "run.yaml: neither YAML nor JSON"),
        ("? [a, b]\n: 1\n? {c: 1}\n: 2\n", "run.yaml: neither YAML nor JSON"),
    ],
    ids=range(13),
)
def test_what_is_refused(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, text)
