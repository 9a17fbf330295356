"""compare, as a user runs it: the control comes first, and what cannot be compared is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import picture
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from cli.app import app
from cli.collection import Collection
from cli.likeness import cosine, gap
from cli.refitting import jackknife_error
from latentstore.report.plots import PAPER
from latentstore.results import load
from latentstore.store import open_store
from solvers.closed import GeneralisedNull, PairData
from solvers.projection import Projection
from solvers.spectra import cos_phi

D, M = 128, 16


def said(*words: str, code: int = 0) -> str:
    """What a command prints: its answer, or its one paragraph."""
    done = CliRunner().invoke(app, ["compare", *words])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout if code == 0 else done.stderr


def save(name: str, W: np.ndarray, space: str = "one") -> str:
    Projection(W, W, space_id=space, method="test").save(name)
    return name


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    q = [np.linalg.qr(rng.standard_normal((D, M)))[0] for _ in range(3)]
    maps = {"q1": q[0], "q2": q[1], "steep": q[2] * np.geomspace(1, 40, M)}
    maps |= {"g1": rng.standard_normal((D, M)), "g2": rng.standard_normal((D, M))}
    return {name: save(f"{name}.safetensors", W) for name, W in maps.items()}


def test_the_control_is_said_first_and_stands_beside_every_pair(
    files: dict[str, str], tmp_path: Path
) -> None:
    text = said(*files.values(), "--out", "compare.json")
    assert text.startswith("cos φ of two sorted spectra does not tell a trained W from a random one, unless")
    report = load(tmp_path / "compare.json")
    assert report.kind == "compare"
    assert report.summary[0].startswith("cos φ of two sorted spectra does not tell")
    verdict = {f.group: f for f in report.find("cos φ") if f.role == "method"}
    assert len(verdict) == 10
    assert verdict["q1 × q2"].note.startswith("1 by construction")
    assert verdict["g1 × g2"].note.startswith("inside the random band")
    assert verdict["steep × g1"].note.startswith("below the random band")
    assert "one of the two has orthonormal columns" in verdict["q1 × g1"].note
    for group, figure in verdict.items():
        (band,) = (f for f in report.find("cos φ", group=group) if f.role == "control")
        assert band.interval is not None
        assert band.interval[0] < band.value < band.interval[1]
        assert figure.interval is None  # a file is one fit: no ± of its own
    # "Of 10, 1 is by construction": the rest is outside but the Gaussian pair.
    assert report.summary[1].startswith("Of 10 comparisons: 8 outside the random band, 1 inside, 1 at 1 ")
    assert {c.plot for c in report.curves} == {"spectrum", "principal angles"}
    assert [c.label for c in report.curves if c.role == "control"] == [f"Gaussian {D} × {M}"]


def test_values_are_those_of_numpy(files: dict[str, str]) -> None:
    report = json.loads(said(files["g1"], files["steep"], "--json"))
    a, b = (Projection.load(files[n]).query_map.astype(float) for n in ("g1", "steep"))
    spectra = [np.linalg.svd(W, compute_uv=False) for W in (a, b)]
    value = {(f["name"], f["role"]): f["value"] for f in report["figures"]}
    assert value["cos φ", "method"] == pytest.approx(cos_phi(*spectra), rel=1e-12)
    overlap = np.linalg.norm(np.linalg.qr(a)[0].T @ np.linalg.qr(b)[0]) ** 2 / M
    assert value["overlap", "method"] == pytest.approx(overlap, rel=1e-10)
    assert value["overlap", "control"] == M / D
    assert value["principal angle, smallest", "note"] <= value["principal angle, median", "note"] <= 90


def test_a_map_with_itself_and_names_that_collide(files: dict[str, str]) -> None:
    report = json.loads(said(files["g1"], files["g1"], "--json"))
    assert list(report["data"]["maps"]) == ["g1.safetensors", "g1.safetensors (file 2)"]
    value = {(f["name"], f["role"]): f["value"] for f in report["figures"]}
    assert value["cos φ", "method"] == pytest.approx(1.0, abs=1e-15)
    assert value["principal angle, largest", "note"] < 1e-4  # degrees
    narrow = save("narrow.safetensors", np.random.default_rng(1).standard_normal((D, M // 2)))
    assert "the 8 largest singular values of each" in said(files["g1"], narrow)


def test_what_cannot_be_compared_is_refused(files: dict[str, str]) -> None:
    q1 = files["q1"]
    assert "at least two projections and was given 1" in said(q1, code=2)
    assert "was given 0" in said(code=2)
    short = save("short.safetensors", np.eye(64)[:, :4])
    text = said(q1, short, code=2)
    assert "128 values" in text
    assert "of 64" in text
    other = save("other.safetensors", np.eye(D)[:, :4], space="two")
    assert "space one, other of two" in said(q1, other, code=1)
    Path("broken.safetensors").write_bytes(b"no such thing")
    assert "broken.safetensors" in said(q1, "broken.safetensors", code=1)
    assert "nowhere.safetensors" in said(q1, "nowhere.safetensors", code=2)
    assert "no store" in said(q1, files["q2"], "--repeats", "3", code=2)
    # A map of unknown space is compared, and that is said.
    unknown = save("unknown.safetensors", np.eye(D)[:, :4], space="")
    assert "The space of unknown is unknown" in said(q1, unknown)


@pytest.fixture
def pairs(here: Path) -> str:
    """Originals with translations by two models: one blurs, one adds noise."""
    lines = ["path,identity,role,model\n"]
    for i in range(60):
        original, rng = picture(i, 64), np.random.default_rng(1000 + i)
        noise = rng.normal(0, 15, (64, 64, 3))
        made = {
            "": original,
            "blur": original.filter(ImageFilter.GaussianBlur(3 + i % 4)),
            "noise": Image.fromarray(np.clip(np.asarray(original) + noise, 0, 255).astype(np.uint8)),
        }
        for model, image in made.items():
            image.save(here / f"{i}{model}.png")
            lines.append(f"{i}{model}.png,{i},{'translation' if model else 'origin'},{model}\n")
    (here / "list.csv").write_text("".join(lines))
    done = CliRunner().invoke(
        app,
        ["encode", "--manifest", "list.csv", "--store", "pairs.zarr", "--encoder=patch", "--image-size=32"],
    )
    assert done.exit_code == 0, done.output
    return "pairs.zarr"


def test_models_of_a_store_are_refitted_on_resampled_identities(pairs: str) -> None:
    words = ["--store", pairs, "--rank", "8", "--repeats", "4", "--json"]
    text = said(*words)
    report = json.loads(text)
    groups = ["blur × its resamples", "blur × noise, resampled", "noise × its resamples"]
    fits = [f for f in report["figures"] if f["name"] == "cos φ" and f["role"] == "method"]
    spread = [f for f in report["figures"] if f["name"].startswith("cos φ, standard deviation")]
    assert [f["group"] for f in fits] == [f["group"] for f in spread] == groups
    assert all(f["n"] == 4 for f in fits)
    assert all(0 < f["value"] < 0.2 for f in spread)
    assert any("bootstrap resamples" in c and "not a standard error" in c for c in report["caveats"])
    # Seeded: the same again, and others with another seed.
    again = json.loads(said(*words))
    other = json.loads(said(*words, "--seed", "1"))
    assert again["figures"] == report["figures"] != other["figures"]


def test_cross_residuals_stand_beside_a_random_subspace(pairs: str) -> None:
    report = json.loads(
        said("--store", pairs, "--rank", "8", "--repeats", "2", "--method", "gnull", "--json")
    )
    value = {
        (f["subject"], f["group"]): f["value"] for f in report["figures"] if f["name"] == "cross residual"
    }
    assert len(value) == 6
    for a in ("blur", "noise"):
        # W suppresses what its own model does, on identities that it has not seen.
        assert value[f"W of {a}", f"T of {a}"] < value["random subspace of rank 8", f"T of {a}"]
    # Taken again from the rows: W from blur's training pairs, T from noise's test pairs, μ of the gallery.
    held = Collection.open(Path(pairs))
    (o, g), (p, q) = held.pairs("train"), held.pairs("test")
    o, g, p, q = (
        held.read(rows[keep]).astype(np.float64)
        for rows, keep in (
            *((rows, held.model[g] == "blur") for rows in (o, g)),
            *((rows, held.model[q] == "noise") for rows in (p, q)),
        )
    )
    W = GeneralisedNull(8).fit(PairData.from_arrays(o, g)).query_map
    centred = p - held.read(held.gallery).astype(np.float64).mean(axis=0)
    expected = np.linalg.norm((q - p) @ W) / np.linalg.norm(centred @ W)
    # W and μ are kept in float32; the ratio of two norms forgives what sums over D terms.
    assert value["W of blur", "T of noise"] == pytest.approx(
        expected, rel=D * float(np.finfo(np.float32).eps)
    )


def test_cross_residuals_hold_a_block_of_rows_at_a_time(
    pairs: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of test pairs, no more than a block of them is widened to float64."""
    words = ["--store", pairs, "--rank", "8", "--method", "svd", "--json"]
    whole = json.loads(said(*words))
    monkeypatch.setattr("cli.collection.BLOCK", 3)
    asked: list[int] = []
    coordinates = Projection.coordinates

    def counted(self: Projection, rows: np.ndarray, side: Any) -> np.ndarray:
        asked.append(len(rows))
        return coordinates(self, rows, side)

    monkeypatch.setattr(Projection, "coordinates", counted)
    blocks = json.loads(said(*words))
    assert 0 < max(asked) <= 3
    values = [
        [f["value"] for f in report["figures"] if f["name"] == "cross residual"] for report in (whole, blocks)
    ]
    # The order of float64 additions alone: in the norms, and in μ, whose float32 may round to a neighbour.
    assert values[0] == pytest.approx(values[1], rel=float(np.finfo(np.float32).eps))
    counts = [[f["n"] for f in r["figures"] if f["name"] == "cross residual"] for r in (whole, blocks)]
    assert counts[0] == counts[1] != [3] * len(counts[0])


@pytest.mark.parametrize("method", ["svd", "procrustes"])
def test_what_is_one_by_construction_is_said_to_be_so_and_not_fitted_again(pairs: str, method: str) -> None:
    text = said("--store", pairs, "--rank", "8", "--repeats", "2", "--method", method)
    assert "blur × noise: cos φ = 1 (1 − cos φ = 0), 1 by construction" in text
    assert "Of 1 comparison: 0 outside the random band, 0 inside, 1 at 1 by construction." in text
    assert f"± is left out: every W of {method} has orthonormal columns" in text
    assert "resampled" not in text


def test_refits_that_say_nothing_are_refused(pairs: str, here: Path) -> None:
    assert "--repeats is 1" in said("--store", pairs, "--repeats", "1", code=2)
    assert "reads no pairs" in said("--store", pairs, "--method", "pca", code=2)
    assert "trained by gradients" in said("--store", pairs, "--method", "cosface", code=2)
    dim = open_store(here / pairs).layout.dim
    words = [save(f"{i}.safetensors", np.eye(dim + 1)[:, :2] + i, space="") for i in (1, 2)]
    text = said(*words, "--store", pairs, code=2)
    assert f"{dim + 1} values" in text
    assert f"latents of {dim}." in text
    alone = ["encode", "images", "--store", "alone.zarr", "--encoder=patch", "--image-size=32"]
    CliRunner().invoke(app, alone)
    assert "holds no training pairs" in said("--store", "alone.zarr", "--rank", "4", code=2)


def test_without_a_rank_the_fits_have_as_many_columns_as_there_are_dimensions(pairs: str, here: Path) -> None:
    dim = open_store(here / pairs).layout.dim
    report = json.loads(said("--store", pairs, "--jackknife", "2", "--json"))
    assert report["settings"]["rank"] == dim
    assert [c for c in report["caveats"] if "not the usual 512" in c] == [
        f"The fits have rank {dim}, not the usual 512: the latents have {dim} dimensions."
    ]
    for rank in (str(dim + 1), "0"):
        assert f"not {rank}." in said("--store", pairs, "--rank", rank, code=2)
    named = json.loads(said("--store", pairs, "--rank", str(dim), "--jackknife", "2", "--json"))
    assert named["figures"] == report["figures"]
    assert not any("usual" in c for c in named["caveats"])


def test_cosines_near_one_are_told_from_their_band() -> None:
    assert (cosine(0.5), gap(0.5)) == ("0.500000", "5.00e-01")
    assert (cosine(1 - 2.5e-6), gap(1 - 2.5e-6)) == ("0.99999750", "2.50e-06")
    assert cosine(1 - 2.51e-6) != cosine(1 - 2.52e-6), "six digits would tell them apart no more"
    assert cosine(1.0) == cosine(1 + 2e-16) == "1"
    assert gap(1.0) == gap(1 + 2e-16) == "0"


def test_models_stand_beside_models_as_in_the_papers_table_and_fit_a_terminal(pairs: str) -> None:
    text = said("--store", pairs, "--rank", "8", "--jackknife", "3", "--plot", "p.png")
    table = text[text.index("\n  cos φ ") + 1 :].splitlines()
    assert table[0].split() == ["cos", "φ", "blur", "noise"]
    assert table[2].split()[0] == "blur"
    assert len(table[2].split()) == 3
    assert table[3].split()[0] == "±"
    assert table[4].split()[0] == "noise"
    assert len(table[4].split()) == 2
    assert "SDXL 0.995790 ± 0.000037" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("  ")) <= 80
    # Two files are no models of a store: nothing of the paper's stands beside them.
    two = [save(f"{i}.safetensors", np.eye(D)[:, i : i + 2]) for i in (1, 2)]
    assert "SDXL" not in said(*two)


def test_one_model_has_no_plus_minus_and_the_reader_is_told_where_it_would_stand(
    pairs: str, here: Path
) -> None:
    lines = (here / "list.csv").read_text().splitlines()
    (here / "one.csv").write_text("\n".join(x for x in lines if not x.endswith(",noise")) + "\n")
    done = CliRunner().invoke(
        app, ["encode", "--manifest", "one.csv", "--store", "one.zarr", "--encoder=patch", "--image-size=32"]
    )
    assert done.exit_code == 0, done.output
    text = said("--store", "one.zarr", "--rank", "8", "--jackknife", "3")
    assert text.count("± is left out: with one model there are no two spectra to compare.") == 1
    assert "Of 1 comparison: " in text


def test_the_plot_shows_every_map_beside_gaussian_matrices(files: dict[str, str], tmp_path: Path) -> None:
    said(files["g1"], files["steep"], "--plot", "spectra.png", "--out", "compare.json")
    report = load(tmp_path / "compare.json")
    drawn = [c for c in report.curves if c.plot == "spectrum"]
    assert [(c.label, c.role) for c in drawn] == [
        ("g1", "method"), ("steep", "method"), (f"Gaussian {D} × {M}", "control"),
    ]  # fmt: skip
    assert all(c.y_log for c in drawn)
    with Image.open(tmp_path / "spectra.png") as image:
        colours = {c for _, c in image.convert("RGB").getcolors(image.width * image.height) or []}
    for name in ("m1", "m2", "control"):
        rgb = tuple(int(PAPER[name][i : i + 2], 16) for i in (1, 3, 5))
        assert rgb in colours, name
    for nowhere in (str(tmp_path), "nowhere/spectra.png"):
        assert "--plot is" in said(files["g1"], files["g2"], "--plot", nowhere, code=2)


def test_maps_of_one_column_are_dots_in_the_plot(files: dict[str, str], tmp_path: Path) -> None:
    one = [save(f"one{i}.safetensors", np.eye(D)[:, i : i + 1]) for i in range(2)]
    said(*one, "--plot", "dots.png")  # and no warning of an axis without a length, which would be an error
    with Image.open(tmp_path / "dots.png") as image:
        colours = {c for _, c in image.convert("RGB").crop((200, 200, 900, 600)).getcolors(1 << 20) or []}
    rgb = tuple(
        int(PAPER["m2"][i : i + 2], 16) for i in (1, 3, 5)
    )  # drawn over the first; the legend is above
    assert rgb in colours


def test_the_jackknife_is_that_of_parts_left_out(pairs: str) -> None:
    report = json.loads(said("--store", pairs, "--rank", "8", "--jackknife", "4", "--json"))
    held = Collection.open(Path(pairs))
    o, g = held.pairs("train")
    # The parts again, from the photos alone.
    part_of = {row: t.part for t in held.pair_pass("train", parts=4).tasks for row in t.translations.tolist()}
    part = np.array([part_of[row] for row in g.tolist()])
    for photo in set(held.group[g]):
        assert len(set(part[held.group[g] == photo])) == 1, "a photo's pairs are left out together"

    def sigma(model: str, without: int | None) -> np.ndarray:
        kept = (held.model[g] == model) & (part != without)
        read = (held.read(rows[kept]).astype(np.float64) for rows in (o, g))
        return np.linalg.svd(GeneralisedNull(8).fit(PairData.from_arrays(*read)).query_map, compute_uv=False)

    left = np.array([cos_phi(sigma("blur", i), sigma("noise", i)) for i in sorted(set(part))])
    whole = cos_phi(sigma("blur", None), sigma("noise", None))
    n = len(left)
    error = np.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum())
    value = {(f["name"], f["group"]): f["value"] for f in report["figures"] if f["role"] == "method"}
    group = "blur × noise, jackknife"
    # The fits here are in float64 from the start, those of the store in tiles of float32.
    assert value["cos φ", group] == pytest.approx(whole, abs=1e-5)
    assert value["cos φ, jackknife standard error", group] == pytest.approx(error, rel=1e-2)
    assert ("cos φ", "blur × without a part") in value
    assert not [name for name, at in value if "jackknife" in name and at != group], (
        "no ± of a map with itself"
    )
    assert any("delete-one-group jackknife over 4 parts" in c for c in report["caveats"])
    assert report["settings"]["jackknife parts"] == 4


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = np.random.default_rng(0).normal(size=20)
    left = np.array([np.delete(x, i).mean() for i in range(len(x))])
    assert jackknife_error(left) == pytest.approx(x.std(ddof=1) / np.sqrt(len(x)), rel=1e-12)


def test_every_closed_method_that_learns_from_pairs_is_refitted(pairs: str) -> None:
    spreads = {}
    for method in ("plda", "cca", "regression", "procrustes", "kissme"):
        report = json.loads(
            said("--store", pairs, "--rank", "4", "--repeats", "2", "--method", method, "--json")
        )
        spreads[method] = [f["value"] for f in report["figures"] if f["name"] == "cos φ"]
        assert {c["label"] for c in report["curves"]} >= {"W of blur", "W of noise"}
    assert len({tuple(v) for v in spreads.values()}) == len(spreads)
    words = ["--store", pairs, "--rank", "4", "--repeats", "2", "--json"]
    stiff = json.loads(said(*words, "--lam", "50"))
    assert stiff["settings"]["lam"] == 50
    assert stiff["figures"] != json.loads(said(*words))["figures"]


def test_refit_options_that_contradict_are_refused(pairs: str, files: dict[str, str]) -> None:
    assert "--jackknife is 1" in said("--store", pairs, "--jackknife", "1", code=2)
    assert "Give one of the two" in said("--store", pairs, "--jackknife", "3", "--repeats", "5", code=2)
    assert "--lam is a knob of" in said("--store", pairs, "--method", "svd", "--lam", "1", code=2)
    assert "no store" in said(files["g1"], files["g2"], "--lam", "1", code=2)
