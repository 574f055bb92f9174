"""Unit: what servers of adapters will not take is said, and nothing of what they do."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.edits.servers import server_notes
from knowedit.models.editable import EditableModel
from tests.conftest import frozen
from tests.knowedit.edits.test_edit import an_edit


@pytest.fixture(scope="module")
def wide(byte_tokenizer):
    """A Llama whose weights have room for the ranks here: an adapter is no wider than its layer."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=352,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return EditableModel(frozen(LlamaForCausalLM(config)), byte_tokenizer, name="wide-llama")


@pytest.mark.parametrize(
    "rank, said",
    [
        (1, None),
        (16, None),
        (17, "--max-lora-rank 32"),
        (64, "--max-lora-rank 64"),
        (257, "--max-lora-rank 320"),
        (321, "servers stop at 320"),
    ],
)
def test_the_rank_is_held_against_what_servers_make_room_for(wide, rank, said):
    notes = server_notes(wide, [an_edit(wide, rank=rank)])
    assert notes == [] if said is None else said in notes[0] and f"its rank is {rank}" in notes[0]


def test_ranks_of_several_edits_add_up(tiny_llama):
    edits = [an_edit(tiny_llama, seed, rank=10) for seed in range(2)]
    assert "--max-lora-rank 32" in server_notes(tiny_llama, edits)[0]


def test_transposed_fused_and_tied(tiny_llama, tiny_gpt2):
    (note,) = server_notes(tiny_gpt2, [an_edit(tiny_gpt2)])
    assert "stored transposed" in note
    attention = "transformer.h.1.attn.c_attn.weight"
    head, tied = "lm_head.weight", "transformer.wte.weight"
    for model, name, said in (
        (tiny_gpt2, attention, "c_attn holds several projections"),
        (tiny_gpt2, tied, f"{tied} is shared by input and output"),
    ):
        rows, columns = model.stored(name).shape
        if model.is_transposed(name):
            rows, columns = columns, rows
        change = LowRank(torch.ones(rows, 1), torch.ones(columns, 1))
        found = server_notes(model, [Edit("TEST", {name: change}, [], model.fingerprint)])
        assert any(said in one for one in found), found
    head_of_its_own = LowRank(torch.ones(258, 1), torch.ones(32, 1))
    assert (
        server_notes(tiny_llama, [Edit("T", {head: head_of_its_own}, [], tiny_llama.fingerprint)])
        == []
    )
