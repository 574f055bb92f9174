"""Batches: every token once, hardly any padding (unit)."""

from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit.statistics.corpus.batching import MAX_PADDING, Piece, batches, trim

LENGTHS = st.lists(st.integers(2, 700), min_size=1, max_size=60)


def made(lengths):
    return [Piece([100 * i + j for j in range(n)], 1) for i, n in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 3000), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_token_once_and_hardly_any_padding(lengths, budget, packed):
    pieces = made(lengths)
    found = list(batches(pieces, budget, packed=packed))
    assert sorted(p.ids[0] for batch in found for p in batch.pieces) == [p.ids[0] for p in pieces]
    for batch in found:
        assert batch.ids.numel() <= budget or len(batch.pieces) == 1
        assert batch.ids.numel() - batch.tokens <= MAX_PADDING * batch.ids.numel()
        assert batch.tokens == sum(len(p.ids) for p in batch.pieces)
        assert int(batch.keep.sum()) == sum(p.count for p in batch.pieces) and int(
            batch.first.sum()
        ) == len(batch.pieces)
        assert batch.positions is not None or not any(len(row) > 1 for row in batch.rows)
        for row, column in batch.first.nonzero().tolist():
            piece = batch.piece_at(row, column)
            assert batch.ids[row, column : column + len(piece.ids)].tolist() == piece.ids
            if batch.positions is not None:
                assert batch.positions[row, column : column + len(piece.ids)].tolist() == list(
                    range(len(piece.ids))
                )


@given(LENGTHS, st.integers(0, 5000), st.integers(0, 1))
@settings(max_examples=100, deadline=None)
def test_trimming_keeps_exactly_the_first_tokens(lengths, count, skip):
    pieces = [Piece(p.ids, skip) for p in made(lengths)]
    kept = trim(pieces, count)
    assert sum(p.count for p in kept) == min(count, sum(p.count for p in pieces))
    assert all(a.ids == b.ids[: len(a.ids)] for a, b in zip(kept, pieces))
