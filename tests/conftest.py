"""Shared by all tests. The interpreter and codegen suites run in a process of their own, not in a
plain run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
#: Public data beside the checkout, where a developer keeps it.
DATA = HERE.parents[1] / "shared" / "data"
SEPARATE = (HERE / "interpret", HERE / "codegen")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignores the separate suites unless the command line names them: `make test` runs each by
    itself.
    """
    for suite in SEPARATE:
        if collection_path == suite:
            named = [
                Path(config.invocation_params.dir, str(arg).partition("::")[0]).resolve()
                for arg in config.args
            ]
            return None if any(path == suite or suite in path.parents for path in named) else True
    return None


def pytest_configure(config: pytest.Config) -> None:
    """Speed cases run once, as tests, unless --benchmark-enable or --benchmark-only asks for
    figures. Public data are also looked for beside the checkout.
    """
    if DATA.is_dir():
        os.environ.setdefault("KNOWEDIT_DATA", str(DATA))
    options = config.option
    if hasattr(options, "benchmark_disable") and not (
        options.benchmark_enable or options.benchmark_only
    ):
        options.benchmark_disable = True


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer of 256 byte tokens, made on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate([*alphabet, "<pad>", "<eos>"])}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )


def frozen(hf):
    """As `load_model` leaves a model: in evaluation mode, nothing trainable."""
    return hf.eval().requires_grad_(False)


@pytest.fixture
def tiny_llama(byte_tokenizer):
    """A Llama of four layers with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from knowedit.models.editable import EditableModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation="sdpa",
        initializer_range=0.3,
    )
    return EditableModel(frozen(LlamaForCausalLM(config)), byte_tokenizer, name="tiny-llama")


@pytest.fixture
def tiny_gpt2(byte_tokenizer):
    """A GPT-2 of four layers with random weights (transposed projections, learned positions)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from knowedit.models.editable import EditableModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258,
        n_embd=32,
        n_inner=48,
        n_layer=4,
        n_head=4,
        n_positions=256,
        initializer_range=0.3,
    )
    return EditableModel(frozen(GPT2LMHeadModel(config)), byte_tokenizer, name="tiny-gpt2")


@pytest.fixture(scope="session")
def compiled_kernels():
    """The folder of kernels compiled on this machine: processes with a cache of their own need not
    compile them again.
    """
    from knowedit_kernels import _native

    folder = _native.cache_root() / "native"
    _native.load()
    return folder


@pytest.fixture
def own_cache(tmp_path, compiled_kernels):
    """`tmp_path/cache`, which has the compiled kernels."""
    (tmp_path / "cache").mkdir()
    if compiled_kernels.is_dir():
        (tmp_path / "cache" / "native").symlink_to(compiled_kernels)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def smollm_path():
    """The default model's folder; fetched once. Fails, and never skips, when it cannot be had."""
    from knowedit.models.download import DEFAULT_MODEL, resolve

    return resolve(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm(smollm_path):
    """The default model. Tests must leave its weights as they were."""
    import torch

    from knowedit.models.load import load_model

    return load_model(smollm_path, dtype=torch.float32)


@pytest.fixture(scope="session")
def data():
    """The folder of public data, or a skip."""
    from knowedit.facts.sets import data_dir

    folder = data_dir()
    if folder is None:
        pytest.skip("the public data sets are not here (set KNOWEDIT_DATA)")
    return folder


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    """A file of English prose, tens of thousands of tokens: what the default model knows, and this
    project's own pages. Statistics read from it cost a tenth of those that a model samples itself.
    """
    from itertools import zip_longest

    from knowedit.facts import sets

    known = [
        " ".join(f"{probe.prompt} {probe.answer}." for probe in fact.neighbours)
        for fact in sets.load("embedded")
    ]
    pages = sorted((HERE.parent / "docs").glob("*.md"))
    told = [page.read_text("utf-8") for page in pages if page.stem not in {"cli", "families"}]
    parts = "\n\n".join(told).split("\n\n")
    file = tmp_path_factory.mktemp("prose") / "prose.txt"
    mixed = [text for pair in zip_longest(known, parts, fillvalue="") for text in pair]
    file.write_text("\n\n".join(mixed), "utf-8")
    return file


def excused(markers: set[str], reason: str) -> bool:
    """Whether a skip is honest: the test needs a GPU, a browser, or data that are not shipped, or
    (marker `isa`) instructions that this processor was found to lack (`tests/kernels/isa.py`).
    """
    return bool(markers & {"gpu", "browser", "data"}) or (
        "isa" in markers and "missing instruction set: " in reason
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """With KNOWEDIT_NO_SKIP (CI sets it) a skip is a failure, unless `excused`."""
    report = yield
    markers = {mark.name for mark in item.iter_markers()}
    strict = report.skipped and os.environ.get("KNOWEDIT_NO_SKIP")
    if strict and not excused(markers, str(report.longrepr)):
        report.outcome, report.longrepr = (
            "failed",
            f"skipped where it should run: {report.longrepr}",
        )
    return report
