"""The benchmarks of the statistics at scale, at tiny sizes (unit)."""

import pytest

from benchmarks import common, scaling, tokens
from knowedit.facts.sets import load
from knowedit.statistics import key_statistics
from knowedit.statistics.corpus import windows
from knowedit.statistics.corpus.batching import Piece

TEXTS = [
    f"Number {i} of a few short texts, which differ in their length. " * (1 + i % 4)
    for i in range(12)
]


def test_tokens_are_summed_once_and_stored_on_the_way(tiny_llama, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(TEXTS))
    found = dict(tokens.prefixes(tiny_llama, corpus, [1], [100, 350]))
    for count, statistics_there in found.items():
        whole = key_statistics(tiny_llama, [1], corpus, count, directory=tmp_path / str(count))
        assert statistics_there[1].count == count
        assert (statistics_there[1].total - whole[1].total).norm() <= 1e-6 * whole[1].total.norm()


def test_scaling_measures_a_process_of_its_own(tiny_llama, tmp_path):
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n\n".join(TEXTS))
    found = scaling.run(1, tmp_path / "model", tmp_path / "corpus.txt", [1], 300)
    assert found["tokens"] == 300 and found["seconds"] > 0 and found["megabytes"] > 10


def test_quality_against_tokens(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "SIZE", 300)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(TEXTS * 3))
    report = common.Report("tokens", tmp_path / "out.jsonl")
    rows = tokens.run(report, tiny_llama, corpus, load("demo")[:2], [40, 500, 900])
    assert [(row["case"], row["tokens"]) for row in rows] == [
        (n, t) for n in ("MEMIT", "AlphaEdit") for t in (500, 900)
    ]
    assert (
        len([row for row in report.rows if "refused" in row]) == 2
    )  # 40 tokens are too few for a covariance of size 48
    assert all(
        row["price"] > 0 and 0 <= row["efficacy success"] <= 1 and row["solve"] > 0 for row in rows
    )
    assert rows[0]["solve"] > rows[1]["solve"]
    assert tokens.table(rows).count("\n") == 5
    tokens.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000 and not tiny_llama.ledger.active


@pytest.mark.parametrize("count", [0, 1, 9, 10, 25, 30])
def test_a_split_counts_every_key_once(count):
    pieces = [Piece(list(range(11)), 1) for _ in range(3)]
    first, rest = tokens._split(pieces, count)
    assert sum(p.count for p in first) == count and sum(p.count for p in rest) == 30 - count
