"""Results are written and read without loss, or refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from latentstore.errors import ResultsError
from latentstore.report import reading
from latentstore.results import SCHEMA, Candidate, Curve, Figure, Match, Report, from_dict, load, stamp

REPORT = Report(
    kind="evaluation",
    title='Ä title with <script> & "quotes"',
    summary=["one", "zwei 写"],
    data={"store": "s.zarr", "rows": 3, "nested": {"a": [1, 2.5, None, True]}},
    settings={"rank": 512},
    reproduce=["latentstore evaluate"],
    figures=[
        Figure("mAP", 0.881, "analytic", "method", "all", "fraction", (0.87, 0.89), 100, "a note"),
        Figure("mAP", 0.862, "raw", "control", "all", "fraction", (0.0, 0.0)),
        Figure("seconds", 1e-300),
    ],
    curves=[Curve("p", "analytic", [1.0, 2.0], [3.0, 4.0], low=[2.0, 3.0], high=[4.0, 5.0], x_log=True)],
    matches=[
        Match("q.png", "all", 0.1, [Candidate("o.png", "o", 0.9, True)], rank=1),
        Match("r.png", "", None),
    ],
    caveats=["few photos"],
    timings={"total": 1.5},
    **stamp(),
)


def test_round_trip(tmp_path):
    REPORT.write(tmp_path / "r.json")
    assert load(tmp_path / "r.json") == REPORT
    assert from_dict(REPORT.to_dict()) == REPORT
    raw = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert raw["schema"] == SCHEMA == "latentstore.results/1"
    assert from_dict(raw).figures[1].interval == (0.0, 0.0)
    assert "写" in (tmp_path / "r.json").read_text(encoding="utf-8")


def test_a_name_that_is_not_utf_8_survives(tmp_path):
    strange = dataclasses.replace(REPORT, matches=[Match("\udcff\ud800.jpg 写", "", None)])
    strange.write(tmp_path / "r.json")
    assert load(tmp_path / "r.json") == strange
    assert reading.read(tmp_path / "r.json") == [strange]


def test_stamp():
    assert set(REPORT.machine) == {"system", "machine", "cores", "python"}
    assert REPORT.created.endswith("+00:00")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["figures", "curves", "timings", "data"])
def test_not_finite_is_refused(tmp_path, bad, place):
    value = {
        "figures": [Figure("mAP", bad)],
        "curves": [Curve("p", "x", [1.0], [bad])],
        "timings": {"total": bad},
        "data": {"deep": [{"x": bad}]},
    }[place]
    path = tmp_path / "r.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(REPORT, **{place: value}).write(path)
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "latentstore.results/2"},
        {"schema": None},
        {"more": 1},
        {"figures": [{"name": "mAP"}]},
        {"figures": [{"name": "mAP", "value": 1, "colour": "red"}]},
        {"figures": ["mAP"]},
        {"curves": [{"plot": "p"}]},
        {"matches": [{"query": "q", "group": "", "margin": 0, "candidates": [{"path": "p"}]}]},
    ],
)
def test_another_form_is_refused(change):
    with pytest.raises(ResultsError, match="schema"):
        from_dict(REPORT.to_dict() | change)


@pytest.mark.parametrize("missing", ["kind", "title", "summary", "data", "schema"])
def test_a_missing_field_is_refused(missing):
    raw = REPORT.to_dict()
    del raw[missing]
    with pytest.raises(ResultsError, match="schema"):
        from_dict(raw)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'"x"', b"1", b"\xff\xfe", b"{}"])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(ResultsError):
        load(tmp_path / "r.json")
    with pytest.raises(ResultsError, match="readable"):
        load(tmp_path / "none.json")


def test_find():
    assert [f.value for f in REPORT.find("mAP")] == [0.881, 0.862]
    assert [f.value for f in REPORT.find("mAP", subject="raw")] == [0.862]
    assert REPORT.find("mAP", group="none") == []
    assert REPORT.find("mAP", subject="raw", group="all")[0].role == "control"
