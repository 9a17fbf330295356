"""The page of every kind of report and of all together: its tables, its order, and how it is shown."""

from __future__ import annotations

import base64
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
from report_worlds import KINDS, attack, compare, evaluation, match, picture
from test_report import HOSTILE, Page

from latentstore.errors import ResultsError
from latentstore.report import (
    curves,
    exports,
    grids,
    paper,
    reading,
    render,
    write_csv,
    write_png,
)
from latentstore.report.page import PAGE_BYTES, render_page
from latentstore.report.plots import INK, PAPER
from latentstore.report.tables import clearly_best
from latentstore.results import Candidate, Curve, Figure, Match, Report, Verdict


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return [make() for make in KINDS.values()]


@pytest.fixture(scope="module")
def merged(reports: list[Report]) -> str:
    return render(reports)


def rows_of(html: str) -> list[list[str]]:
    return [[" ".join(cell.split()) for cell in row] for row in Page(html).rows]


# Several reports


def test_several_reports_stand_on_one_page_in_the_order_of_their_kinds(
    reports: list[Report], merged: str
) -> None:
    parsed = Page(merged)
    assert parsed.open == []
    headings = re.findall(r'<h2 class="title">(.*?)</h2>', merged)
    assert headings == [r.title for r in reports]  # KINDS is in the page's order
    assert render(reports[::-1]) == merged
    for report in reports:
        assert parsed.text.count(report.title) >= 2  # above, and where it stands
        assert all(word in parsed.text for word in (*report.summary, *report.caveats, *report.reproduce))


def test_ids_are_unique_and_links_lead_somewhere(merged: str) -> None:
    parsed = Page(merged)
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] or "" for tag, a in parsed.elements if tag == "a"]
    assert len(links) > 30
    used = {link[1:] for link in links} | set(re.findall(r"url\(#([^)]+)\)", merged))
    assert all(link.startswith("#") for link in links)
    assert used <= set(ids)


def test_reports_of_different_spaces_are_said_to_be(reports: list[Report], merged: str) -> None:
    alike = [r for r in reports if r.data["space"] == reports[0].data["space"]]
    assert "2 different encoders" in merged
    assert "different encoders" not in render(alike)


def test_a_page_over_five_megabytes_gives_up_pictures_and_says_so() -> None:
    heavy = "data:image/jpeg;base64," + base64.b64encode(b"\xff\xd8\xff" + bytes(9000)).decode()
    found = [Candidate(f"{i}.jpg", str(i), 0.5, None, heavy) for i in range(10)]
    crowd = dataclasses.replace(match(), matches=[Match(f"q{i}", "", 0.1, found, heavy) for i in range(100)])
    words = dataclasses.replace(match(), caveats=["x" * 1000] * 3000)
    page = render_page([crowd, words])
    assert len(page.html.encode()) < PAGE_BYTES
    assert page.pictures_left_out > 0
    assert f"{page.pictures_left_out} pictures were left out" in page.html
    assert "left out to keep" not in render_page([match()]).html


# Tables like the paper's


def test_printed_tables_agree_with_each_other() -> None:
    """Table 3 holds Table 10's seen model and the mean of its others; Table 8 holds Table 10's own row."""
    for name, row in paper.TABLE_10.items():
        seen, unseen = paper.TABLE_3[name]
        assert row[0] == seen
        mean = paper.across(row, paper.UNSEEN)
        # Printed to a tenth of a percent, of figures that are themselves so rounded.
        assert all(abs(m - u) <= 0.0010001 for m, u in zip(mean, unseen, strict=True))
    for model, strength in zip(paper.MODELS, (0.9, 0.8, 0.7, 0.7, 0.6, 0.8, 0.7), strict=True):
        at = paper.MODELS.index(model)
        assert paper.TABLE_8[strength][at] == paper.TABLE_10["With linear transformation"][at]
    for table in (paper.TABLE_6["cosface"], paper.TABLE_7["linear"], paper.FIGURE_9["1"]):
        assert table == paper.TABLE_3["With linear transformation"]
    assert all(len(row) == len(paper.MODELS) for row in (*paper.TABLE_8.values(), *paper.TABLE_10.values()))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("SD2", "SD2"),
        ("stabilityai/stable-diffusion-2", "SD2"),
        ("stabilityai/stable-diffusion-3-medium", "SD3"),
        ("kandinsky_3", "Kandinsky-3"),
        ("stable-diffusion-2-inpainting", ""),
        ("SD21", ""),
        ("", ""),
    ],
)
def test_models_are_the_papers_by_name_alone(name: str, known: str) -> None:
    assert paper.known_model(name) == known


def test_table_3_holds_domains_costs_and_the_upper_bound() -> None:
    table = grids.laid_out(evaluation())[0].table
    assert table.heads == [("Seen", 2), ("Unseen", 2), ("", 3)]
    assert table.columns[4:] == ["training, h", "extraction, s/img", "matching, s/pair"]
    lines = {
        (line.label, line.role): [[s.value for s in cell] for cell in line.cells] for line in table.lines
    }
    # Extraction is the encoder's: every method's and every control's; training is of gnull alone.
    assert lines["analytic", "method"] == [
        ["93.0"],
        ["90.9"],
        ["86.0"],
        ["83.9"],
        [],
        ["0.0217"],
        ["6.9 × 10⁻⁹"],
    ]
    assert lines["raw", "control"][5] == ["0.0217"]
    assert lines["gnull", "method"][4] == ["0.0031"]
    assert lines["Upper bound: gnull", "upper"][:4] == [[], [], ["95.0"], ["92.9"]]
    assert lines["With linear transformation", "paper"] == [
        ["88.8"], ["86.6"], ["86.6"], ["84.5"], ["0.17"], ["1.59 × 10⁻⁴"], ["5.3 × 10⁻¹¹"],
    ]  # fmt: skip


def test_table_8_and_10_place_figures_by_model_and_strength() -> None:
    report = evaluation()
    made = {grid.key: grid.table for grid in grids.laid_out(report)}
    assert list(made) == ["table3", "table8", "table10"]
    heads = ["stable-diffusion-2", "stabilityai/stable-diffusion-xl-base-1.0", "our own"]
    assert [head for head, _ in made["table8"].heads] == [head for head, _ in made["table10"].heads] == heads
    bands = [line.label for line in made["table8"].lines if line.role == "band"]
    assert bands == ["Strength 0.2", "Strength 0.4", "Strength 0.6", "Strength 0.8", "Strength 1"]
    for figure in report.figures:
        if "strength" in figure.axes and figure.name == "mAP":
            lines = made["table8"].lines
            at = bands.index(f"Strength {figure.axes['strength']:g}")
            start = [i for i, line in enumerate(lines) if line.role == "band"][at]
            line = next(line for line in lines[start:] if line.label == figure.subject)
            cell = line.cells[2 * heads.index(str(figure.axes["model"]))]
            assert [s.value for s in cell] == [f"{100 * figure.value:.1f}"]
    printed = [line for line in made["table8"].lines if line.role == "paper"]
    assert [[s.value for cell in line.cells for s in cell] for line in printed][-1] == [
        "43.2",
        "37.7",
        "19.3",
        "15.7",
    ]
    own = next(line for line in made["table10"].lines if line.label == "Embeddings of VAE")
    assert [len(cell) for cell in own.cells] == [1, 1, 1, 1, 0, 0]  # nothing is printed of our own model


def test_printed_figures_have_columns_of_their_own_where_no_model_is_the_papers() -> None:
    report = evaluation()
    renamed = [
        dataclasses.replace(f, axes={**f.axes, "model": f"{f.axes['model']} turbo"})
        if "model" in f.axes
        else f
        for f in report.figures
    ]
    made = {g.key: g.table for g in grids.laid_out(dataclasses.replace(report, figures=renamed))}
    assert made["table10"].heads[-2:] == [(f"paper: {paper.SEEN}", 2), (f"paper: {paper.UNSEEN}", 2)]
    row = next(line for line in made["table10"].lines if line.label == "With linear transformation")
    assert [[s.value for s in cell] for cell in row.cells][-4:] == [["88.8"], ["86.6"], ["86.6"], ["84.5"]]
    own = next(line for line in made["table10"].lines if line.role == "method")
    assert own.cells[-4:] == [[], [], [], []]


def test_ablations_and_spectra_are_laid_out_and_other_reports_are_not(reports: list[Report]) -> None:
    made = {r.kind: [g.key for g in grids.laid_out(r)] for r in reports}
    assert made["ablation"] == ["table6", "table7"]
    assert made["compare"] == ["table1"]
    assert {kind for kind, keys in made.items() if keys} == {"evaluation", "ablation", "compare"}
    table = grids.laid_out(compare())[0].table
    assert table.columns == ["cos φ", "±", "random band, 95 %", "overlap", "overlap by chance"]
    first = [[s.value for s in cell] for cell in table.lines[0].cells]
    assert first == [["0.995790"], ["± 3.7 × 10⁻⁵"], ["0.999980 to 0.9999950"], ["0.61"], ["0.125"]]


def test_printed_figures_are_never_bold_and_always_marked(merged: str) -> None:
    printed = re.findall(r'<tr class="paper">.*?</tr>', merged, re.DOTALL)
    assert len(printed) > 30
    assert all('<span class="role">paper</span>' in row and "<strong>" not in row for row in printed)
    assert merged.count("Data and models differ") == 6


def test_bold_is_what_lies_clear_of_all_others() -> None:
    def figure(value: float, interval: tuple[float, float] | None) -> Figure:
        return Figure("mAP", value, interval=interval)

    low, high = figure(0.8, (0.78, 0.82)), figure(0.9, (0.88, 0.92))
    assert clearly_best([low, high]) is high
    assert clearly_best([low, figure(0.83, (0.81, 0.85))]) is None
    assert clearly_best([low, figure(0.9, None)]) is None
    assert clearly_best([figure(0.7, (0.5, 0.89)), low, high]) is None  # wide, though not the next
    assert clearly_best([figure(1.0, (1.0, 1.0)), figure(1.0, (1.0, 1.0))]) is None
    assert clearly_best([high]) is None


# Plots


def test_an_attack_grows_harder_in_the_order_given_and_multiples_share_one_scale() -> None:
    families = curves.families(curves.plots_of(attack()))
    assert [len(f) for f in families] == [3]
    assert len({plot.limits for plot in families[0]}) == 1
    jpeg, blur, _ = (curves.draw(plot, PAPER) for plot in families[0])
    assert jpeg.axes[0].xaxis_inverted()
    assert not blur.axes[0].xaxis_inverted()
    assert jpeg.axes[0].get_ylim() == blur.axes[0].get_ylim()
    assert [row[0] for row in curves.rows(families[0][0])] == ["100", "70", "50", "10"]


def test_strengths_and_attacks_are_drawn_from_axes_alone() -> None:
    drawn = curves.plots_of(evaluation())
    assert [p.title.split(":")[0] for p in drawn] == ["mAP over strength"] * 3
    assert [line.curve.x for line in drawn[0].lines] == [[0.2, 0.4, 0.6, 0.8, 1.0]] * 4
    bare = dataclasses.replace(attack(), curves=[])
    assert curves.plots_of(bare)[0].lines[0].curve.x == [100.0, 70.0, 50.0, 10.0]


def test_scores_are_filled_steps_and_other_curves_are_not() -> None:
    scores, other = curves.plots_of(match())[0], curves.plots_of(attack())[0]
    axes = curves.draw(scores, INK).axes[0]
    assert {line.get_drawstyle() for line in axes.lines} == {"steps-mid"}
    assert len(axes.collections) == 2
    assert axes.get_ylim()[0] == 0
    assert {line.get_drawstyle() for line in curves.draw(other, INK).axes[0].lines} == {"default"}


# Matches


def test_a_verdict_says_what_it_is_worth() -> None:
    text = Page(render(match())).text
    for words in (
        "✓ Match: its origin is here",
        "? Doubtful: its origin may be here",
        "∅ No origin here",
        "0.2 % (p = 0.0021)",
        "False alarms: without an origin here, yet called a match",
        "Detection: its origin comes first, and it is called doubtful or a match",
        "1.0 % [0.4, 1.9]",
        "92.3 % [90.0, 94.5], of simulated ones",
        "412 pictures",
        "margin to the runner-up 0.21",
        "images/copy-4.jpg and 2 more",
        "Orange places speak for this origin",
    ):
        assert words in text, words
    assert "Origin not known" not in text
    alone = dataclasses.replace(match(), matches=[dataclasses.replace(match().matches[0], verdict=None)])
    assert "Origin not known" in Page(render(alone)).text


def test_query_heat_and_first_candidate_stand_side_by_side_on_a_page_of_matches_alone() -> None:
    assert len(re.findall(r'<div class="pair three">', render(match()))) == 3
    assert '<div class="pair' not in render(evaluation())


@pytest.mark.parametrize(
    "heat", ["https://example.org/a.png", picture((1, 2, 3), "jpeg"), "data:image/png;base64,AAAA"]
)
def test_a_heat_map_is_a_png_or_nothing(heat: str) -> None:
    found = Match("q", "", 0.1, [Candidate("a", "a", 0.5, None, "", [], heat)])
    html = render(dataclasses.replace(match(), matches=[found]))
    assert "<img" not in html
    assert "example.org" not in html


# Hostile strings, in what is new


def _named(word: str) -> Report:
    """A report in which one word stands in every place that is not in every report."""
    axes: dict[str, str | float] = {"model": word, "strength": 0.5, "domain": "seen"}
    each: tuple[dict[str, str | float], ...] = (
        *(axes, {**axes, "strength": 0.7, word: word}, {"model": word}, {"model": "b" + word}),
        *({"attack": word, "intensity": 3.0}, {"attack": word, "intensity": 4.0}),
    )
    figures = [Figure("mAP", 0.5, word, "method", word, "fraction", (0.4, 0.6), 5, word, a) for a in each]
    figures.append(Figure("extraction", 0.5, word, "note", word, "s/img", note=word))
    verdict = Verdict("match", 0.1, 0.1, 0.1, (0.0, 0.2), 0.9, None, word, 5, word)
    candidate = Candidate(word, word, 0.5, None, word, [word] * 7, word)
    return dataclasses.replace(
        match(),
        title=word,
        settings={word: [{word: word}]},
        figures=figures,
        curves=[Curve(f"Scores {word}", word, [1.0, 2.0, 3.0], [0.1, 0.2, 0.1], word, word)],
        matches=[Match(word, word, 0.1, [candidate], word, None, verdict)],
    )


@pytest.fixture(scope="module")
def plain() -> Page:
    return Page(render(_named("plain")))


@pytest.mark.parametrize("name", HOSTILE)
def test_every_new_field_may_be_hostile(name: str, plain: Page) -> None:
    hostile = Page(render(_named(name)))
    assert [t for t, _ in hostile.elements] == [t for t, _ in plain.elements]
    assert [sorted(a) for _, a in hostile.elements] == [sorted(a) for _, a in plain.elements]
    assert {t for t, _ in hostile.elements}.isdisjoint({"script", "base", "iframe", "link"})


@pytest.mark.parametrize("name", ["../../etc/passwd", "\udcff/\x00", "=cmd|' /C calc'!A0"])
def test_no_name_leads_a_file_elsewhere(name: str, tmp_path: Path) -> None:
    report = dataclasses.replace(_named(name), kind=name)  # type: ignore[arg-type]
    written = [*write_csv(report, tmp_path / "csv"), *write_png(report, tmp_path / "png")]
    assert len(written) >= 4
    assert all(
        p.parent.parent == tmp_path and re.fullmatch(r"[a-z0-9-]+\.(csv|png)", p.name) for p in written
    )


# Files


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
