"""README's Python runs as it stands there, on the default model (model)."""

import re

import pytest

import knowedit as ke

pytestmark = [pytest.mark.model, pytest.mark.slow]


def test_the_ten_lines_run(request, smollm, tmp_path, prose, own_cache, monkeypatch, capsys):
    text = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    sampled, read = 'corpus="self", tokens=16_384', f'corpus="{prose}", tokens=4_096'
    assert sampled in block  # cheaper statistics: the rest is as it is printed there
    code = compile(block.replace(sampled, read), "README.md", "exec")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KNOWEDIT_CACHE", str(own_cache))
    monkeypatch.setattr(ke, "load_model", lambda name: smollm)
    before = smollm.fingerprint
    exec(code, {})
    said = capsys.readouterr().out
    assert "Lyon" in said and "efficacy" in said
    assert (tmp_path / "lyon-adapter" / "adapter_config.json").exists()
    edit = ke.Edit.load("lyon.edit.safetensors")
    assert edit.config == ke.MEMIT().to_dict() and edit.fingerprint == before == smollm.fingerprint
