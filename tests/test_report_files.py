"""What goes beside the page, CSV, PNG and merged results, and the files that are read or refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_worlds import KINDS, attack, evaluation

from latentstore.errors import ResultsError
from latentstore.report import (
    exports,
    reading,
    render,
    write_csv,
    write_png,
)
from latentstore.results import Figure, Report


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return [make() for make in KINDS.values()]


def test_csv_holds_every_figure_in_full_and_no_formula(tmp_path: Path) -> None:
    report = evaluation()
    risky = Figure(
        "=1+1", -0.5, "@SUM(A1)", "note", "-2", "+x", (-1.0, 0.0), 3, "\t=1", {"model": "=2", "own": "@"}
    )
    report = dataclasses.replace(report, figures=[*report.figures, risky], curves=attack().curves)
    paths = write_csv(report, tmp_path / "tables")
    assert [p.name for p in paths] == ["01-evaluation-figures.csv", "01-evaluation-curves.csv"]
    rows = list(csv.DictReader(io.StringIO(paths[0].read_text(encoding="utf-8"))))
    assert tuple(rows[0]) == exports.FIGURE_COLUMNS
    assert [float(row["value"]) for row in rows] == [f.value for f in report.figures]  # to the last bit
    assert [row["strength"] for row in rows] == [str(f.axes.get("strength", "")) for f in report.figures]
    last = rows[-1]
    assert (last["value"], last["low"], last["high"]) == ("-0.5", "-1.0", "0.0")  # a number stays one
    assert (last["name"], last["subject"], last["group"], last["unit"]) == (
        "'=1+1",
        "'@SUM(A1)",
        "'-2",
        "'+x",
    )
    assert (last["model"], last["other axes"]) == ("'=2", '{"own": "@"}')
    assert last["note"].startswith("'")
    points = list(csv.DictReader(io.StringIO(paths[1].read_text(encoding="utf-8"))))
    assert len(points) == sum(len(c.x) for c in report.curves)
    assert [float(p["y"]) for p in points] == [y for c in report.curves for y in c.y]


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "  =1", "\r=1", "＝1"])
def test_cells_that_a_spreadsheet_would_run_are_defused(text: str) -> None:
    assert str(exports.defused(text)).startswith("'")
    assert exports.defused(f"a{text}") == f"a{exports.text.clean(text)}"
    if text.isprintable():
        for separator in ";|,\t":
            sign = text.lstrip()
            assert f"'{sign}" in str(exports.defused(f"a{separator}{text}"))
            assert exports.defused(f"a{separator}b{text}") == f"a{separator}b{text}"


def test_every_plot_of_the_page_is_a_png_on_white(reports: list[Report], tmp_path: Path) -> None:
    held = [r for r in reports if r.kind in ("compare", "match", "solve")]
    paths = write_png(held, tmp_path / "plots")
    assert len(paths) == len(re.findall(r'<svg [^>]*role="img"', render(held))) == 4
    for path in paths:
        with Image.open(path) as image:
            assert image.width == 2 * exports.PNG_WIDTH
            pixels = np.asarray(image.convert("RGBA"))
        assert pixels[1, 1].tolist() == [255] * 4
        assert (pixels[..., 3] == 255).all()  # nothing shows through
        assert len(np.unique(pixels[..., 0])) > 20
    again = write_png(held, tmp_path / "again")
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths]


def test_results_are_read_as_written_alone_and_merged(reports: list[Report], tmp_path: Path) -> None:
    alone, all_ = tmp_path / "one.json", tmp_path / "all.json"
    reports[0].write(alone)
    assert reading.read(alone) == [reports[0]]
    strange = dataclasses.replace(reports[0], title="undecodable\udcff")
    all_.write_bytes(reading.merged([*reports[1:], strange]))
    assert reading.read(all_) == [strange, *reports[1:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"figures": [{"name": "mAP", "value": "high"}]}, "figures[0].value is 'high', not a number"),
        ({"figures": [{"name": "mAP", "value": True}]}, "figures[0].value is True, not a number"),
        ({"figures": [{"name": "mAP", "value": 1, "role": "king"}]}, "role is 'king', not one of"),
        ({"figures": [{"name": "mAP", "value": 1, "interval": [0.1]}]}, "interval"),
        (
            {"curves": [{"plot": "p", "label": "l", "x": [1], "y": "ab"}]},
            "curves[0].y is 'ab', not list[float]",
        ),
        ({"kind": "poem"}, "kind is 'poem', not one of 'evaluation'"),
        ({"title": None}, "title is None, not str"),
        ({"settings": []}, "settings is [], not an object"),
        ({"figures": 3}, "does not hold results"),
        ({"schema": "other/1"}, "schema is 'other/1'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_the_name_of_the_place(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**attack().to_dict(), **change}))
    with pytest.raises(ResultsError, match=re.escape(said)):
        reading.read(path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("NaN", "it holds NaN, which is not a finite number"),
        ("-Infinity", "it holds -Infinity"),
        ("1e999", "it holds 1e999"),
        ("1" + "0" * 400, "too large"),
        ("[" * 70 + "]" * 70, "nests deeper"),
        ("[" * 100_000, "nests deeper"),
    ],
)
def test_a_file_of_what_no_report_holds_is_refused(value: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(attack().to_dict()).replace('"rank": 256', f'"rank": {value}'))
    with pytest.raises(ResultsError, match=said):
        reading.read(path)


def test_numbers_that_are_none_are_not_merged() -> None:
    with pytest.raises(ResultsError, match="JSON"):
        reading.merged([dataclasses.replace(attack(), figures=[Figure("mAP", float("nan"))])])


@pytest.mark.parametrize("when", ["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59"])
def test_a_date_that_utc_does_not_reach_stands_as_it_is(when: str) -> None:
    assert when in render(dataclasses.replace(attack(), created=when))
