"""The modifier for llm-compressor on a stand-in of its base class, which hands Hessians on as the
real one does (unit).
"""

from __future__ import annotations

import runpy
import sys
from types import ModuleType

import pydantic
import pytest
import torch
from torch import nn

from docs.hooks import ROOT
from tests.docs.test_pages import FENCE, PAGES

FILE = ROOT / "examples/llmcompressor/modifier.py"


class Block(nn.Module):
    """Three projections of one input, and one of another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, size, bias=False) for size in (8, 4, 4))
        self.o = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.o(self.q(x).tanh() + torch.cat([self.k(x), self.v(x)], -1))


class GPTQModifier(pydantic.BaseModel):
    """What the real one has in these places."""

    block_size: int = 128
    _hessians: dict = pydantic.PrivateAttr(default_factory=dict)
    _num_samples: dict = pydantic.PrivateAttr(default_factory=dict)
    _written: dict = pydantic.PrivateAttr(default_factory=dict)

    def calibrate_module(self, module, args, _output):
        raise NotImplementedError

    def compress_modules(self):
        for module in list(self._num_samples):
            self._written[module] = self._hessians.pop(module) / self._num_samples.pop(module)


@pytest.fixture
def modifier(monkeypatch):
    names = "llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.gptq"
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].GPTQModifier = GPTQModifier
    return runpy.run_path(str(FILE))["MomentGPTQ"](block_size=64)


def test_each_layer_gets_the_hessian_of_its_inputs_block_after_block(modifier):
    torch.manual_seed(0)
    blocks = [Block(), Block()]
    seen: dict[nn.Module, list[torch.Tensor]] = {}

    def watch(module, args, output):
        seen.setdefault(module, []).append(args[0].double().flatten(0, -2))
        assert modifier.calibrate_module(module, args, output) is None  # no other output

    texts = list(torch.randn(3, 2, 5, 8))
    for block in blocks:
        hooks = [part.register_forward_hook(watch) for part in block.children()]
        with torch.no_grad():
            after = [block(text) for text in texts]
        for hook in hooks:
            hook.remove()
        assert len(set(map(id, modifier._hessians.values()))) == 2  # of four layers
        modifier.compress_modules()
        assert not modifier._hessians and not modifier._num_samples
        texts = after
    assert len(modifier._written) == 8 and modifier.block_size == 64
    for module, H in modifier._written.items():
        rows = torch.cat(seen[module])
        assert H.dtype == torch.float32
        torch.testing.assert_close(H.double(), 2 * rows.T @ rows / len(rows), rtol=1e-6, atol=1e-7)


def test_the_page_shows_this_modifier():
    page = PAGES["docs/integrations/llmcompressor.md"]
    shown = next(body for _, kind, body in FENCE.findall(page) if kind == "python")
    assert FILE.read_text("utf-8").partition('"""\n\n')[2] == shown
