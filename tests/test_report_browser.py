"""The pages in a real browser: a phone's and a desk's width, every fold open, hostile names, and on paper."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
from typing import Any

import pytest
from report_worlds import KINDS
from test_report import HOSTILE

from latentstore.report import curves, write_html
from latentstore.results import Report

Seen = dict[tuple[str, int], dict[str, Any]]
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --enable-logging=stderr --v=0 --allow-file-access-from-files
--virtual-time-budget=20000 --dump-dom --window-size=1500,1000
"""
WIDTHS = (390, 1400)
PAPER_WIDTH = 700  # A4 less its margins, at 96 pixels an inch
SHOWN = [(name, width) for name in (*KINDS, "merged", "hostile") for width in WIDTHS]
DRIVER = """<!doctype html><body><script>
const out = [];
const wide = (d, w) => [...d.querySelectorAll('body *')].filter(e => {
  const inside = selector => e.parentElement.closest(selector);
  if (inside('svg, .scroll, pre')) return false;
  const r = e.getBoundingClientRect();
  return r.width && (r.right > w + 0.5 || r.left < -0.5);
});
const look = (name, width) => new Promise(done => {
  const frame = document.createElement('iframe');
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const d = frame.contentDocument, root = d.documentElement, shut = [...d.querySelectorAll('details')];
    const visible = shut.map(e => [
      e.className === 'numbers', e.querySelector('table').checkVisibility({contentVisibilityAuto: true})]);
    shut.forEach(e => { e.open = true; });
    const svgs = [...d.querySelectorAll('svg[role=img]')].map(e => e.getBoundingClientRect());
    out.push({name, width, scroll: root.scrollWidth, client: root.clientWidth, high: root.scrollHeight,
      wide: wide(d, root.clientWidth).slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
      svgs: svgs.length, flat: svgs.filter(r => r.width < 100 || r.height < 50).length,
      lost: [...d.images].filter(i => !i.naturalWidth).length, images: d.images.length,
      scripts: d.scripts.length, visible});
    frame.remove();
    done();
  };
  frame.src = name + '.html';
  document.body.append(frame);
});
(async () => {
  for (const [name, width] of JOBS) await look(name, width);
  document.body.textContent = 'measured ' + btoa(unescape(encodeURIComponent(JSON.stringify(out)))) + ' done';
})();
</script>"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What one run of Chromium measured of every page at both widths, all folds open, and its console."""
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is not installed, and in CI the pages must be seen in it.")
        pytest.skip("Chromium is not installed")
    folder = tmp_path_factory.mktemp("pages")
    reports = [make() for make in KINDS.values()]
    for report in reports:
        write_html(report, folder / f"{report.kind}.html")
    write_html(reports, folder / "merged.html")
    write_html([_hostile(r) for r in reports], folder / "hostile.html")
    printed = (
        (folder / "merged.html")
        .read_text(encoding="utf-8")
        .replace("@media print", "@media all")
        .replace("@media screen and", "@media not all and")
    )
    (folder / "print.html").write_text(printed, encoding="utf-8")
    jobs = json.dumps([*SHOWN, ("print", PAPER_WIDTH)])
    (folder / "driver.html").write_text(DRIVER.replace("JOBS", jobs), encoding="utf-8")
    # The frames have the widths; a headless window cannot be made as narrow as a phone everywhere.
    done = subprocess.run(
        [
            chromium,
            *FLAGS.split(),
            f"--user-data-dir={folder / 'profile'}",
            (folder / "driver.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"measured (\S+) done", done.stdout)
    assert found, done.stdout[:500] + done.stderr[-500:]
    told = {(m["name"], m["width"]): m for m in json.loads(base64.b64decode(found[1]))}
    told["console", 0] = {"lines": [line for line in done.stderr.splitlines() if "CONSOLE" in line]}
    return told


def _hostile(report: Report) -> Report:
    """Put every hostile name somewhere where a name stands."""
    figures = [
        dataclasses.replace(f, subject=f.subject + HOSTILE[i % 10], note=HOSTILE[(i + 1) % 10])
        for i, f in enumerate(report.figures)
    ]
    drawn = [dataclasses.replace(c, label=c.label + HOSTILE[i % 10]) for i, c in enumerate(report.curves)]
    found = [
        dataclasses.replace(
            m,
            query=HOSTILE[9 - i],
            candidates=[
                dataclasses.replace(c, path=h, near=HOSTILE)
                for c, h in zip(m.candidates, HOSTILE, strict=False)
            ],
        )
        for i, m in enumerate(report.matches)
    ]
    settings = {**report.settings, **{h: h for h in HOSTILE}}
    return dataclasses.replace(
        report,
        title=HOSTILE[9],
        settings=settings,
        figures=figures,
        curves=drawn,
        matches=found,
        caveats=HOSTILE,
    )


@pytest.mark.parametrize(("name", "width"), [*SHOWN, ("print", PAPER_WIDTH)])
def test_chromium_shows_every_page_whole(seen: Seen, name: str, width: int) -> None:
    page = seen[name, width]
    assert page["wide"] == []  # no element leaves the window, tables that scroll in their own box aside
    assert page["scroll"] <= page["client"] <= width
    assert page["high"] > 600
    assert page["scripts"] == 0
    assert page["lost"] == page["flat"] == 0
    if name in KINDS:
        report = KINDS[name]()
        drawn = len(curves.plots_of(report))
        assert page["svgs"] >= drawn
        assert (page["images"] > 0) == bool(report.matches)


def test_chromium_has_nothing_to_complain_of(seen: Seen) -> None:
    assert seen["console", 0]["lines"] == []


def test_paper_shows_what_the_screen_folds_but_for_the_numbers_of_plots(seen: Seen) -> None:
    screen, printed = seen["merged", 1400]["visible"], seen["print", PAPER_WIDTH]["visible"]
    assert len(screen) == len(printed) > 5
    assert not any(shown for _, shown in screen)
    assert {numbers for numbers, _ in printed} == {False, True}
    assert all(shown != numbers for numbers, shown in printed)
