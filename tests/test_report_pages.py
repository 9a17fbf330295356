"""The page of every kind of report and of all together: its tables, its order, and how it is shown."""

from __future__ import annotations

import base64
import dataclasses
import re
from pathlib import Path

import pytest
from report_worlds import KINDS, attack, compare, evaluation, match, picture
from test_report import HOSTILE, Page

from latentstore.report import (
    curves,
    exports,
    grids,
    paper,
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


@pytest.mark.parametrize(("limit", "numbers"), [(90_000, True), (60_000, False), (45_000, False)])
def test_a_page_over_its_size_gives_up_numbers_then_plots(
    monkeypatch: pytest.MonkeyPatch, limit: int, *, numbers: bool
) -> None:
    x = [float(i) for i in range(40)]
    drawn = [Curve(f"p{i}", "l", x, [v / 7 for v in x]) for i in range(8)]
    monkeypatch.setattr("latentstore.report.page.PAGE_BYTES", limit)
    html = render(Report("benchmark", "t", [], {}, curves=drawn))
    assert len(html.encode()) < limit
    assert ("<summary>Numbers" in html) == numbers
    left = re.search(r"(\d) further plots are in the results file", html)
    shown = html.count('role="img"')
    assert shown + (int(left[1]) if left else 0) == 8
    assert (shown == 8) == (limit >= 60_000)


def test_plots_are_as_many_as_a_reader_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few_enough in (("PANELS", 3), ("_DOTS", 4), ("_CURVES", 5)):
        monkeypatch.setattr(f"latentstore.report.part.{name}", few_enough)

    def group(name: str, subjects: int) -> list[Figure]:
        return [Figure("mAP", 0.5, f"s{i}", "method", name, "fraction") for i in range(subjects)]

    many = [f for i in range(100) for f in group(f"g{i}", 2)]
    html = render(Report("evaluation", "t", [], {}, figures=many))
    assert html.count('role="img"') == 3
    assert "Every figure of 97 further groups" in html
    few, crowd = (render(Report("evaluation", "t", [], {}, figures=group("g", n))) for n in (4, 5))
    assert (few.count('role="img"'), crowd.count('role="img"')) == (1, 0)
    assert "s4" in crowd
    lines = [Curve(f"p{i}", "l", [1.0, 2.0], [1.0, 2.0]) for i in range(7)]
    html = render(Report("benchmark", "t", [], {}, curves=lines))
    assert html.count('role="img"') == 5
    assert "2 further plots are in the results file" in html


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


# Of each row Σ v and Σ i·v, v in tenths of a percent: typed from the print apart from the rows themselves.
SUMS = {
    "TABLE_3": "2371 5547 2654 6019 2690 5961 2773 6186 2519 6249 3018 7452 1879 4577 3465 8598 3578 8996",
    "TABLE_6": "2701 6445 3298 8180 3465 8598",
    "TABLE_7": "1333 3209 3351 8183 3465 8598",
    "TABLE_8": "13995 104958 13989 104893 13975 104753 13940 104388 13844 103431 13395 98922 "
    "12380 90628 9007 63024 4716 23983 1270 3377",
    "TABLE_10": "7493 53740 7876 54991 7624 51832 7955 54450 8817 66649 10423 78578 6376 48457 "
    "12020 90556 12699 96799",
}


@pytest.mark.parametrize("name", SUMS)
def test_printed_rows_add_up(name: str) -> None:
    told = []
    for row in getattr(paper, name).values():
        values = [round(1000 * v) for pair in row for v in pair]
        told += [sum(values), sum(i * v for i, v in enumerate(values, start=1))]
    assert told == [int(word) for word in SUMS[name].split()]


def test_printed_costs_and_cosines_add_up() -> None:
    costs = [(a or 0) + 1e4 * b + 1e10 * c for a, b, c in paper.TABLE_3_COST.values()]
    assert costs == pytest.approx([5.4, 5.86, 6.04, 7.59, 945.14, 467.77, 5.84, 2.29, 2.29], abs=1e-9)
    digits = [(round(1e6 * cos), round(1e6 * sd)) for _, cos, sd in paper.TABLE_1]
    assert sum(i * cos for i, (cos, _) in enumerate(digits, start=1)) == 20900442
    assert sum(i * sd for i, (_, sd) in enumerate(digits, start=1)) == 577


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
    assert merged.count("and no measure of ours") == 6
    assert merged.count("among 1,000,000 references") == 5  # not of the spectra, which have no queries
    assert merged.count("each model at one strength (SD2 0.9, SDXL 0.8,") == 4
    assert "order of magnitude" not in merged


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


def test_a_narrow_logarithmic_axis_has_several_ticks() -> None:
    for low, high in ((0.3, 0.4), (21.0, 49.0), (1.0, 9.5), (1e-3, 1.0)):
        spectrum = Curve("s", "l", [1.0, 2.0, 3.0], [low, (low + high) / 2, high], y_log=True)
        plot = curves.plots_of(Report("compare", "t", [], {}, curves=[spectrum]))[0]
        axes = curves.draw(plot, PAPER).axes[0]
        assert sum(axes.get_ylim()[0] <= t <= axes.get_ylim()[1] for t in axes.get_yticks()) >= 3


def test_angles_that_are_rounding_are_zero() -> None:
    flat = Curve("principal angles", "l", [1.0, 2.0], [9e-7, 2e-6], "angle", "degrees")
    (plot,) = curves.plots_of(Report("compare", "t", [], {}, curves=[flat]))
    assert plot.lines[0].curve.y == [0.0, 2e-6]
    assert exports.text.value(Figure("median", 9e-7, unit="°")) == "0 °"
    assert exports.text.value(Figure("median", 9e-7)) == "9 × 10⁻⁷"


# Matches


def test_a_verdict_says_what_it_is_worth() -> None:
    text = Page(render(match())).text
    for words in (
        "✓ Match: its origin is very probably here",
        "? Doubtful: its origin may be here",
        "∅ No origin here",
        "0.2 % (p = 0.0021)",
        "False alarms: without an origin here, yet called a match",
        "have their origin first and score high enough to be called doubtful or a match",
        "1.0 % [0.4, 1.9]",
        "92.3 % [90.0, 94.5], of simulated ones",
        "412 pictures",
        "margin to the runner-up 0.21",
        "images/copy-4.jpg and 2 more",
        "Orange places speak for this origin",
        "Colours are relative to the first candidate's",
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
