"""Unit: on tiny models; what travels is loaded by llama.cpp itself, and says there what
transformers says of the same weights.
"""

from __future__ import annotations

import platform
from contextlib import ExitStack
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from benchmarks.llama_cpp import NEEDS, Question, ask
from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.edits.export import gguf_lora
from knowedit.edits.gguf_model import write_gguf
from knowedit.edits.llamacpp import LlamaCpp
from knowedit.errors import EditError
from tests.kernels.isa import flags
from tests.knowedit.edits.gguf_files import KINDS, VOCABULARY, tiny, write

pytestmark = pytest.mark.isa
TYPES = gguf.GGMLQuantizationType
PROMPT = [34, 7, 210, 99, 3, 150, 12, 80, 41, 5, 77, 230]  # longer than the tiny models' windows
#: |log-probability - transformers'|, at most. llama.cpp reads GELU from a table of 16 bits.
EXACT, TABLE = 1e-4, 2e-2
GELU = {"gemma", "gemma2", "gemma3_text", "gpt2", "starcoder2"}


@pytest.fixture(autouse=True)
def fitting_processor():
    lacking = sorted(NEEDS - flags())
    if lacking and (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        pytest.skip(f"missing instruction set: llama.cpp's wheel needs {', '.join(lacking)}")


def matrices(model):
    """The names of all that can be written for llama.cpp."""
    theirs, found = LlamaCpp(model), []
    for name, weight in model.hf.named_parameters():
        try:
            theirs.name(name)
        except EditError:
            continue
        if weight.dim() == 2:
            found.append(name)
    return found


def an_edit(model, names, rank, seed):
    """Of these matrices, each moved by two fifths of its norm."""
    made, changes = torch.Generator().manual_seed(seed), {}
    for name in names:
        weight = model.stored(name)
        rows, columns = reversed(weight.shape) if model.is_transposed(name) else weight.shape
        change = LowRank(
            torch.randn(rows, rank, generator=made), torch.randn(columns, rank, generator=made)
        )
        change.U.mul_(0.4 * weight.norm() / change.norm)
        changes[name] = change
    return Edit("TEST", changes, [], model.fingerprint)


def scaled(edit, scale):
    changes = {name: replace(c, U=scale * c.U) for name, c in edit.changes.items()}
    return Edit("TEST", changes, [], edit.fingerprint)


def transformers_says(model, edits, more):
    """`[tokens, vocabulary]`, log-probabilities of each of `more` in its place, with the edits."""
    with ExitStack() as applied, torch.no_grad():
        for edit in edits:
            applied.enter_context(edit.applied_to(model))
        logits = model.hf(torch.tensor([PROMPT + more])).logits[0, len(PROMPT) - 1 : -1]
        return logits.double().log_softmax(-1).numpy()


def differs(model, edits, said):
    """By how much llama.cpp's answer differs at most; its tokens must be transformers' own."""
    wanted = transformers_says(model, edits, said.tokens)
    assert said.tokens == wanted.argmax(1).tolist() and len(said.tokens) == 4
    return np.abs(said.logp - wanted).max()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_together_and_by_half(byte_tokenizer, tmp_path, kind):
    model = tiny(kind, byte_tokenizer)
    source = write(model, tmp_path / "model.gguf", TYPES.F32)
    names = matrices(model)
    attention = [name for name in names if "attn" in name]
    rest = [name for name in names if name not in attention]
    assert attention and rest and len(names) % len(model.layers) == 0
    first, second = an_edit(model, attention, 3, 1), an_edit(model, rest, 1, 2)
    files = [
        gguf_lora.write(model, edits, tmp_path / f"{i}.gguf")
        for i, edits in enumerate(([first], [second], [first, second]))
    ]
    cases = [
        ((0, 0, 0), []),
        ((1, 0, 0), [first]),
        ((0, 1, 0), [second]),
        ((0, 0, 1), [first, second]),
        ((1, 1, 0), [first, second]),
        ((0.5, 0, 0), [scaled(first, 0.5)]),
    ]
    answers = ask(source, [Question(PROMPT, 4, scales) for scales, _ in cases], VOCABULARY, files)
    limit = TABLE if kind in GELU else EXACT
    for said, (scales, edits) in zip(answers, cases, strict=True):
        assert differs(model, edits, said) <= limit, scales
        moved = transformers_says(model, [], said.tokens) - said.logp
        assert np.abs(moved).max() > 20 * limit or not edits


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2", "phi3"])
def test_an_edited_file(byte_tokenizer, tmp_path, kind):
    model = tiny(kind, byte_tokenizer)
    source, edited = write(model, tmp_path / "model.gguf", TYPES.F32), tmp_path / "edited.gguf"
    edit = an_edit(model, matrices(model), 2, 3)
    write_gguf(model, [edit], source, edited)
    (said,) = ask(edited, [Question(PROMPT, 4)], VOCABULARY)
    limit = TABLE if kind in GELU else EXACT
    assert differs(model, [edit], said) <= limit
    assert np.abs(transformers_says(model, [], said.tokens) - said.logp).max() > 20 * limit


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_an_edit_adds_nothing_to_what_quantised_arithmetic_differs_by(
    byte_tokenizer, tmp_path, kind
):
    model = tiny(kind, byte_tokenizer)
    source, edited = write(model, tmp_path / "model.gguf", TYPES.Q8_0), tmp_path / "edited.gguf"
    edit = an_edit(model, matrices(model), 2, 3)
    file = gguf_lora.write(model, [edit], tmp_path / "lora.gguf")
    assert {one.now for one in write_gguf(model, [edit], source, edited)} == {"Q8_0"}
    asked = [Question(PROMPT, 4, [0]), Question(PROMPT, 4, [1])]
    bare, beside = ask(source, asked, VOCABULARY, [file])
    (within,) = ask(edited, [Question(PROMPT, 4)], VOCABULARY)

    def off(said, edits):
        return np.abs(transformers_says(model, edits, said.tokens) - said.logp).mean()

    theirs = off(bare, [])
    for said in (beside, within):
        assert off(said, [edit]) < 2 * theirs < off(said, []) / 5


def test_what_llama_cpp_refuses_is_told(byte_tokenizer, tmp_path):
    model, other = tiny("llama", byte_tokenizer), tiny("qwen2", byte_tokenizer)
    source = write(model, tmp_path / "model.gguf", TYPES.F32)
    file = gguf_lora.write(other, [an_edit(other, matrices(other)[:1], 1, 1)], tmp_path / "l.gguf")
    with pytest.raises(RuntimeError, match="model arch and LoRA arch mismatch"):
        ask(source, [Question(PROMPT)], VOCABULARY, [file])


def test_a_processor_that_lacks_an_instruction_is_told(tmp_path, monkeypatch):
    dies = tmp_path / "python"
    dies.write_text("#!/bin/sh\nkill -ILL $$\n")
    dies.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(dies))
    with pytest.raises(RuntimeError, match="this processor lacks an instruction .*avx2"):
        ask(tmp_path / "model.gguf", [Question(PROMPT)], VOCABULARY)
