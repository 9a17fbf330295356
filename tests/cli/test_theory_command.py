"""theory, as a user runs it: every statement beside a control and a case where it fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import picture
from PIL import Image
from typer.testing import CliRunner

from cli.app import app
from cli.theory import MISSED, OTHER, OWN, UNSEEN
from cli.theory_lemma import CONV, DEVIATION, EMBED, GAP, ROUND_TRIP, one_thread, vae_figures
from latentstore.results import Figure, Report, load

CONTROLS = ("svd, fitted on wrong pairs", "random subspace", "untrained W", "all directions (m = d)")


def ran(command: str, *words: str, code: int = 0) -> str:
    """What a command prints: its answer, or its one paragraph."""
    done = CliRunner().invoke(app, [command, *words])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Report]:
    out = tmp_path_factory.mktemp("planted") / "theory.json"
    return ran("theory", "--out", str(out)), load(out)


def residuals(report: Report, group: str, subject: str) -> tuple[float, ...]:
    values = {f.name: f.value for f in report.figures if (f.group, f.subject) == (group, subject)}
    return tuple(values[name] for name in (OWN, UNSEEN, OTHER))


def test_without_a_store_lemma_1_and_planted_pairs_are_checked(planted: tuple[str, Report]) -> None:
    text, report = planted
    assert report.kind == "theory"
    assert report.data == {}
    assert "planted pairs alone" in report.summary[-1]
    held = [f for f in report.find(DEVIATION) if f.role == "method"]
    # Three sides, five noise levels, three models; each deviation is some float64 roundings.
    assert len(held) == 3 * 5 * 3
    assert max(f.value for f in held) < 1e-14
    misread = report.find(DEVIATION, subject="ε_θ misread")
    assert min(f.value for f in misread) > 0.05
    one_step = report.find(GAP, subject="1 step")
    assert max(f.value for f in one_step) < 1e-14
    assert min(f.value for f in report.find(GAP) if f.role == "method") > 0.01
    trained, untrained = (f.value for f in report.find(ROUND_TRIP))
    assert trained < 0.1 < 0.5 < untrained
    assert "one step" in text
    assert "Slips of the print" in text
    assert "Table 4 was not taken" in text
    assert "wrong pairs held-out translations move less than through a random subspace (planted: both" in text


def test_the_theorems_hold_where_planted_and_fail_beside_it(planted: tuple[str, Report]) -> None:
    _, report = planted
    shared, apart, none = dict.fromkeys(f.group for f in report.find(OWN))
    assert max(residuals(report, shared, "svd")) < 1e-13
    assert residuals(report, apart, "svd")[1] < 1e-13 < 0.3 < residuals(report, apart, "svd")[2]
    assert residuals(report, none, "svd")[0] < 1e-13 < 0.7 < residuals(report, none, "svd")[1]
    for group in (shared, apart, none):
        roles = {f.subject: f.role for f in report.figures if f.group == group and f.name == UNSEEN}
        assert {s for s, role in roles.items() if role == "control"} == set(CONTROLS)
        assert min(residuals(report, group, s)[1] for s in CONTROLS) > 0.2
    missed = {f.group: f.value for f in report.find(MISSED) if f.role == "method"}
    assert missed[shared] < 1e-12 < 0.3 < missed[apart]


def test_every_slip_has_its_two_numbers_and_its_sentence(planted: tuple[str, Report]) -> None:
    _, report = planted
    found = {f.group: f.value for f in report.figures if f.subject == "as found"}
    printed = {f.group: f.value for f in report.figures if f.subject == "as printed"}
    assert found.keys() == printed.keys()
    assert (printed["Lemma 2"], found["Lemma 2"]) == (8, 38)
    for where in (*found, "Lemma 1, Eq. 11"):
        assert any(c.startswith(f"{where}: ") for c in report.caveats), where


def test_a_run_is_repeated_exactly(planted: tuple[str, Report]) -> None:
    _, report = planted
    again = json.loads(ran("theory", "--json"))
    values = [f.value for f in report.figures]
    # Threads may add in another order; nothing is drawn anew.
    assert [f["value"] for f in again["figures"]] == pytest.approx(values, rel=1e-5, abs=1e-13)


def test_a_store_of_one_model_gets_a_second_one_and_says_so(here: Path) -> None:
    ran("encode", "images", "--encoder=patch", "--image-size=32")
    ran("simulate", "--out", "pairs.zarr", "--per-origin", "4")
    text = ran(
        "theory", "--store", "pairs.zarr", "--rank", "16", "--out", "theory.json", "--images", "images"
    )
    report = load(here / "theory.json")
    (group,) = (g for g in dict.fromkeys(f.group for f in report.find(OWN)) if g.startswith("pairs.zarr"))
    assert report.data["second model"].startswith("analytic diffusion, alpha_bar 0.5")
    assert any(c.startswith("The store holds translations of one model") for c in report.caveats)
    assert report.data["dim"] == 64 < report.data["fitted pairs"]
    # More pairs than dimensions: no null space is given away, and where translation moves least, origins vary
    # least as well. The report compares, and says so.
    ours, random = residuals(report, group, "svd"), residuals(report, group, "random subspace")
    assert min(ours) > 0.1
    assert ("no better than a subspace that knows nothing" in report.summary[2]) == (ours[1] >= random[1])
    assert f"16 of {report.data['dim']} columns" in report.summary[2]
    assert "arithmetic" not in report.summary[2]
    assert f"  {group}" in text
    assert "readable pictures of images" in text


def test_two_models_of_a_store_are_taken_as_they_are(here: Path) -> None:
    lines = ["path,identity,role,model\n"]
    for i in range(60):
        noise = np.random.default_rng(i).normal(0, 12, (64, 64, 3))
        noisy = np.clip(np.asarray(picture(i, 64)) + noise, 0, 255).astype(np.uint8)
        made = {"": picture(i, 64), "noise": Image.fromarray(noisy), "shift": picture(i, 64).rotate(2)}
        for model, image in made.items():
            name = f"{i}{model}.png"
            image.save(name)
            role = "translation" if model else "origin"
            lines.append(f"{name},{i},{role},{model}\n")
    Path("list.csv").write_text("".join(lines))
    ran("encode", "--manifest", "list.csv", "--encoder=patch", "--image-size=64", "--store", "pairs.zarr")
    report = json.loads(ran("theory", "--store", "pairs.zarr", "--json"))
    assert (report["data"]["first model"], report["data"]["second model"]) == ("noise", "shift")
    assert not any("simulated in memory" in c for c in report["caveats"])
    # Fewer pairs than the 256 dimensions: the fitted zero is arithmetic, and wrong pairs reach it, too.
    own = {
        f["subject"]: f["value"] for f in report["figures"] if f["name"] == OWN and "pairs.zarr" in f["group"]
    }
    assert max(own["svd"], own["svd, fitted on wrong pairs"]) < 1e-12 < 0.01 < own["random subspace"]
    assert "is arithmetic" in report["summary"][2]


def test_table_4_for_two_autoencoders_and_another_seed(here: Path, planted: tuple[str, Report]) -> None:
    import diffusers
    import torch

    for seed in (0, 1):
        torch.manual_seed(seed)
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            layers_per_block=1,
        ).save_pretrained(f"vae{seed}")

    def values(figures: list[Figure]) -> dict[tuple[str, str], float]:
        return {(f.name, f.role): f.value for f in figures if f.group == "Table 4"}

    with one_thread(True):
        same, _ = vae_figures(("vae0", "vae0"), Path("images"), 64, "cpu", 0)
        words = ("--vae", "vae0", "--vae", "vae1", "--images", "images", "--image-size", "64", "--seed", "1")
        text = ran("theory", *words, "--device", "cpu", "--out", "theory.json")
    report = load(here / "theory.json")
    apart = values(report.figures)
    for name in (CONV, EMBED):
        assert values(same)[name, "method"] == pytest.approx(1, abs=1e-12)
        assert abs(apart[name, "method"]) < 0.9
        assert abs(apart[name, "control"]) < 0.95  # the same code, turned: a low cosine as well
    assert any("A low cosine does not show" in c for c in report.caveats)
    assert "Table 4, two autoencoders" in text
    assert "vae0 × vae1" in text
    drawn = [[f.value for f in r.find(UNSEEN, subject="random subspace")] for r in (report, planted[1])]
    assert drawn[0] != pytest.approx(drawn[1], rel=1e-3)


def test_pairs_of_one_origin_are_refused(here: Path) -> None:
    for name in "abc":
        picture(ord(name), 32).save(f"{name}.png")
    Path("list.csv").write_text(
        "path,identity,role,split\na.png,a,origin,train\nb.png,b,origin,train\nc.png,a,translation,train\n"
    )
    ran("encode", "--manifest", "list.csv", "--encoder=patch", "--image-size=32", "--store", "one.zarr")
    text = ran("theory", "--store", "one.zarr", code=1)
    assert "holds 1 training pair of one origin" in text
    assert "at least two origins" in text


def test_what_cannot_be_checked_is_refused(here: Path) -> None:
    ran("encode", "images", "--encoder=patch", "--image-size=32")
    text = ran("theory", "--store", "latents.zarr", code=1)
    assert "holds 0 pairs" in text
    assert "latentstore simulate --store latents.zarr" in text
    assert "There is no" in ran("theory", "--store", "nowhere.zarr", code=2)
    assert "add --store" in ran("theory", "--rank", "8", code=2).lower()
    ran("simulate", "--out", "pairs.zarr")
    assert "dimension 64, not 65" in ran("theory", "--store", "pairs.zarr", "--rank", "65", code=2)
    assert "--vae was given 1 time." in ran("theory", "--vae", "images", code=2)
    assert "There is no pipeline folder nowhere" in ran("theory", "--pipeline", "nowhere", code=2)
    Path("broken").mkdir()
    Path("broken/a.jpg").write_bytes(b"no picture")
    assert "None of the pictures in broken can be read (a.jpg: " in ran(
        "theory", "--images", "broken", code=2
    )
    assert "no folder" in ran("theory", "--out", "nowhere/theory.json", code=2)
