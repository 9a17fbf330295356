"""The report page: complete, inert, self-contained, readable; and the picture for a README."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from latentstore.errors import ResultsError
from latentstore.report import page, render, text
from latentstore.report.plots import summary_png
from latentstore.results import Candidate, Curve, Figure, Match, Report

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>.jpg',
    "'onmouseover='alert(1)' x='.png",
    "invoice\u202egpj.exe",
    "line\none\r\nline two\ttab\x00\x1b[31m",
    "undecodable\udcff.jpg",
    "{{ 7*7 }}{% raw %}${7*7}",
    "</style></title><base href=//evil.example>",
    "תמונה مرحبا 图片 🙂.jpg",
    "w" * 500 + ".jpg",
]
GROUPS = ["JPEG 10", "crop 60 %", "oracle: simulated"]
METHODS = ["svd", "gnull", "analytic", "cosface"]
CONTROLS = ["raw", "centred", "PCA-whitened ¼", "PCA-whitened ½", "random subspace"]
VALUES = [
    [0.7419, 0.8711, 0.8814, 0.8708, 0.8621, 0.8594, 0.8732, 0.8487, 0.3117],
    [0.5602, 0.6388, 0.6531, 0.6412, 0.6204, 0.6187, 0.6402, 0.5911, 0.1523],
    [0.9121, 0.9687, 0.9893, 0.9712, 0.9342, 0.9301, 0.9577, 0.9418, 0.4826],
]


def thumb(colour: tuple[int, int, int], kind: str = "jpeg") -> str:
    image = Image.new("RGB", (96, 96), colour)
    for i in range(96):
        for j in range(96):
            if (i // 12 + j // 12) % 3 == 0:
                image.putpixel((i, j), tuple(255 - c for c in colour))
    raw = io.BytesIO()
    image.save(raw, kind.upper())
    return f"data:image/{kind};base64," + base64.b64encode(raw.getvalue()).decode()


def figures() -> list[Figure]:
    made = []
    for group, row in zip(GROUPS, VALUES, strict=True):
        for subject, value in zip(METHODS + CONTROLS, row, strict=True):
            role = "method" if subject in METHODS else "control"
            note = "Its rank was chosen on validation." if subject == "gnull" else ""
            for name, v in (("mAP", value), ("Acc", value - 0.021)):
                made.append(
                    Figure(
                        name,
                        v,
                        subject,
                        role,
                        group,
                        "fraction",
                        (v - 0.0233, min(1.0, v + 0.0187)),
                        581,
                        note,
                    )
                )
            if role == "method":
                gain = value - max(row[4:])
                made.append(
                    Figure(
                        "gain over best control",
                        gain,
                        subject,
                        role,
                        group,
                        "fraction",
                        (gain - 0.011, gain + 0.012),
                        581,
                    )
                )
        made.append(Figure("mAP", 0.00031, "chance", "chance", group, "fraction"))
        made.append(Figure("Acc", 0.00019, "chance", "chance", group, "fraction"))
    for subject, residual in (("svd", 0.0312), ("gnull", 0.1874), ("random subspace", 0.9871)):
        made.append(
            Figure("held-out residual", residual, subject, n=186, note="‖TW‖ over ‖OW‖ on test pairs.")
        )
    for subject, rank in (("svd", 581), ("gnull", 4096)):
        made.append(Figure("numerical rank of T", rank, subject))
        made.append(Figure("largest singular value", 1234.56, subject))
        made.append(Figure("zero cutoff", 3.17e-7, subject))
    return made


def matches() -> list[Match]:
    colours = [(190, 80, 60), (60, 120, 190), (80, 160, 90), (200, 170, 60), (130, 90, 170), (90, 90, 90)]
    good = Match(
        "suspicious/beach-oil-painting.jpg",
        "JPEG 10",
        0.2134,
        [
            Candidate(f"images/T00{i}.jpg", f"T00{i}", 0.81 - 0.2 * i / 3, i == 0, thumb(colours[i]))
            for i in range(5)
        ],
        thumb((200, 90, 70)),
        rank=1,
    )
    poor = Match(
        HOSTILE[0],
        HOSTILE[1],
        -0.0021,
        [
            Candidate(name, HOSTILE[(i + 3) % len(HOSTILE)], 0.4, i == 3, thumb(colours[i % 6], "png"))
            for i, name in enumerate(HOSTILE)
        ],
        thumb((10, 90, 170)),
        rank=4,
    )
    bare = Match(
        "no-pictures.png", "", None, [Candidate("a.jpg", "a", math.nan), Candidate("b.jpg", "b", 0.1)]
    )
    return [good, poor, bare]


def curves() -> list[Curve]:
    ranks = [64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0]
    made = []
    for label, top, role in (
        ("svd", 0.74, "method"),
        ("gnull", 0.87, "method"),
        ("analytic", 0.88, "method"),
        ("PCA-whitened ¼", 0.873, "control"),
        ("chance", 0.003, "chance"),
    ):
        y = [top * (1 - 0.4 * 0.5**i) for i in range(7)] if role != "chance" else [top] * 7
        band = role == "method"
        made.append(
            Curve(
                "mAP over rank",
                label,
                ranks,
                y,
                "rank m",
                "mAP",
                x_log=True,
                role=role,
                low=[v - 0.02 for v in y] if band else None,
                high=[v + 0.02 for v in y] if band else None,
            )
        )
    for label, slope in (("Σₒ origins", -1.1), ("Σ_t translations $x^2$", -0.7), ("w" * 90, -0.4)):
        x = [float(i) for i in range(1, 400)]
        made.append(
            Curve("Spectra", label, x, [v**slope for v in x], "index", "eigenvalue", x_log=True, y_log=True)
        )
    made.append(Curve("Nothing to draw", "empty", [1.0], [math.nan], x_log=True))
    return made


@pytest.fixture(scope="module")
def report() -> Report:
    return Report(
        kind="evaluation",
        title="Origins of 581 translated photographs, four ways to fit W",
        summary=[
            "With no pairs and nothing tuned, the analytic map reaches 88.1 % on compressed queries.",
            "The literal null space is below plain cosine: where least changes, mostly nothing varies.",
        ],
        data={
            "images": 5385,
            "pairs": 581,
            "origins": 186,
            "encoder": "stabilityai/sd-vae-ft-mse",
            "space_id": "9f2c" * 16,
            "split": {"train": 4308, "validation": 538, "test": 539},
            "hostile": HOSTILE[1],
        },
        settings={
            "rank": 512,
            "ridge": 0.31622776,
            "seed": 20260713,
            "ranks": [64, 128],
            "token": None,
            "fp64": True,
        },
        reproduce=[
            "latentstore encode images --store latents.zarr",
            "latentstore evaluate --json > results.json",
            HOSTILE[0],
        ],
        figures=figures(),
        curves=curves(),
        matches=matches(),
        caveats=[
            "The queries come from three translators. A fourth may be harder.",
            "5,385 distractors are few: with two million, every figure here falls.",
            HOSTILE[7],
        ],
        timings={"encode": 1234.5, "accumulate": 12.31, "solve svd": 3.402, "match": 0.0123, HOSTILE[9]: 1.0},
        machine={"system": "Linux", "machine": "x86_64", "cores": 2, "python": "3.11.7"},
        created="2026-03-05T14:03:00+00:00",
        version="0.1.0",
        commit="0123456789ab",
    )


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return render(report)


class Page(HTMLParser):
    """Every element and attribute, the visible text, and whether the tags nest."""

    VOID = {"meta", "img", "link", "br", "hr", "input", "base"}  # noqa: RUF012

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.rows and {"th", "td"} & set(self.open):
            self.rows[-1][-1:] = ["".join(self.rows[-1][-1:]) + data]

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


@pytest.fixture(scope="module")
def parsed(html: str) -> Page:
    return Page(html)


def test_page_is_whole_and_has_its_sections_in_order(parsed: Page) -> None:
    assert parsed.open == []
    ids = [a["id"] for tag, a in parsed.elements if tag == "section" and "id" in a]
    assert ids == ["found", "caveats", "matches", "curves", "details", "timings", "settings", "reproduce"]
    assert "5 March 2026, 14:03 UTC" in parsed.text


def test_page_asks_for_nothing_from_anywhere(html: str, parsed: Page) -> None:
    tags = {tag for tag, _ in parsed.elements}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "foreignobject"})
    policy = [a["content"] for t, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value is not None
                assert value.startswith(("data:image/", "#")), (tag, value[:60])
            assert not re.search(r"url\((?!#)", value or ""), (tag, value)
    outside = re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"', "", html)
    assert not re.search(r"https?:|@import|@font-face", outside)
    assert len(html.encode()) < 5_000_000


def test_hostile_text_is_shown_and_inert(html: str, parsed: Page) -> None:
    for raw in HOSTILE[:3] + HOSTILE[7:8]:
        assert raw not in html
        assert raw in parsed.text
    assert "⟨U+202E⟩" in parsed.text
    assert "⟨U+DCFF⟩" in parsed.text
    assert "⟨U+0000⟩⟨U+001B⟩[31m" in parsed.text
    assert "{{ 7*7 }}" in parsed.text
    assert not any(
        "alert" in (v or "")
        for t, a in parsed.elements
        for k, v in a.items()
        if k not in ("alt", "aria-label")
    )
    assert set(html).isdisjoint("\x00\x1b\r\u202e\udcff")


@pytest.mark.parametrize("name", HOSTILE)
def test_any_field_may_be_hostile(name: str) -> None:
    short = [1.0, 2.0]
    hostile = Report(
        kind="evaluation",
        title=name,
        summary=[name],
        data={name: {name: [name]}},
        settings={name: name},
        reproduce=[name],
        figures=[
            Figure("mAP", 0.5, name, "method", name, "fraction", note=name),
            Figure("gain " + name, 0.1, name, "method", name, "fraction", note=name),
            Figure(name, 0.4, name, "control", name, name),
            Figure(name, 0.4, name, "note", name, name, note=name),
        ],
        curves=[Curve(name, name, short, short, name, name)],
        matches=[Match(name, name, 0.1, [Candidate(name, name, 0.5, True, name)], name)],
        caveats=[name],
        timings={name: 1.0},
        machine={name: name},
        created=name,
        version=name,
        commit=name,
    )
    whole = Page(render(hostile))
    plain = Page(render(_renamed(hostile, name, "plain")))
    assert [t for t, _ in whole.elements] == [t for t, _ in plain.elements]
    assert [sorted(a) for _, a in whole.elements] == [sorted(a) for _, a in plain.elements]


def _renamed(report: Report, old: str, new: str) -> Report:
    """Return the report with a name exchanged everywhere, keys included."""

    def walk(item: object) -> object:
        if isinstance(item, str):
            return item.replace(old, new)
        if isinstance(item, dict):
            return {walk(k): walk(v) for k, v in item.items()}
        if isinstance(item, list):
            return [walk(v) for v in item]
        if isinstance(item, Figure | Curve | Match | Candidate):
            return type(item)(**{f.name: walk(getattr(item, f.name)) for f in dataclasses.fields(item)})
        return item

    return Report(**{f.name: walk(getattr(report, f.name)) for f in dataclasses.fields(report)})  # type: ignore[arg-type]


def test_every_figure_is_shown_with_its_interval_and_note(report: Report, parsed: Page) -> None:
    for figure in report.figures:
        first = figure.subject if figure.role != "note" else figure.name
        rows = [
            " ".join(" ".join(row).split()) for row in parsed.rows if row and row[0].strip().startswith(first)
        ]
        assert any(text.value(figure) in row and text.interval(figure) in row for row in rows), figure
        assert figure.note in parsed.text


def test_every_retrieval_table_holds_methods_then_controls_then_chance(parsed: Page) -> None:
    labels = [row[0].strip() for row in parsed.rows]
    wanted = [*METHODS, *(f"{c} control" for c in CONTROLS), "chance"]
    starts = [i for i, label in enumerate(labels) if label == "Method or control"]
    assert len(starts) == len(GROUPS)
    for start in starts:
        assert labels[start + 1 : start + 1 + len(wanted)] == wanted


def test_simulated_queries_come_last_and_say_so(parsed: Page) -> None:
    assert parsed.text.index("oracle: simulated 98.9 %") > parsed.text.index("crop 60 % 65.3 %")
    assert "not how it does on real pictures" in parsed.text


def test_a_gain_whose_interval_holds_zero_is_not_called_a_gain(parsed: Page) -> None:
    assert "+0.8 points [−0.3, 2.0]: the interval holds zero, so no difference is shown" in parsed.text


def test_a_method_without_controls_is_called_out(report: Report) -> None:
    alone = dataclasses.replace(report, figures=[f for f in report.figures if f.role == "method"])
    assert "No control was measured on these queries" in Page(render(alone)).text


def test_the_method_that_was_chosen_is_headlined_though_another_is_higher(report: Report) -> None:
    free = Page(render(report)).text
    assert "mAP of analytic, the highest of 4 methods by these very queries" in free
    assert VALUES[0][1] < VALUES[0][2]  # gnull is not the highest
    chosen = dataclasses.replace(report, settings={"method chosen on validation": "gnull"})
    told = Page(render(chosen)).text
    assert "mAP of gnull, chosen on validation among 4 methods" in told
    assert "the highest of" not in told


def test_same_report_same_page(report: Report, html: str) -> None:
    assert render(report) == html


def test_ids_are_unique_and_references_resolve(html: str, parsed: Page) -> None:
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", html)) | set(re.findall(r'href="#([^"]+)"', html))
    assert used
    assert used <= set(ids)


def test_plots_keep_text_and_take_their_colours_from_the_page(html: str, parsed: Page) -> None:
    drawings = re.findall(r"<svg [^>]*role=\"img\".*?</svg>", html, re.DOTALL)
    assert len(drawings) == len(GROUPS) + 2
    for drawing in drawings:
        assert "<text" in drawing
        assert "var(--ink)" in drawing
        assert not re.search(r"#[0-9a-f]{6}\b", drawing)
    assert "Σ_t translations $x^2$" in parsed.text


@pytest.mark.parametrize(
    "bad",
    [
        "https://example.org/a.jpg",
        "javascript:alert(1)",
        "data:text/html;base64,PHNjcmlwdD4=",
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:image/jpeg;base64,",
        "data:image/jpeg;base64,not base64!",
        'data:image/jpeg;base64,/9j/" onerror="alert(1)',
        "data:image/png;base64,PHNjcmlwdD4=",
        "DATA:image/jpeg;base64,/9j/",
        "\udcff",
    ],
)
def test_anything_but_a_jpeg_or_png_becomes_a_placeholder(report: Report, bad: str) -> None:
    match = Match("q.jpg", "", None, [Candidate("c.jpg", "c", 0.5, None, bad)], bad)
    shown = Page(render(dataclasses.replace(report, matches=[match], curves=[], figures=[])))
    assert not [t for t, _ in shown.elements if t == "img"]
    assert shown.text.count("no picture") == 2


def test_pictures_have_words_and_marks_do_not_rest_on_colour(parsed: Page) -> None:
    pictures = [a for t, a in parsed.elements if t == "img"]
    assert len(pictures) == 6 + 11
    assert all(a.get("alt") for a in pictures)
    for words in (
        "✓ Origin ranked first",
        "✗ Origin ranked 4, not first",
        "✓ correct",
        "✗ wrong",
        "? Origin not known",
    ):
        assert words in parsed.text


def test_page_stays_small_whatever_the_gallery(report: Report) -> None:
    heavy = "data:image/jpeg;base64," + base64.b64encode(b"\xff\xd8\xff" + bytes(300_000)).decode()
    crowd = [Match(f"q{i}", "", None, [Candidate("c", "c", 0.1, thumbnail=heavy)], heavy) for i in range(300)]
    html = render(dataclasses.replace(report, matches=crowd))
    assert len(html.encode()) < 5_000_000
    assert "200 further matches are in the results file." in html


@pytest.mark.parametrize("kind", ["solve", "theory", "benchmark"])
def test_a_bare_report_has_only_what_it_holds(kind: str) -> None:
    bare = Page(render(Report(kind=kind, title="T", summary=[], data={})))  # type: ignore[arg-type]
    assert not [t for t, _ in bare.elements if t in ("section", "svg", "table")]
    speed = Figure("throughput", 12345.6, "preadv", "method", "gather", "rows/s", (12000.0, 12700.0), 5)
    some = Page(render(Report(kind=kind, title="T", summary=[], data={}, figures=[speed])))  # type: ignore[arg-type]
    assert "12,345.6 rows/s [12,000, 12,700]" in some.text


@pytest.mark.parametrize(
    ("figure", "shown", "interval"),
    [
        (Figure("mAP", 0.87398, unit="fraction", interval=(0.851, 0.8974)), "87.4 %", "[85.1, 89.7]"),
        (Figure("mAP", 0.00031, unit="fraction"), "0.031 %", ""),
        (Figure("gain", -0.0234, unit="fraction", interval=(-0.05, 0.001)), "−2.3 points", "[−5.0, 0.1]"),
        (Figure("mAP", 0.0004, unit="fraction", interval=(0.0, 0.00071)), "0.04 %", "[0.0, 0.071]"),
        (Figure("gain", 1e-18, unit="fraction", interval=(-1e-18, 0.0)), "+0.0 points", "[0.0, 0.0]"),
        (Figure("cos φ", 0.999999), "0.999999", ""),
        (Figure("rank", 4096.0), "4,096", ""),
        (Figure("zero", 3.17e-7), "3.17 × 10⁻⁷", ""),
        (Figure("seconds", 1.5, unit="s"), "1.5 s", ""),
        (Figure("lost", math.nan), "not finite", ""),
    ],
)
def test_numbers_read_as_people_write_them(figure: Figure, shown: str, interval: str) -> None:
    assert text.value(figure) == shown
    assert text.interval(figure) == interval


def test_colours_are_legible_in_both_modes() -> None:
    css = (Path(page.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    assert "object-fit: contain" in css  # a wide picture and its heat map are seen to their ends
    modes = [dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", block)) for block in css.split("@media")[:2]]
    for mode in modes:
        for ground in ("page", "ground", "soft"):
            for name in ("ink", "muted", "accent", "right", "wrong"):
                assert contrast(mode[name], mode[ground]) >= 4.5, (name, ground)
            for name in ("control", *(f"m{i}" for i in range(1, 7))):
                assert contrast(mode[name], mode[ground]) >= 3, (name, ground)


def contrast(one: str, other: str) -> float:
    """Return the WCAG 2 contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_summary_picture(report: Report, tmp_path: Path) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        summary_png(report, path)
    with Image.open(paths[0]) as image:
        assert image.size == (1400, 700)
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(ResultsError, match="holds no mAP"):
        summary_png(dataclasses.replace(report, figures=[]), tmp_path / "none.png")


def test_import_is_light_and_rendering_never_loads_the_heavy_ones() -> None:
    code = (
        "import sys, latentstore.report as r\n"
        "heavy = {'torch', 'faiss', 'dask', 'diffusers'}\n"
        "assert not {'matplotlib', 'jinja2', *heavy} & set(sys.modules)\n"
        "from latentstore.results import Figure, Report\n"
        "f = Figure('mAP', 0.5, 'svd', 'method', 'JPEG 10', 'fraction')\n"
        "assert '50.0 %' in r.render(Report('demo', 't', [], {}, figures=[f]))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
        "assert not heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
