"""Corpora: which documents come out of which file, where reading goes on, and what is refused
(unit, data).
"""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from knowedit.errors import CorpusError
from knowedit.statistics.corpus import hub
from knowedit.statistics.corpus.corpus import Corpus
from knowedit.statistics.corpus.text import LONGEST


def documents(corpus, **options):
    return Corpus.parse(corpus).documents(**options)


def identity(corpus):
    return Corpus.parse(corpus).identity


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
    path = write(
        tmp_path / "a.txt",
        " = Bread = \n \n = = Crust = = \n\n It is brown .\n\n= Tea =\nhot\n\ngreen\n",
    )
    assert list(documents(path)) == [
        "= Bread = \n = = Crust = = \n It is brown .",
        "= Tea =\nhot",
        "green",
    ]


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
    path = parquet(
        tmp_path / name,
        id=list(range(600)),
        text=[None if i == 7 else f"text {i}" for i in range(600)],
    )
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
        (
            "a.txt",
            b"fine\n\nbad \xff here\n",
            r"a\.txt:3: byte 5 \(0xff\) is not UTF-8; save the file as UTF-8",
        ),
        ("a.txt.gz", b"fine\nna\xefve\n", r"a\.txt\.gz:2: byte 3 \(0xef\) is not UTF-8"),
        ("a.txt", b" \n\n", r"a\.txt' holds no text; give one with documents, or corpus='self'"),
        ("a.txt", b"", "holds no text"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "y"}',
            r"a\.jsonl:2: needs a string in the field 'text'; it has 'txt'",
        ),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl:1: needs a string"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: needs a string in the field 'text'; it is no object"),
        ("a.jsonl", b'{"text": "x"\n', r"a\.jsonl:1: not valid JSON"),
        ("a.parquet", b"PAR1 but no more", r"a\.parquet: cannot be read as parquet"),
        (
            "a.pdf",
            b"%PDF",
            r"a\.pdf: unknown kind of file; known kinds: \.txt, \.jsonl, \.parquet \(also \.gz\)",
        ),
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
    with pytest.raises(
        CorpusError, match=r"c\.parquet: the column 'text' holds int64, not strings"
    ):
        list(documents(parquet(tmp_path / "c.parquet", text=[1, 2])))
    broken = pyarrow.array([b"fine"] * 300 + [b"\xff\xfe"]).cast(pyarrow.binary())
    broken = pyarrow.StringArray.from_buffers(
        301, *broken.buffers()[1:]
    )  # bytes that nothing checked
    with pytest.raises(CorpusError, match=r"d\.parquet: rows 257 to 301: a text is not UTF-8"):
        list(documents(parquet(tmp_path / "d.parquet", text=broken)))
    (tmp_path / "e.jsonl").write_text('{"text": "fine"}\n{"text": "cut \\ud83d"}\n')
    with pytest.raises(
        CorpusError, match=r"e\.jsonl:2: character 5 of the text is half of a pair \(\\ud83d\)"
    ):
        list(documents(tmp_path / "e.jsonl"))


def test_absent_corpora_are_refused(tmp_path):
    with pytest.raises(
        CorpusError, match=r"wikipedai: no such file; a corpus is a path, 'wikipedia'"
    ):
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

    assert list(itertools.islice(documents("self", samples=samples, seed=3, start=5), 2)) == [
        "3-5",
        "3-6",
    ]
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
    assert hub.asked == (
        "wikimedia/wikipedia",
        "20231101.en",
        {"split": "train", "revision": None, "streaming": True},
    )


def test_hub_names_are_taken_apart(monkeypatch):
    hub = Hub(monkeypatch, [{"body": "one"}])
    assert list(documents("hf:owner/name@abc:small:body", split="test")) == ["one"]
    assert hub.asked == (
        "owner/name",
        "small",
        {"split": "test", "revision": "abc", "streaming": True},
    )
    with pytest.raises(CorpusError, match="owner/name: no text in column 'text'; columns: body"):
        list(documents("hf:owner/name"))


def test_a_row_without_a_text_is_no_document(monkeypatch):
    Hub(monkeypatch, [{"text": "one"}, {"text": None}, {"text": "two"}])
    assert sorted(documents("wikipedia")) == ["one", "two"]
    Hub(monkeypatch, [{"text": "one"}, {"text": 2}])
    with pytest.raises(CorpusError, match="no text in column 'text'"):
        list(documents("wikipedia"))


def test_a_hub_data_set_stays_at_its_commit(monkeypatch, own_cache, caplog, tmp_path):
    head = {"main": "a" * 40, "v2": "b" * 40}
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info",
        lambda _, name, revision, timeout: SimpleNamespace(sha=head[revision or "main"]),
    )
    notes = write(tmp_path / "notes.txt", "text")
    corpus = Corpus.parse(["wikipedia*4700000.00001", "hf:o/n@v2::body", notes])
    found = corpus.commits()
    assert list(found.values()) == ["a" * 40, "b" * 40]
    assert Corpus.parse("self").commits() == Corpus.parse(notes).commits() == {}
    pinned = corpus.at_commits(found)
    wikipedia = f"hf:wikimedia/wikipedia@{'a' * 40}:20231101.en:text"
    assert [str(part.source) for part in pinned.parts] == [
        wikipedia,
        f"hf:o/n@{'b' * 40}::body",
        str(notes),
    ]
    assert [part.weight for part in pinned.parts] == [4700000.00001, None, None]
    assert corpus.at_commits({}) == corpus and Corpus.parse(pinned) is pinned
    assert hub.HubSource.parse(str(pinned.parts[1].source)) == hub.HubSource(
        "o/n", "b" * 40, None, "body"
    )

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    assert corpus.commits() == found
    assert "wikimedia/wikipedia as it was the last time" in caplog.text
    assert list(pinned.commits().values()) == ["a" * 40, "b" * 40]
    with pytest.raises(CorpusError, match="other/set.*cannot be streamed from the hub.*no route"):
        Corpus.parse("hf:other/set").commits()


def test_an_unreachable_hub_names_both_remedies(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(
        CorpusError, match=r"wikimedia/wikipedia.*no route.*local \.txt.*corpus='self'"
    ):
        next(documents("wikipedia"))


class Flaky:
    """A hub that goes away after every `lasts` texts, and is back `comes_back` tries later."""

    def __init__(self, monkeypatch, count, lasts, comes_back=1):
        self.slept, self.tries = [], 0
        monkeypatch.setattr(hub.time, "sleep", self.slept.append)

        def opened(_source, split, seed, lane, lanes):
            self.tries += 1
            if self.tries > 1 and (self.tries - 1) % (comes_back + 1):
                raise ConnectionError("no route")
            ends = lasts * (1 + self.tries // (comes_back + 1))
            for n in range(count):
                if n >= ends:
                    raise TimeoutError("read timed out")
                yield f"{seed}-{n}"

        monkeypatch.setattr(hub.HubSource, "_open", opened)


def test_a_hub_that_goes_away_is_waited_for(monkeypatch, caplog):
    flaky = Flaky(monkeypatch, 20, lasts=6)
    assert list(documents("wikipedia", seed=4)) == [f"4-{n}" for n in range(20)]
    assert (
        flaky.slept == [2, 4] * 3
        and "wikimedia/wikipedia stopped after 6 texts (TimeoutError: read timed out)"
        in caplog.text
    )


def test_a_hub_that_stays_away_is_an_error(monkeypatch):
    flaky = Flaky(monkeypatch, 20, lasts=6, comes_back=99)
    found = documents("wikipedia")
    assert len(list(itertools.islice(found, 6))) == 6
    with pytest.raises(
        CorpusError, match=r"cannot be streamed from the hub \(ConnectionError: no route\)"
    ):
        next(found)
    assert flaky.slept == [2, 4, 8, 16, 32, 64, 64, 64]


@pytest.mark.parametrize("shards", [1, 6])
def test_lanes_part_a_stream_and_the_same_seed_gives_the_same(monkeypatch, shards):
    import datasets

    files = [list(range(10 * n, 10 * n + 10)) for n in range(shards)]
    made = datasets.IterableDataset.from_generator(
        lambda files: ({"text": str(n)} for file in files for n in file),
        gen_kwargs={"files": files},
    )
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: made)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    lanes = [list(documents("wikipedia", seed=1, lane=lane, lanes=3)) for lane in range(3)]
    assert sorted(itertools.chain(*lanes), key=int) == [str(n) for n in range(10 * shards)]
    assert lanes == [list(documents("wikipedia", seed=1, lane=lane, lanes=3)) for lane in range(3)]
    assert lanes != [list(documents("wikipedia", seed=2, lane=lane, lanes=3)) for lane in range(3)]
    if shards == 6:  # whole files
        assert all(len({int(n) // 10 for n in lane}) == 2 for lane in lanes)


def test_lanes_of_local_files_are_every_so_many_documents(tmp_path):
    path = write(tmp_path / "a.txt", "\n\n".join(map(str, range(10))))
    assert [list(documents(path, lane=lane, lanes=4)) for lane in range(4)] == [
        ["0", "4", "8"],
        ["1", "5", "9"],
        ["2", "6"],
        ["3", "7"],
    ]
    assert list(documents(path, lane=11, lanes=12)) == []
    corpora = (path, "self", "wikipedia", [str(path), "hf:a/b*2"])
    assert [Corpus.parse(corpus).lanes for corpus in corpora] == [1, 1, 8, 8]


def test_weights_mix_by_characters(tmp_path, caplog):
    a = write(tmp_path / "a.txt", "\n\n".join("a" * 10 for _ in range(30)))
    b = write(tmp_path / "b.txt", "\n\n".join("b" * 20 for _ in range(90)))
    found = list(documents([f"{a}*3", str(b)]))
    assert len(found) == 120 and found == list(documents([f"{a}*3", f"{b}*1"]))
    early = "".join(found[:24])
    assert early.count("a") / early.count("b") == pytest.approx(3, rel=0.2)
    assert "a.txt has run dry; the others go on without it" in caplog.text and set(found[60:]) == {
        "b" * 20
    }
    assert list(documents([f"{a}*3", str(b)], start=50)) == found[50:]
    odd = write(tmp_path / "c.txt*2", "")
    with pytest.raises(
        CorpusError, match=r"c\.txt\*2: unknown kind of file"
    ):  # a file of that name is that file
        documents(str(odd))
    with pytest.raises(CorpusError, match="weight 0; leave it out"):
        documents([f"{a}*0"])
    with pytest.raises(CorpusError, match="'self' stands alone"):
        documents([str(a), "self"], samples=lambda **_: [])


def test_files_and_the_hub_go_together(tmp_path, monkeypatch):
    Hub(monkeypatch, [{"text": f"hub {n}"} for n in range(4)])
    path = write(tmp_path / "a.txt", "one\n\ntwo")
    assert sorted(documents([path, "wikipedia"])) == [
        "hub 0",
        "hub 1",
        "hub 2",
        "hub 3",
        "one",
        "two",
    ]
    known = identity([f"{path}*2", "wikipedia"])
    assert known["name"] == "a.txt*2, wikimedia/wikipedia" and [
        part["weight"] for part in known["parts"]
    ] == [2.0, None]
    assert (
        known["parts"][0]["files"][0]["name"] == "a.txt"
        and known["parts"][1]["config"] == "20231101.en"
    )
    assert known != identity([f"{path}*3", "wikipedia"])


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("knowedit.io.lines.open_bytes", denied)
    with pytest.raises(CorpusError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        list(documents(path))


def test_fingerprints_know_contents_and_nothing_else(tmp_path):
    here = write(tmp_path / "a.txt", "one")
    (tmp_path / "other").mkdir()
    there = shutil.copy(here, tmp_path / "other" / "a.txt")
    assert identity(here) == identity([there])
    assert identity(here)["files"] == [{"name": "a.txt", "sha256": "7692c3ad3540bb80"}]
    write(here, "two")
    assert identity(here) != identity(there)
    assert identity("self") == {"name": "self"}
    assert identity("hf:a/b@c:d:e") == {
        "name": "a/b",
        "revision": "c",
        "config": "d",
        "column": "e",
    }
    assert identity("wikipedia")["config"] == "20231101.en"
    with pytest.raises(CorpusError, match="no such file"):
        identity(tmp_path / "none.txt")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "count", "words"),
    [
        ("wikitext2_raw_valid.txt.gz", 541, 213_886),
        ("enwiki_2021_sample_3MB.txt.gz", 1_584, 488_188),
    ],
)
def test_the_real_corpora_are_read_whole(data, name, count, words):
    found = list(documents(data / name))
    assert (len(found), sum(len(text.split()) for text in found)) == (count, words)
