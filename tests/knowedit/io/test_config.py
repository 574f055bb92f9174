"""Settings as values: to a dictionary and back, checked, changed by name (unit)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knowedit.errors import ConfigError
from knowedit.io.config import Config, parse_setting, paths_of


class Shape(Config):
    family = "test-shape"


@dataclass(frozen=True)
class Round(Shape):
    radius: float = 1.0


@dataclass(frozen=True)
class SharpCorner(Shape):
    corners: int = 4
    radius: float = 0.0
    version = 3

    @classmethod
    def migrate(cls, record: dict[str, Any], version: int) -> dict[str, Any]:
        if version < 2:
            record["corners"] = record.pop("edges")
        return record


@dataclass(frozen=True)
class Body(Config):
    shape: Shape = field(default_factory=lambda: Round(2.0))
    inside: Shape | None = None
    layers: tuple[int, ...] | None = None
    pair: tuple[float, float] = (0.9, 0.98)
    when: Literal["auto", "never"] = "auto"
    texts: tuple[str, ...] = ()
    name: str = "body"
    fine: bool = True
    file: Path | None = None
    weights: torch.Tensor | None = None


shapes = st.builds(Round, st.floats(allow_nan=False, allow_infinity=False)) | st.builds(
    SharpCorner, st.integers(), st.floats(allow_nan=False, allow_infinity=False)
)
bodies = st.builds(
    Body,
    shape=shapes,
    inside=st.none() | shapes,
    layers=st.none() | st.lists(st.integers()).map(tuple),
    when=st.sampled_from(["auto", "never"]),
    texts=st.lists(st.text()).map(tuple),
    name=st.text(),
    fine=st.booleans(),
    weights=st.none(),
    file=st.none() | st.just(Path("a/b")),
)


@given(bodies)
def test_a_record_in_json_reads_back_equal(body):
    record = json.loads(json.dumps(body.to_dict()))
    assert Body.from_dict(record) == body
    assert Body.from_dict(record).to_dict() == body.to_dict()


def test_a_record_says_kind_version_and_every_field():
    assert SharpCorner(5).to_dict() == {
        "kind": "sharp-corner",
        "version": 3,
        "corners": 5,
        "radius": 0.0,
    }


def test_what_a_record_leaves_out_is_the_default():
    assert Body.from_dict({"kind": "body", "name": "x"}) == Body(name="x")
    assert Body.from_dict({"shape": {"radius": 3.0}}) == Body(Round(3.0))
    assert Body.from_dict({"shape": {}}).shape == Round(2.0)  # of this field, not of the kind
    assert Body.from_dict({"shape": {"kind": "sharp-corner"}}).shape == SharpCorner()
    assert Body.from_dict({"shape": "sharp-corner"}).shape == SharpCorner()


def test_values_are_made_to_fit():
    body = Body(layers=5, pair=[1, 2], texts="one", file="a")
    assert body.layers == (5,) and body.pair == (1.0, 2.0) and body.texts == ("one",)
    assert type(body.pair[0]) is float and body.file == Path("a")
    assert Body(shape={"radius": 3}).shape == Round(3.0)


def test_numbers_of_numpy_and_torch_are_numbers():
    """As Python's own, so that JSON holds them."""
    shapes = [np.int64(3), np.arange(3, 4), [np.int32(3)], torch.tensor([3])]
    assert [Body(layers=given).layers for given in shapes] == [(3,)] * len(shapes)
    made = Body(pair=np.array([0.5, 0.25]), fine=np.bool_(False), shape=Round(np.float32(0.5)))
    assert made == Body(pair=(0.5, 0.25), fine=False, shape=Round(0.5))
    assert Body.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    "values, said",
    [
        ({"name": 3}, r"body\.name must be text, got int 3"),
        ({"fine": 1}, r"body\.fine must be true or false, got int 1"),
        ({"layers": 0.5}, r"body\.layers must be a list of whole numbers or None, got float 0\.5"),
        ({"layers": True}, r"body\.layers must be"),
        ({"name": None}, r"body\.name must be text, got nothing"),
        ({"layers": {"a": 1}}, r"body\.layers must be"),
        ({"pair": (1.0,)}, r"body\.pair must be \(a number, a number\)"),
        ({"when": "later"}, r"body\.when must be 'auto' or 'never', got str 'later'"),
        ({"shape": 3}, r"body\.shape must be a test-shape \(round, sharp-corner\), got int 3"),
        ({"shape": "rond"}, r"unknown test-shape 'rond'; did you mean 'round'\?"),
        ({"shape": {"kind": "round", "radios": 1}}, r"round has no setting 'radios'; did you mean"),
        ({"shape": {"radius": "1"}}, r"round\.radius must be a number, got str '1'"),
    ],
)
def test_a_wrong_value_is_named(values, said):
    with pytest.raises(ConfigError, match=said):
        Body(**values)
    with pytest.raises(ConfigError, match=said):
        Body.from_dict(values)


def test_unknown_settings_and_newer_records_are_refused():
    with pytest.raises(ConfigError, match="body has no setting 'layer'; did you mean 'layers'"):
        Body.from_dict({"layer": 3})
    with pytest.raises(ConfigError, match="version 4, this program knows 3; install a newer one"):
        Shape.from_dict({"kind": "sharp-corner", "version": 4})
    with pytest.raises(ConfigError, match=r"unknown test-shape \['round'\]"):
        Shape.from_dict({"kind": ["round"]})
    for version in ("1", 0, True):
        with pytest.raises(ConfigError, match=r"round.version must be 1, 2, ..., got"):
            Shape.from_dict({"kind": "round", "version": version})
    with pytest.raises(ConfigError, match="expected a record, got list"):
        Body.from_dict([1])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a record, got nothing"):
        Body.from_dict(None)  # type: ignore[arg-type]


def test_all_settings_by_path():
    found = paths_of(Body())
    assert "name" in found and "shape.radius" in found and "shape" not in found
    assert Body().with_settings({"shape.radius": 4}).shape == Round(4.0)


def test_an_older_record_is_migrated():
    assert Shape.from_dict({"kind": "sharp-corner", "version": 1, "edges": 7}) == SharpCorner(7)
    with pytest.raises(ConfigError, match="has no setting 'edges'"):
        Shape.from_dict({"kind": "sharp-corner", "version": 3, "edges": 7})


def test_settings_are_changed_by_name():
    body = Body(layers=(1,))
    changed = body.with_settings(["shape.radius=3", "layers=[4, 5]", "name=x y", "fine=false"])
    assert changed == Body(Round(3.0), layers=(4, 5), name="x y", fine=False)
    assert body == Body(layers=(1,))
    assert body.with_settings({"radius": 4}) == Body(Round(4.0), layers=(1,))  # one part has it
    assert body.with_settings("shape.radius=4") == body.with_settings(radius=4)
    assert body.with_settings(shape="sharp-corner").shape == SharpCorner()
    assert body.with_settings(["shape=sharp-corner", "shape.corners=3"]).shape == SharpCorner(3)


@pytest.mark.parametrize(
    "settings, said",
    [
        (["radius"], "give name=value"),
        (["=3"], "give name=value"),
        ([3], "3: give name=value"),
        ({3: 4}, "the name of a setting is a text"),
        (None, "settings are names and values, got nothing"),
        (["radios=1"], "body has no setting 'radios'"),
        (["shape.radios=1"], "round has no setting 'radios'; did you mean 'radius'"),
        (["name.x=1"], "body.name is 'body' and has no setting 'x'"),
        (["nome.x=1"], "body has no setting 'nome'; did you mean 'name'"),
        (["inside=round", "radius=1"], "'radius' could be shape.radius, inside.radius"),
    ],
)
def test_settings_that_cannot_be_changed(settings, said):
    with pytest.raises(ConfigError, match=said):
        Body().with_settings(settings)


def test_a_setting_is_json_or_text():
    assert parse_setting("a.b=[1, 2]") == ("a.b", [1, 2])
    assert parse_setting("a=null") == ("a", None)
    assert parse_setting("a=x=y") == ("a", "x=y")
    numbers = {".5": 0.5, "5.": 5.0, "+2": 2.0, "1.e-3": 1e-3, "-.5E2": -50.0}
    assert {text: parse_setting(f"a={text}")[1] for text in numbers} == numbers
    for text in ("4-8", ".", "1e", "v1.2", "inf", "1_000"):
        assert parse_setting(f"a={text}") == ("a", text)


def test_an_object_that_no_record_holds_is_referred_to():
    record = Body(weights=torch.ones(3)).to_dict()
    assert record["weights"]["reference"] == "Tensor"
    assert record["weights"] == Body(weights=torch.ones(3)).to_dict()["weights"]
    assert record["weights"] != Body(weights=torch.tensor([1.0, 1.0, 2.0])).to_dict()["weights"]
    with pytest.raises(ConfigError, match=r"body\.weights was an object \(Tensor\).*pass it again"):
        Body.from_dict(record)
