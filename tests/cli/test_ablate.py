"""ablate: every variant by one recipe, seen and unseen models apart, beside controls."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import pair_store, picture
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from cli import ablating
from cli.ablation_tables import SEEN, UNSEEN
from cli.app import app
from cli.workflows import run_encode
from latentstore import results


def invoke(*words: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_store(tmp_path_factory.mktemp("ablate"), 0.5)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test pictures by a second model, which blurs and blends."""
    folder = tmp_path_factory.mktemp("others")
    lines = ["path,identity,role,split,model"]
    for i in range(72, 108):
        own = picture(i, 32)
        own.save(folder / f"{i}.png")
        blurred = own.filter(ImageFilter.GaussianBlur(3))
        Image.blend(blurred, picture(20_000 + i, 32), 0.4).save(folder / f"{i}b.png")
        lines += [f"{i}.png,{i},origin,test,", f"{i}b.png,{i},translation,test,B"]
    listed = folder / "list.csv"
    listed.write_text("\n".join(lines) + "\n")
    run_encode(folder, folder / "others.zarr", manifest=listed, encoder="patch", image_size=32)
    return folder / "others.zarr"


@pytest.fixture(scope="module")
def made(store: Path, others: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    words = ["--store", store, "--queries", others, "--rank", 16, "--ranks", "4,16", "--layers", "1,2"]
    files = ["--out", folder / "a.json", "--csv", folder / "a.csv", "--plot", folder / "a.png"]
    (folder / "said.txt").write_text(invoke("ablate", *words, "--steps", 20, *files))
    return folder


def test_every_table_has_its_variants_seen_and_unseen_beside_controls(made: Path) -> None:
    with (made / "a.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    variants = {
        "losses": ["cosface", "softmax", "circle"],
        "transformations": ["linear", "convolution", "attention"],
        "layers": ["1", "2"],
        "ranks": ["4", "16"],
    }
    for group in (SEEN, UNSEEN):
        for table, names in variants.items():
            here = [r for r in rows if (r["table"], r["group"]) == (table, group)]
            assert [r["variant"] for r in here] == names
            assert sum(r["chosen"] == "True" for r in here) >= 1
            best = max(float(r["validation"]) for r in here)
            assert all((r["chosen"] == "True") == (float(r["validation"]) == best) for r in here)
    # One recipe is one run, in whatever table it stands.
    own = {(r["table"], r["variant"], r["group"]): r for r in rows}
    for group in (SEEN, UNSEEN):
        same = [("losses", "cosface"), ("transformations", "linear"), ("layers", "1"), ("ranks", "16")]
        assert len({own[*key, group]["mAP"] for key in same}) == 1
        assert own["layers", "2", group]["parameters"] == str(64 * 16 + 16 * 16)
    report = results.load(made / "a.json")
    for group in (SEEN, UNSEEN):
        assert {"raw", "centred", "random subspace"} <= {f.subject for f in report.find("mAP", group=group)}
    raw = report.find("mAP", subject="raw", group=SEEN)[0]
    assert raw.interval is not None
    assert raw.interval[0] <= raw.value <= raw.interval[1]
    assert "the paper has 88.8" in report.find("mAP", subject="cosface, linear @16", group=SEEN)[0].note
    assert {c.plot for c in report.curves} == {"MLP layers (Figure 9)", "Rank of W (Figure 8)"}
    assert (made / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_gap_is_the_difference_of_what_is_printed(made: Path) -> None:
    report = results.load(made / "a.json")
    gaps = {f.subject: f for f in report.find("seen less unseen mAP")}
    assert len(gaps) == 7  # runs, of ten variants
    for subject, gap in gaps.items():
        seen, unseen = (report.find("mAP", subject=subject, group=g)[0].value for g in (SEEN, UNSEEN))
        assert gap.value == pytest.approx(seen - unseen, abs=1e-12)
        assert gap.interval is not None  # the same photos were asked for
        assert gap.interval[0] <= gap.value <= gap.interval[1]
    text = (made / "said.txt").read_text()
    assert "gap" in text
    assert "Controls" in text


def test_without_other_models_it_says_that_nothing_is_known_of_them(store: Path) -> None:
    text = invoke("ablate", "--store", store, "--what", "losses", "--rank", 8, "--steps", 3)
    assert "nothing is said of unseen models" in text
    assert "MLP layers" not in text
    assert " gap" not in text.partition("Note")[0]


def test_a_head_measures_like_the_projection_of_its_w(store: Path) -> None:
    options = ablating.AblateOptions(what=("transformations",), rank=8, steps=3)
    collection = ablating.Collection.open(store)
    cfg = ablating._plan(collection, options)["transformations", "linear"]
    result = ablating._run(collection, cfg, None, None)
    W = ablating._map(collection, cfg, result, None)
    head = ablating.HeadMap(result, cfg, dim=64, space_id=W.space_id, used_identities=W.used_identities)
    rows = collection.read(np.arange(20))
    # Sums of 64 products, in another order perhaps.
    assert np.abs(head.queries(rows) - W.queries(rows)).max() < 64 * np.finfo(np.float32).eps
    with pytest.raises(Exception, match="space"):
        head.check_space("another")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--what", "loss"], 2, "loss"),
        (["--layers", "0,9"], 2, "--layers"),
        (["--rank", "65"], 2, "65"),
        (["--ranks", "a"], 2, "--ranks"),
        (["--plot", "nowhere/a.png"], 2, "--plot"),
        (["--csv", "nowhere/a.csv"], 2, "nowhere"),
        (["--queries", "none.zarr"], 2, "none.zarr"),
        (["--budget", "nan"], 2, "--budget is nan"),
        (["--budget", "0"], 2, "--budget is 0"),
        (["--csv", "no/a.csv"], 2, "--csv is no/a.csv"),
        (["--plot", "a.jpg"], 2, "PNG"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    store: Path, words: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablating, "_run", lambda *a: pytest.fail("trained"))
    assert said in invoke("ablate", "--store", store, *words, code=code)


def test_a_variant_that_fails_or_is_stopped_costs_the_others_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = ablating._run

    def stopped(collection: object, cfg: ablating.CosFace, *rest: object) -> object:
        if cfg.loss == "softmax":
            raise KeyboardInterrupt
        return whole(collection, cfg, *rest)

    monkeypatch.setattr(ablating, "_run", stopped)
    words = ["--store", store, "--what", "losses", "--rank", 8, "--steps", 5, "--out", tmp_path / "a.json"]
    said = " ".join(invoke("ablate", *words).split())
    assert "Left out: softmax" in said
    assert "Left out: circle" in said
    report = results.load(tmp_path / "a.json")
    assert {f.subject for f in report.figures if f.name == "mAP" and f.role == "method"} == {
        "cosface, linear @8"
    }


def test_a_store_without_training_pairs_is_refused(tmp_path: Path) -> None:
    bare = pair_store(tmp_path, 0.5, splits=("test",))
    assert "has none" in " ".join(invoke("ablate", "--store", bare, code=1).split())
