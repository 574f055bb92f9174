"""The Python of the documentation runs (unit): the blocks of a page one after the other, with names
kept from block to block, on a tiny model. What a page says its reader has is written here, and so
is why a block does not run.
"""

from __future__ import annotations

import json
import textwrap

import pytest

import knowedit as ke
from docs.hooks import ROOT
from tests.docs.test_pages import FENCE, PAGES

#: What every reader has: a model, facts and statistics.
READER = """
import torch
import knowedit as ke

model = ke.load_model()
facts = [
    ke.Fact("The capital of {} is", "France", "Lyon", true="Paris"),
    ke.Fact("They say {} speaks", "Brazil", "Norse", true="Portuguese"),
]
ke.write_facts("facts.jsonl", facts)
stats = statistics = ke.key_statistics(model, (0, 1, 2), corpus="text.txt", tokens=500)
"""
SAVED = "ke.LoRA(steps=1).compute(model, facts).save('{}.safetensors')"
#: And of one page: what its text tells before the block.
TOLD = {
    "docs/hessians.md": "width = 8; n, k = 3, 2; H = torch.eye(width); x = torch.randn(k, width)",
    "docs/howto.md": SAVED.format("lyon.edit"),
    "docs/methods.md": "batch, later = [facts[0]], [facts[1]]; batches = [batch, later]",
    "docs/tracing.md": """
known = [ke.Fact("{} is", name, "Lyon") for name in ("France", "Brazil")]
facts = [
    ke.Fact("{} is", fact.subject, "Lyon", true=said, join="none")
    for fact, said in zip(known, model.generate([fact.text for fact in known], 1))
]
""",
    "docs/travel.md": """
model.hf.save_pretrained("base")
model.tokenizer.save_pretrained("base")
"""
    + SAVED.format("edit"),
}
FEW = "ke.HiddenState(steps=2)"
#: What stands in a page, and what is run instead, because it is dear or of a larger model.
INSTEAD = {
    'SummaryWriter("runs/neuron-patch")': "SummaryWriter()",
    'edit.push_to_hub("OWNER/NAME", private=True)': 'edit.save_pretrained("OWNER/NAME")',
    "from torch.utils.tensorboard import": "from unittest.mock import MagicMock as",
    # asked for real in tests/knowedit/edits/test_llama_cpp.py, in a process of its own
    "import xllamacpp": "from unittest.mock import MagicMock; xllamacpp = MagicMock()",
    'model, corpus="self", tokens=16_384': 'model, (0, 1, 2), corpus="text.txt", tokens=500',
    'model, corpus="self"': 'model, (0, 1, 2), corpus="text.txt", tokens=500',
    "ke.key_statistics(model, (3, 4, 5, 6))": "statistics",
    "ke.RoSE()": "ke.RoSE(layers=(1, 2))",
    "ke.NeuronPatch()": f'ke.NeuronPatch(corpus="text.txt", tokens=600, target={FEW})',
    "ke.AlphaEdit()": f"ke.AlphaEdit(target={FEW})",
    "ke.MEMIT()": f"ke.MEMIT(target={FEW})",
    "ke.MetaKE()": f"ke.MetaKE(target={FEW})",
    "ke.KLLoRA()": "ke.KLLoRA(steps=2)",
    "layers=5": "layers=1",
    "trace_many(model, facts, 50)": "trace_many(model, facts, 2, samples=2)",
    '"2+2", "4")': '"2+2", "4", samples=2)',
}
#: Why the code of a page is compiled only.
NOT_RUN = {
    "docs/integrations/": "it wants other toolboxes: tests/knowedit/integrations has stand-ins",
    "docs/learned.md": "a network is trained first: tests/knowedit/methods/test_{mend,serac}.py",
    "CONTRIBUTING.md": "these are files of their own, and would stay registered in this process",
    "README.md": "tests/e2e/test_readme.py runs it on the default model",
}


def why_not(file):
    """Why the code of a page does not run here; None: it does."""
    return next((why for page, why in NOT_RUN.items() if file.startswith(page)), None)


def blocks(file):
    """The Python of a page or notebook."""
    if file.endswith(".ipynb"):
        cells = json.loads((ROOT / file).read_text(encoding="utf-8"))["cells"]
        assert all(not cell.get("outputs") for cell in cells), "kept without outputs"
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found = FENCE.findall(PAGES[file])
    return [textwrap.dedent(body) for _, kind, body in found if kind == "python"]


def cheaper(code):
    """Code with what is too dear for a test put cheaper."""
    for dear, cheap in INSTEAD.items():
        code = code.replace(dear, cheap)
    return code


NOTEBOOK = "docs/first_edit.ipynb"
RUN = [NOTEBOOK, *(file for file in PAGES if "```python" in PAGES[file] and not why_not(file))]


@pytest.mark.parametrize("file", RUN)
def test_the_python_of_a_page_runs(file, tiny_llama, tmp_path, own_cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KNOWEDIT_CACHE", str(own_cache))
    monkeypatch.setattr(ke, "load_model", lambda *_, **__: tiny_llama)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Text {i} of nothing." for i in range(99)))
    names: dict = {}
    for given in (READER, TOLD.get(file, "")):
        exec(given, names)
    for number, block in enumerate(blocks(file), 1):
        exec(compile(cheaper(block), f"{file}, block {number}", "exec"), names)


def test_what_is_replaced_stands_in_a_page():
    everything = "".join(block for file in RUN for block in blocks(file))
    assert [text for text in INSTEAD if text not in everything] == []
    assert [page for page in TOLD if page not in RUN] == []
    assert [page for page in NOT_RUN if not any(page in file for file in PAGES)] == []
