"""``latentstore report`` as a user runs it: the page, what goes beside it, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from cli_helpers import pair_store, solve
from typer.testing import CliRunner, Result

from cli.app import app
from cli.matching import MatchResult, summary
from latentstore.results import Decision, Figure, Match, Report, Verdict, load


def report(*words: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["report", *map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two solves on real pictures, and of a benchmark."""
    made = tmp_path_factory.mktemp("results")
    store = pair_store(made, 0.5)
    for method in ("svd", "gnull"):
        solve("--store", store, "--rank", 16, "--out", made / f"{method}.safetensors", method=method)
    rate = Figure("rate", 9e4, "=1+1", "method", "gather", "rows/s", (8e4, 1e5), 5)
    Report("benchmark", "How fast", ["Fast."], {}, figures=[rate]).write(made / "speed.json")
    return made


def test_one_file_makes_a_page_and_says_where(folder: Path, tmp_path: Path) -> None:
    results = folder / "svd.results.json"
    done = report(results, "--out", tmp_path / "page.html")
    assert "page.html: 1 report" in done.stdout
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert load(results).title in html
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_several_make_one_page_with_tables_plots_and_one_file(folder: Path, tmp_path: Path) -> None:
    given = [folder / "speed.json", folder / "svd.results.json", folder / "gnull.results.json"]
    beside = ["--csv", tmp_path / "csv", "--png", tmp_path / "png", "--merged", tmp_path / "all.json"]
    told = json.loads(report(*given, given[0], "--out", tmp_path / "a.html", *beside, "--json").stdout)
    assert told["reports"] == ["solve", "solve", "benchmark"]  # a file named twice is read once
    assert told["page_bytes"] == (tmp_path / "a.html").stat().st_size < 5_000_000
    assert told["pictures_left_out"] == 0
    assert all(Path(p).is_file() for p in told["csv"] + told["png"])
    assert {Path(p).suffix for p in told["png"]} == {".png"}
    with (tmp_path / "csv" / "03-benchmark-figures.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["subject"], float(row["value"])) == ("'=1+1", 9e4)
    report(tmp_path / "all.json", "--out", tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_what_cannot_be_is_refused_in_one_paragraph(folder: Path, tmp_path: Path) -> None:
    results, broken = folder / "speed.json", tmp_path / "broken.json"
    before = results.read_bytes()
    broken.write_text("{", encoding="utf-8")
    cases: list[tuple[list[str | Path], int, str]] = [
        (["nothing.json"], 1, "nothing.json is not a readable results file (No such file or directory)"),
        ([broken], 1, "broken.json is not a readable results file"),
        ([tmp_path], 1, "Is a directory"),
        ([results, "--out", results], 2, "one of the results to read"),
        ([results, "--merged", results], 2, "one of the results to read"),
        ([results, "--out", tmp_path / "x", "--merged", tmp_path / "." / "x"], 2, "Name two files"),
        ([results, "--out", tmp_path], 2, "a folder. Name a file"),
        ([results, "--out", tmp_path / "no" / "page.html"], 2, "Make it first"),
        ([results, "--out", tmp_path / "p.html", "--csv", broken], 2, "a file. Name a folder"),
        ([results, "--out", tmp_path / "p.html", "--png", broken], 2, "a file. Name a folder"),
    ]
    for words, code, said in cases:
        done = report(*words, code=code)
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("Error: "), line
        assert said in line
    assert report(code=2).stderr
    assert results.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["broken.json"]
    beside = tmp_path / "sweep.results.json"
    beside.write_bytes(before)
    (tmp_path / "sweep.csv").write_text("method,rank\n", encoding="utf-8")
    assert f"Give {beside}." in report(tmp_path / "sweep.csv", code=1).stderr


def test_the_summary_of_a_match_says_how_many_are_here_and_how_many_were_not_read() -> None:
    decisions: list[Decision] = [*["match"] * 7, *["doubtful"] * 2, "no origin here"]  # type: ignore[list-item]
    matches = [Match("q", "", None, verdict=Verdict(d, 0.5, 0.1, 0.1, (0.0, 0.2))) for d in decisions]
    found = MatchResult(matches, [("a", "why")], "", "", False, "", "")
    (told,) = summary(found, 1234)
    assert told == (
        "10 queries were compared with 1,234 pictures: 7 very probably have their origin here (match), "
        "2 are doubtful, 1 has no origin here. 1 further query could not be read."
    )
