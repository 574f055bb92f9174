"""Corpora: which documents come out of which file, where reading goes on, and what is refused."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from knowedit.text import LONGEST, CorpusError, corpus_fingerprint, documents


def write(path, data: str | bytes):
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def parquet(path, **columns):
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    pyarrow.parquet.write_table(pyarrow.table(columns), plain)
    return write(path, plain.read_bytes()) if path.suffix == ".gz" else path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_blank_lines_part_documents(tmp_path, name):
    path = write(tmp_path / name, "\ufeffone\nstill one\r\n \r\n\ntwo\n\n\nthree")
    assert list(documents(path)) == ["one\nstill one", "two", "three"]


def test_headings_stay_with_their_text(tmp_path):
    path = write(tmp_path / "a.txt", " = Bread = \n \n = = Crust = = \n\n It is brown .\n\n= Tea =\nhot\n\ngreen\n")
    assert list(documents(path)) == ["= Bread = \n = = Crust = = \n It is brown .", "= Tea =\nhot", "green"]


def test_a_text_without_blank_lines_is_cut_at_line_ends(tmp_path):
    path = write(tmp_path / "a.txt", ("x" * 999 + "\n") * 600)
    found = list(documents(path))
    assert len(found) == 3 and max(map(len, found)) <= LONGEST + 1000
    assert "".join(found).count("x") == 999 * 600


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_gives_its_text_fields(tmp_path, name):
    rows = [{"text": "one"}, {"text": " "}, {"id": 3, "text": "two\n\nstill two \u2028 here"}]
    path = write(tmp_path / name, "\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(documents(path)) == ["one", "two\n\nstill two \u2028 here"]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet_gives_its_text_column(tmp_path, name):
    path = parquet(tmp_path / name, id=list(range(600)), text=[None if i == 7 else f"text {i}" for i in range(600)])
    assert list(documents(path)) == [f"text {i}" for i in range(600) if i != 7]


def test_folders_and_lists_are_read_in_order(tmp_path):
    write(tmp_path / "b.txt", "b1\n\nb2")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "c.jsonl", '{"text": "c"}')
    write(tmp_path / "a.txt.gz", "a")
    write(tmp_path / "notes.md", "no corpus")
    assert list(documents(tmp_path)) == ["a", "b1", "b2", "c"]
    assert list(documents([tmp_path / "sub", str(tmp_path / "b.txt")])) == ["c", "b1", "b2"]


def test_start_goes_on_where_reading_stopped(tmp_path):
    path = write(tmp_path / "a.txt", "\n\n".join(map(str, range(9))))
    every = list(documents(path))
    assert [list(documents(path, start=n)) for n in range(11)] == [every[n:] for n in range(11)]
    with pytest.raises(CorpusError, match="start must be 0 or more, got -1"):
        documents(path, start=-1)


def test_reading_is_lazy(tmp_path):
    path = write(tmp_path / "a.txt", b"fine\n\nalso fine\n\nbad \xff\n")
    assert list(itertools.islice(documents(path), 2)) == ["fine", "also fine"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"fine\n\nbad \xff here\n", r"a\.txt:3: byte 5 \(0xff\) is not UTF-8; save the file as UTF-8"),
        ("a.txt.gz", b"fine\nna\xefve\n", r"a\.txt\.gz:2: byte 3 \(0xef\) is not UTF-8"),
        ("a.txt", b" \n\n", r"a\.txt'\) holds no text; give one with documents, or corpus='self'"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}', r"a\.jsonl:2: needs a string in the field 'text'; it has 'txt'"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl:1: needs a string"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: needs a string in the field 'text'; it is no object"),
        ("a.jsonl", b'{"text": "x"\n', r"a\.jsonl:1: not valid JSON"),
        ("a.parquet", b"PAR1 but no more", r"a\.parquet: cannot be read as parquet"),
        ("a.pdf", b"%PDF", r"a\.pdf: unknown kind of file; known kinds: \.txt, \.jsonl, \.parquet \(also \.gz\)"),
    ],
)
def test_bad_corpora_are_refused(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(CorpusError, match=message):
        list(documents(path))


def test_broken_archives_and_absent_columns(tmp_path):
    path = write(tmp_path / "a.txt.gz", "text\n" * 99)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorpusError, match=r"a\.txt\.gz: broken gzip archive"):
        list(documents(path))
    with pytest.raises(CorpusError, match=r"has no column 'text'; it has 'body', 'id'"):
        list(documents(parquet(tmp_path / "b.parquet", body=["x"], id=[1])))


def test_absent_corpora_are_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"wikipedai: no such file; a corpus is a path, 'wikipedia'"):
        documents("wikipedai")
    with pytest.raises(CorpusError, match="no text files in this folder"):
        documents(tmp_path)
    with pytest.raises(CorpusError, match="empty list"):
        documents([])
    for bad in ("hf:owner", "hf:a/b/c", "hf:/b", "hf:a/b:c:d:e"):
        with pytest.raises(CorpusError, match="must read 'hf:owner/name'"):
            documents(bad)


def test_self_asks_the_model():
    def samples(seed, start):
        return (f"{seed}-{n}" for n in itertools.count(start))

    assert list(itertools.islice(documents("self", model=samples, seed=3, start=5), 2)) == ["3-5", "3-6"]
    with pytest.raises(CorpusError, match="'self' needs a model"):
        documents("self")


class Hub:
    """Stands in for the hub: a real streamed data set, and what was asked for."""

    def __init__(self, monkeypatch, rows):
        import datasets

        self.asked = None

        def load_dataset(name, config, **options):
            self.asked = (name, config, options)
            return datasets.IterableDataset.from_generator(lambda: iter(rows))

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)


def test_streams_are_shuffled_by_seed_and_go_on(monkeypatch):
    hub = Hub(monkeypatch, [{"text": str(n)} for n in range(50)])
    first, again, other = (list(documents("wikipedia", seed=s)) for s in (1, 1, 2))
    assert first == again != other and sorted(first) == sorted(other) == sorted(map(str, range(50)))
    assert first != sorted(first, key=int)
    assert list(documents("wikipedia", seed=1, start=20)) == first[20:]
    assert hub.asked == ("wikimedia/wikipedia", "20231101.en", {"split": "train", "revision": None, "streaming": True})


def test_hub_names_are_taken_apart(monkeypatch):
    hub = Hub(monkeypatch, [{"body": "one"}])
    assert list(documents("hf:owner/name@abc:small:body", split="test")) == ["one"]
    assert hub.asked == ("owner/name", "small", {"split": "test", "revision": "abc", "streaming": True})
    with pytest.raises(CorpusError, match="owner/name: no text in column 'text'; columns: body"):
        list(documents("hf:owner/name"))


def test_an_unreachable_hub_names_both_remedies(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(CorpusError, match=r"wikimedia/wikipedia.*no route.*local \.txt.*corpus='self'"):
        next(documents("wikipedia"))


def test_fingerprints_know_contents_and_nothing_else(tmp_path):
    here = write(tmp_path / "a.txt", "one")
    (tmp_path / "other").mkdir()
    there = shutil.copy(here, tmp_path / "other" / "a.txt")
    assert corpus_fingerprint(here) == corpus_fingerprint([there])
    assert corpus_fingerprint(here)["files"] == [{"name": "a.txt", "sha256": "7692c3ad3540bb80"}]
    write(here, "two")
    assert corpus_fingerprint(here) != corpus_fingerprint(there)
    assert corpus_fingerprint("self") == {"name": "self"}
    assert corpus_fingerprint("hf:a/b@c:d:e") == {"name": "a/b", "revision": "c", "config": "d", "column": "e"}
    assert corpus_fingerprint("wikipedia")["config"] == "20231101.en"
    with pytest.raises(CorpusError, match="no such file"):
        corpus_fingerprint(tmp_path / "none.txt")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "count", "words"),
    [("wikitext2_raw_valid.txt.gz", 541, 213_886), ("enwiki_2021_sample_3MB.txt.gz", 1_584, 488_188)],
)
def test_the_real_corpora_are_read_whole(data, name, count, words):
    found = list(documents(data / name))
    assert (len(found), sum(len(text.split()) for text in found)) == (count, words)
