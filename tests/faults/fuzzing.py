"""Damaged and hostile files for every reader, made from valid ones: bytes changed, cut and moved,
and parts of their structure taken away or replaced, with the checksums right again.

A reader may read such a file, or raise an error of ours that names it; nothing else may come out.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import logging
import random
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from knowedit.cli.inspection import describe
from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import FORMAT as UNDO
from knowedit.edits.export.folder import ORIGINAL, read_record
from knowedit.edits.history import History
from knowedit.errors import KnowEditError
from knowedit.evaluation.sweep import read_sweep
from knowedit.facts.records import read_facts
from knowedit.facts.sets import load
from knowedit.io.tensors import CHECKSUMS, KEY, checksum, opened
from knowedit.methods.registry import make_method
from knowedit.report.run import SECTIONS, report
from knowedit.statistics.corpus.corpus import Corpus
from knowedit.statistics.files import npz
from knowedit.statistics.files.store import LayerStatistics
from tests.faults.tally import MOST, Tally

FILES = Path(__file__).parent.parent / "knowedit"
V1 = FILES / "edits" / "files" / "v1"
STATISTICS = FILES / "statistics" / "files"

#: What may stand in the place of any value.
WRONG: tuple[Any, ...] = (
    None, True, 0, 7, -1, 2**63, 10**400, 1e308, float("inf"), float("nan"), 0.5, "", "x", "{}",
    "France", "\x1b]0;t\x07", "\ud800", "../../x", "9" * 5000, [], [[]], ["x"], [None], [[[1]]],
    {}, {"str": 1}, {"a": 1}, {"str": None}, {"prompt": "x"}, {"kind": "memit"},
)  # fmt: skip
BYTES = (0, 1, 9, 10, 13, 0x1B, 0x22, 0x2C, 0x5B, 0x5C, 0x7B, 0x7D, 0x7F, 0x80, 0xC3, 0xED, 0xFF)

FACT_RECORDS: tuple[dict[str, Any], ...] = (
    {
        "prompt": "The capital of {} is", "subject": "France", "target": "Lyon", "true": "Paris",
        "paraphrases": ["France's capital is"], "questions": ["What is the capital of France?"],
        "neighbours": [{"prompt": "The capital of Italy is", "answer": "Rome"}, "Berlin is in"],
        "portability": [{"prompt": "The mayor of France's capital is", "answer": "a"}],
        "relation": "P36", "id": "1",
    },
    {
        "case_id": 0, "pararel_idx": 1,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is", "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1"},
            "target_true": {"str": "French", "id": "Q2"}, "subject": "Danielle Darrieux",
        },
        "paraphrase_prompts": ["Danielle Darrieux, a native"],
        "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
        "attribute_prompts": ["a"], "generation_prompts": ["b"],
    },
    {
        "case_id": 1, "prompt": "The mother tongue of Danielle Darrieux is",
        "target_new": "English", "subject": "Danielle Darrieux", "ground_truth": "French",
        "rephrase_prompt": "Danielle Darrieux, a native",
        "locality_prompt": "The mother tongue of Léon Blum is", "locality_ground_truth": "French",
    },
    {
        "subject": "Watts Humphrey", "src": "What university did Watts Humphrey attend?",
        "pred": "Trinity College", "rephrase": "Where did Watts Humphrey study?",
        "alt": "University of Michigan", "answers": ["Illinois Institute of Technology"],
        "loc": "nq question: who played desmond doss father", "loc_ans": "Hugo Weaving",
        "cond": "a >> b || c",
    },
    {
        "subject": "Leo Arons", "prompt": "Leo Arons passed away in", "target_new": "Berlin",
        "ground_truth": ["Munich"], "rephrase_prompt": "Leo Arons died in",
        "portability": {"Reasoning": [{"prompt": "a b", "ground_truth": [["c", "d"]]}]},
        "locality": {"Relation_Specificity": [{"prompt": "e f", "ground_truth": [["g"]]}]},
    },
    {
        "case_id": 1,
        "requested_rewrite": [
            {
                "prompt": "{} is a citizen of", "relation_id": "P27", "subject": "Ellie Kemper",
                "target_new": {"str": "Croatia", "id": "Q224"}, "question": "Whose?",
                "target_true": {"str": "United States of America", "id": "Q30"},
            }
        ],
        "questions": ["Who leads Ellie Kemper's country?"], "new_answer": "x", "answer": "y",
        "new_answer_alias": ["z"], "answer_alias": ["w"],
    },
    {
        "known_id": 0, "subject": "Vinson Massif", "attribute": "Antarctica",
        "template": "{} is located in the continent", "prediction": " of Antarctica.",
        "prompt": "Vinson Massif is located in the continent of", "relation_id": "P30",
    },
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One reader and how its inputs are made.

    Attributes:
        name: of the file that is written, whose ending says its kind.
        read: what must understand or refuse it.
        make: a damaged file, drawn at random.
        weight: how often it is drawn; less for readers that take long.
    """

    name: str
    read: Callable[[Path], object]
    make: Callable[[random.Random], bytes]
    weight: float = 1.0

    @property
    def label(self) -> str:
        """How counts call it."""
        return f"{self.read.__module__.rpartition('.')[2]}.{self.read.__qualname__} {self.name}"


class Escaped(AssertionError):
    """An input that brought out something else than an error of ours that names the file."""


def trial(target: Target, data: bytes, folder: Path) -> bool:
    """Whether `data` was read, or else refused as it should be. Raises Escaped."""
    path = folder / target.name
    path.write_bytes(data)
    try:
        target.read(path)
        return True
    except KnowEditError as error:
        if path.name not in str(error):
            raise Escaped(f"{target.label}: the error does not name the file: {error}") from error
        return False
    except Exception as error:
        raise Escaped(f"{target.label}: {type(error).__name__}: {str(error)[:300]}") from error


class Inputs:
    """Damaged files for every reader; the first that escape are kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.targets = folder, targets()
        self.weights = list(accumulate(one.weight for one in self.targets))
        self._held = contextlib.ExitStack()
        self._held.enter_context(quiet())

    def try_one(self, number: int, seed: int, tally: Tally) -> None:
        """The input of that number."""
        chance = random.Random(f"{seed} input {number}")
        target = chance.choices(self.targets, cum_weights=self.weights)[0]
        data = target.make(chance)
        try:
            read = trial(target, data, self.folder)
            tally.outcomes[f"{target.label}: {'read' if read else 'refused'}"] += 1
        except Escaped as problem:
            tally.fail(number, str(problem))
            if len(tally.failed) < MOST:
                (self.folder / f"escaped-{number}-{target.name}").write_bytes(data)

    def close(self) -> None:
        """Let the log speak again."""
        self._held.close()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the log's lines about every file."""
    logging.disable(logging.CRITICAL)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


# -- changes --------------------------------------------------------------------------------------


def damaged(data: bytes, chance: random.Random, most: int = 4) -> bytes:
    """A few bytes changed, put in, taken out, doubled or moved; or the end cut off."""
    held = bytearray(data)
    for _ in range(chance.randint(1, most)):
        if not held:
            break
        at, kind = chance.randrange(len(held)), chance.randrange(7)
        some = slice(at, at + chance.randint(1, 16))
        if kind == 0:
            held[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            held[at] = chance.choice(BYTES)
        elif kind == 2:
            del held[some]
        elif kind == 3:
            held[at:at] = bytes(chance.choices(BYTES, k=chance.randint(1, 8)))
        elif kind == 4:
            held[at:at] = held[some]
        elif kind == 5:
            there = chance.randrange(len(held))
            held[there : there + 8] = held[some]
        else:
            del held[at:]
    return bytes(held)


def changed(value: Any, chance: random.Random, most: int = 3) -> Any:
    """A copy of a record with some parts, at any depth, taken away, renamed, doubled or
    replaced.
    """
    found = copy.deepcopy(value)
    for _ in range(chance.randint(1, most)):
        place = found
        while isinstance(place, (dict, list)) and place:
            key = chance.choice(list(place)) if isinstance(place, dict) else _index(place, chance)
            if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.75:
                place = place[key]
                continue
            _change_one(place, key, chance)
            break
        else:
            found = copy.deepcopy(chance.choice(WRONG))
    return found


def _index(place: list[Any], chance: random.Random) -> int:
    return chance.randrange(len(place))


def _change_one(place: Any, key: Any, chance: random.Random) -> None:
    draw = chance.random()
    if draw < 0.25:
        del place[key]
    elif draw < 0.35 and isinstance(place, dict):
        place[chance.choice(("x", "", "kind", "target_new", "1e999"))] = place.pop(key)
    elif draw < 0.45 and isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    elif draw < 0.55 and isinstance(place[key], str):
        place[key] = damaged(place[key].encode("utf-8", "replace"), chance).decode(
            "utf-8", "replace"
        )
    elif draw < 0.6:
        place[key] = [place[key]]
    else:
        place[key] = copy.deepcopy(chance.choice(WRONG))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# -- kinds of files -------------------------------------------------------------------------------


def facts_file(kind: str) -> Callable[[random.Random], bytes]:
    """Files of facts of every format, plain or packed."""

    def make(chance: random.Random) -> bytes:
        records = [
            changed(record, chance) if chance.random() < 0.7 else record
            for record in chance.choices(FACT_RECORDS, k=chance.randint(1, 3))
        ]
        if kind.startswith(".csv"):
            data = _csv([record for record in records if isinstance(record, dict)])
        elif kind.startswith(".jsonl"):
            data = b"\n".join(map(_json, records))
        else:
            data = _json(records)
        return zipped(damaged(data, chance) if chance.random() < 0.4 else data, kind, chance)

    return make


def zipped(data: bytes, kind: str, chance: random.Random) -> bytes:
    """The file as its name says, half of the packed ones damaged once more."""
    if not kind.endswith(".gz"):
        return data
    data = gzip.compress(data, 1)
    return damaged(data, chance) if chance.random() < 0.5 else data


def _csv(records: list[dict[str, Any]]) -> bytes:
    import csv

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(name for one in records for name in one)))
    writer.writeheader()
    for record in records:
        writer.writerow(
            {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in record.items()}
        )
    return out.getvalue().encode("utf-8", "surrogatepass")


def corpus_file(kind: str) -> Callable[[random.Random], bytes]:
    """Corpora as text, as JSON lines and as parquet, plain or packed."""
    import pyarrow
    import pyarrow.parquet

    lines = [f"text number {i}" for i in range(20)]
    tables = [
        pyarrow.table({"text": lines}),
        pyarrow.table({"text": [None, "a", "\x00"], "other": [1, 2, 3]}),
        pyarrow.table({"text": pyarrow.array(lines, pyarrow.large_string())}),
        pyarrow.table({"text": [1, 2]}),
        pyarrow.table({"texts": lines}),
        pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()}),
        pyarrow.table({"text": [["a"], ["b"]]}),
        pyarrow.table({"text": pyarrow.array([], pyarrow.string())}),
    ]
    wholes = []
    for table in tables:
        for packing in ("none", "snappy", "zstd"):
            out = io.BytesIO()
            pyarrow.parquet.write_table(table, out, compression=packing)
            wholes.append(out.getvalue())

    def make(chance: random.Random) -> bytes:
        if "parquet" in kind:
            data = chance.choice(wholes)
        elif "jsonl" in kind:
            record = {"text": chance.choice(lines), "id": 3}
            data = b"\n".join(_json(changed(record, chance)) for _ in range(3))
        else:
            data = "\n\n".join(lines[:4]).encode()
        return zipped(damaged(data, chance) if chance.random() < 0.8 else data, kind, chance)

    return make


def npz_file(chance: random.Random) -> bytes:
    """A peer's statistics: members of other types and shapes, or damaged."""
    odd = (
        np.eye(3, dtype="f4"), np.eye(3, dtype="f8"), np.zeros((0, 0), "f4"), np.ones(3, "f4"),
        np.array(4), np.array(-1), np.array([1, 2]), np.array(1.5), np.array("text"),
        np.array(True), np.full((2, 2), np.nan, "f4"), np.array(2**62), np.array(1 + 2j),
        np.array([None], object), np.zeros((1, 2, 3), "f2"), np.array("2020", "M8[D]"),
    )  # fmt: skip
    members = {"mom2.mom2": odd[0], "mom2.count": odd[4], "sample_size": odd[4]}
    for name in list(members):
        if chance.random() < 0.3:
            members[name] = chance.choice(odd)
        if chance.random() < 0.1:
            del members[name]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, member in members.items():
            held = io.BytesIO()
            np.save(held, member)
            data = held.getvalue()
            archive.writestr(
                f"{name}.npy", damaged(data, chance) if chance.random() < 0.3 else data
            )
    data = out.getvalue()
    return damaged(data, chance) if chance.random() < 0.5 else data


class Tensors:
    """A safetensors file of ours with a changed header, changed tensors, or changed bytes."""

    def __init__(self, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.header, self.tensors = header, tensors
        self.sums = {name: checksum(tensor) for name, tensor in tensors.items()}

    @classmethod
    def of(cls, path: Path) -> Tensors:
        """From a valid file."""
        with opened(path) as file:
            return cls(file.header, file.tensors())

    def __call__(self, chance: random.Random) -> bytes:
        header, tensors, sums = self.header, dict(self.tensors), dict(self.sums)
        draw = chance.random()
        if draw < 0.75:
            header = {"format": header["format"], **_mapping(changed(header, chance))}
        if draw > 0.6 and tensors:
            name = chance.choice(sorted(tensors))
            tensor = tensors.pop(name)
            del sums[name]
            if chance.random() < 0.7:
                new = chance.choice((name, "x", f"{name}[0]", "0.U", f"1.{name}", ""))
                tensors[new] = odd_tensor(tensor, chance)
                sums[new] = checksum(tensors[new])
        data = packed(header, tensors, sums)
        return damaged(data, chance) if chance.random() < 0.25 else data


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"x": value}


def odd_tensor(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """Another one in a tensor's place."""
    return chance.choice(
        (
            lambda: tensor.double(), lambda: tensor.long(), lambda: tensor.reshape(-1)[:1],
            lambda: torch.zeros(()), lambda: torch.zeros(0), lambda: tensor[None],
            lambda: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor,
            lambda: tensor.bool(), lambda: tensor.mT.contiguous() if tensor.dim() > 1 else tensor,
        )
    )().contiguous()  # fmt: skip


def packed(header: dict[str, Any], tensors: dict[str, torch.Tensor], sums: dict[str, str]) -> bytes:
    """The file that `write_file` writes, in memory."""
    text = json.dumps(header)
    own = {"": f"{zlib.crc32(text.encode()):08x}"} | {name: sums[name] for name in sorted(sums)}
    return save(tensors, {KEY: f"{text[:-1]}{CHECKSUMS}{json.dumps(own)}}}"})


def undo_record() -> Tensors:
    """What an edited folder holds beside its weights."""
    name = "model.layers.1.mlp.down_proj.weight"
    edit = {"method": "MEMIT", "key": "memit-0", "facts": [FACT_RECORDS[0]]}
    header = {
        "format": UNDO, "fingerprint": "0" * 32, "model": "tiny", "config.json": None,
        "edits": [edit, {**edit, "key": "memit-1"}],
        "weights": {name: {"tensor": name, "transposed": False, "edited": "00000000"}},
    }  # fmt: skip
    tensors = {f"{ORIGINAL}{name}": torch.eye(4)}
    tensors |= {f"{i}.{name}.{part}": torch.ones(4, 1) for i in range(2) for part in "UV"}
    return Tensors(header, tensors)


def config_file(chance: random.Random) -> bytes:
    """The settings of a sweep, as JSON (which YAML is too) or as YAML."""
    import yaml

    record = {
        "model": "x", "dataset": "demo", "limit": 3, "methods": ["memit", {"kind": "rome"}],
        "grid": {"target.steps": [5, 10], "layers": [[1], [2]]}, "statistics": "y", "seed": 0,
    }  # fmt: skip
    found = changed(record, chance)
    try:
        text = yaml.safe_dump(found) if chance.random() < 0.5 else json.dumps(found)
    except yaml.YAMLError:
        text = json.dumps(found)
    data = text.encode("utf-8", "surrogatepass")
    return damaged(data, chance) if chance.random() < 0.4 else data


def sweep_of(path: Path) -> None:
    """A sweep and its methods, as `knowedit eval --config` reads them."""
    read_sweep(path).variants()


def method_of(path: Path) -> None:
    """A method by its record, as edits have it."""
    from knowedit.io.tensors import understood

    with understood(path, "a record of a method"):
        make_method(json.loads(path.read_text("utf-8")))


RESULTS: dict[str, Any] = {
    "results.json": [
        {
            "protocol": "single", "model": "tiny", "method": "memit", "facts": 2, "seconds": 1.5,
            "dataset": "demo", "trajectory": [], "side_effects": {},
            "evaluation": {
                when: {
                    "efficacy": {
                        "success": {"mean": 0.5, "low": 0.1, "high": 0.9},
                        "exact": {"mean": 0.5, "low": 0.1, "high": 0.9},
                    }
                }
                for when in ("before", "after")
            },
        }
    ],
}  # fmt: skip


def result_file(name: str) -> Callable[[random.Random], bytes]:
    """Results as `knowedit report` reads them."""
    whole = RESULTS.get(name, [{"model": "x", "rows": [], "layers": []}])

    def make(chance: random.Random) -> bytes:
        data = _json(changed(whole, chance))
        return damaged(data, chance) if chance.random() < 0.3 else data

    return make


def reported(path: Path) -> None:
    """`knowedit report` of the folder that a file of results is in."""
    for other in SECTIONS:
        if other != path.name:
            (path.parent / other).unlink(missing_ok=True)
    report(path.parent)


def documents(path: Path) -> None:
    """All documents of a corpus."""
    for _ in Corpus.parse(str(path)).documents():
        pass


def targets() -> list[Target]:
    """Every reader with every kind of file that it reads."""
    found = [
        Target(f"facts{kind}", read, facts_file(kind))
        for kind in (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
        for read in (read_facts, load)
    ]
    found += [
        Target(f"corpus{kind}", documents, corpus_file(kind))
        for kind in (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".parquet.gz")
    ]
    peer = "model.layers.1.mlp.down_proj_float32_mom2_100.npz"
    found += [Target(peer, npz.read, npz_file)]
    found += [
        Target(f"{file.stem}.safetensors", read, Tensors.of(file), 0.4)
        for file, read in (
            (V1 / "memit-llama.safetensors", Edit.load),
            (V1 / "ft-l-llama.safetensors", describe),
            (V1 / "neuron-patch-llama.safetensors", Edit.load),
            (V1 / "serac-llama.safetensors", Edit.load),
            (V1 / "history-llama.safetensors", History.load),
            (V1 / "mend-network-llama.safetensors", describe),
            (V1 / "serac-network-llama.safetensors", describe),
            (STATISTICS / "layer-001.safetensors", LayerStatistics.load),
            (STATISTICS / "layer-001.safetensors", describe),
        )
    ]
    found += [Target("knowedit.undo", read_record, undo_record())]
    found += [Target("sweep.yaml", sweep_of, config_file, 0.04)]
    record = make_method("memit").to_dict()
    found += [Target("method.json", method_of, lambda chance: _json(changed(record, chance)), 0.2)]
    drawn = {"results.json": 0.002}  # pictures of what can be read
    found += [Target(name, reported, result_file(name), drawn.get(name, 1)) for name in SECTIONS]
    return found
