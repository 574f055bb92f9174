"""Unit: facts can be used without torch, and stand on errors and io alone."""

from __future__ import annotations

import json
import subprocess
import sys

#: Imports the package with an empty front door, so that only what facts import counts.
CODE = """
import importlib.util, json, sys, types
front = types.ModuleType("knowedit")
front.__path__ = list(importlib.util.find_spec("knowedit").submodule_search_locations)
sys.modules["knowedit"] = front
import knowedit.facts, knowedit.facts.groups, knowedit.facts.wordings.ordinary
import knowedit.facts.wordings.paraphrase
assert len(knowedit.facts.load("demo")) == 6
print(json.dumps(sorted(sys.modules)))
"""


def test_facts_import_little():
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    modules = json.loads(ran.stdout)
    heavy = {"torch", "transformers", "datasets", "numpy", "scipy", "openai", "rich"}
    assert not heavy & set(modules)
    rooms = {name.split(".")[1] for name in modules if name.startswith("knowedit.")}
    assert rooms == {"errors", "io", "facts"}
