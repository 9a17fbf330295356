"""The miniature world's pictures: originals, prompts, translations by both models, stores of latents."""

from __future__ import annotations

import csv
import json
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.world_plan import BOTH, MODELS, SIZE, SPLITS, WITHOUT, WORLD, Photo, Photos, Plan
from cli import translating
from cli.duplicates import run_duplicates
from cli.progress import tracked
from cli.takedown import choose, run_remove
from cli.translation_plan import Originals, draw, file_name
from cli.workflows import run_encode
from latentstore.errors import UsageError
from latentstore.files import write_atomic
from latentstore.sources import Source

TRANSLATIONS = Path("translations")
COLUMNS = ("path", "identity", "role", "split", "model", "prompt", "strength")
Row = dict[str, Any]


def write_photos(sources: Sequence[Path], plan: Plan) -> None:
    """Lay the photos out as PNG files, without loss, and write ``photos.json``.

    Raises
    ------
    UsageError
        Too few photos, two of one name, or photos without class words.
    ImageError
        One of the photos is damaged.
    """
    from latentstore.training.captions import read_words
    from latentstore.training.tiny import split

    names, photos, others, unseen = split(sources)
    words = read_words(sources)
    kept = [*_some(others, unseen, plan.origins), *_some(names, photos, plan.references)]
    missing = [name for name, _ in kept if name not in words]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(kept)} photos have no class in SOURCES.csv, {missing[0]} for one: add "
            "them to it, or take them away."
        )
    stems = [Path(name).stem for name, _ in kept]
    if len(set(stems)) < len(stems):
        twice = next(s for s in stems if stems.count(s) > 1)
        raise UsageError(f"Two photos are called {twice!r}, and a name stands for one photo. Rename one.")
    splits = _splits(stems[: min(len(others), plan.origins or len(others))])
    Path("photos").mkdir(exist_ok=True)
    listed = []
    for stem, (name, pixels) in zip(stems, kept, strict=True):
        Image.fromarray(pixels).save(f"photos/{stem}.png", compress_level=1)
        listed.append([stem, words[name], splits.get(stem, ""), stem in splits])
    found = {"photos": listed, "vocabulary": sorted(set(words.values()))}
    write_atomic(Path("photos.json"), json.dumps(found, ensure_ascii=False, indent=0).encode())


def read_photos() -> Photos:
    """Return what :func:`write_photos` wrote."""
    found = json.loads(Path("photos.json").read_text(encoding="utf-8"))
    return Photos(tuple(Photo(*row) for row in found["photos"]), tuple(found["vocabulary"]))


def _some(names: Sequence[str], pixels: Any, most: int | None) -> list[tuple[str, Any]]:
    """Return photos in the order of a hash, at most so many."""
    order = sorted(range(len(names)), key=lambda i: draw("photo", Path(names[i]).stem))
    return [(names[i], pixels[i]) for i in order[:most]]


def _splits(stems: Sequence[str]) -> dict[str, str]:
    """Return each original's split.

    Raises
    ------
    UsageError
        Too few originals for three splits.
    """
    ordered = sorted(stems, key=lambda stem: draw("split", stem))
    ends = np.rint(np.cumsum(list(SPLITS.values())) * len(ordered)).astype(int)
    counts = np.diff(ends, prepend=0)
    if counts.min() < 2:
        raise UsageError(
            f"{len(ordered)} photos are held out, which is too few to train, choose and test on (2 of each "
            "at least). Name folders with more photographs."
        )
    return dict(zip(ordered, np.repeat(list(SPLITS), counts).tolist(), strict=True))


# --- prompts and translations ------------------------------------------------------------------------------


def words_for(photo: Photo, vocabulary: Sequence[str], count: int) -> list[str]:
    """Draw class words that are not the photo's own, the same for every model; more of them begin alike."""
    others = [w for w in vocabulary if w != photo.words]
    rng = np.random.default_rng(draw("prompts", photo.name))
    return [others[i] for i in rng.permutation(len(others))[:count]]


def jobs(plan: Plan, photos: Photos) -> Iterator[tuple[str, str, tuple[float, ...], dict[str, list[str]]]]:
    """Yield (model, what for, strengths, original -> class words)."""
    for model, count in plan.prompts:
        learned = {p.name: words_for(p, photos.vocabulary, count) for p in photos.of("train", "validation")}
        yield model, "training", plan.train_strengths, learned
    for model, _ in plan.prompts:
        asked = {p.name: words_for(p, photos.vocabulary, 1) for p in photos.of("test")}
        yield model, "test", plan.test_strengths, asked


def translate(plan: Plan, photos: Photos, models: dict[str, Path], templates: dict[str, str]) -> None:
    """Make every translation, and list them; a run that was stopped goes on.

    Raises
    ------
    EncoderError
        A model cannot be loaded, or fails.
    """
    listed = Path("originals.csv")
    write_table(listed, [_original(p) for p in photos.origins])
    originals = Originals.of_source(Source.of(".", listed))
    rows: list[Row] = []
    for model, what, strengths, words in jobs(plan, photos):
        prompts = {name: [templates[model].format(word) for word in drawn] for name, drawn in words.items()}
        table = Path(f"prompts-{model}-{what}.csv")
        write_table(table, [{"identity": i, "prompt": p} for i, own in prompts.items() for p in own])
        options = translating.TranslateOptions(
            models=(f"{model}={models[model]}",),
            strengths=strengths,
            prompts=table,
            steps=plan.steps,
            guidance=plan.guidance,
            image_size=SIZE,
            batch=plan.batch,
            device="cpu",
        )
        with tracked(f"translate by {model}, {what}", "images", first="loading the model") as shown:
            done = translating.translate(
                originals, TRANSLATIONS, options, on_start=shown.on_start, on_rows=shown.on_rows
            )
        if done.n_bad:
            raise UsageError(
                f"{done.n_bad} photos could not be translated by model {model} ({done.bad[0]}, for one). "
                "Start again with an empty --work folder."
            )
        rows += _translations(photos, model, strengths, prompts)
    write_table(Path("translations.csv"), rows)


def _translations(
    photos: Photos, model: str, strengths: Iterable[float], prompts: dict[str, list[str]]
) -> Iterator[Row]:
    split = {p.name: p.split for p in photos.origins}
    for strength in strengths:
        for name, own in prompts.items():
            for k, prompt in enumerate(own, 1):
                path = (TRANSLATIONS / file_name(model, strength, name, k)).as_posix()
                where = {"path": path, "identity": name, "role": "translation", "split": split[name]}
                yield {**where, "model": model, "prompt": prompt, "strength": strength}


def _original(photo: Photo) -> Row:
    row = {"path": photo.path, "identity": photo.name, "role": "origin" if photo.origin else "reference"}
    # Without one, a photo's split is the store's own hash of its name: it has no translations to learn from.
    return {**row, "split": photo.split}


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write a CSV; of :data:`COLUMNS`, or those of its first row."""
    listed = list(rows)
    names = [c for c in COLUMNS if any(c in row for row in listed)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(listed)


def read_translations() -> list[Row]:
    """Return every translation: path, identity, split, model, prompt, strength."""
    with Path("translations.csv").open(newline="", encoding="utf-8") as file:
        return [{**row, "strength": float(row["strength"])} for row in csv.DictReader(file)]


# --- stores ------------------------------------------------------------------------------------------------


def manifests(plan: Plan, photos: Photos) -> dict[Path, list[Row]]:
    """Return what is encoded into each store.

    Of model b no translation of an original that is trained or chosen on stands in the world's store. The
    store of both models holds as many training pairs of each, under the same prompts.
    """
    made = read_translations()
    fewest = min(count for _, count in plan.prompts)
    world = [row for row in made if row["split"] == "test" or row["model"] == MODELS[0]]
    both = [row for row in made if int(Path(row["path"]).stem.rpartition("_")[2]) <= fewest]
    everything = [_original(p) for p in photos.listed]
    return {
        WORLD: [*everything, *world],
        BOTH: [*(_original(p) for p in photos.origins), *both],
    }


def encode(store: Path, rows: Sequence[Row], encoder: str) -> None:
    """Encode rows into a store, and group the near-duplicates of its photos where that can be told."""
    table = store.with_suffix(".csv")
    write_table(table, rows)
    with tracked(f"encode {store}", "images") as shown:
        done = run_encode(
            Path(),
            store,
            encoder=encoder,
            manifest=table,
            image_size=SIZE,
            device="cpu",
            on_start=shown.on_start,
            on_rows=shown.on_rows,
        )
    if done.counts.get("ok") != len(rows):
        raise UsageError(
            f"{len(rows)} pictures were to be encoded into {store}, and these came: {done.counts}. Start "
            "again with an empty --work folder."
        )
    try:
        run_duplicates(store)
    except UsageError as exc:  # too few photos to tell: said by every report on the store
        print(f"{store}: {exc}")


def take_out(photos: Sequence[Photo]) -> None:
    """Copy the world's store and take photos down from it, with those that look nearly the same."""
    shutil.rmtree(WITHOUT, ignore_errors=True)  # of a run that was stopped
    shutil.copytree(WORLD, WITHOUT)
    chosen = choose(WITHOUT, [p.path for p in photos], [], near=True)
    run_remove(WITHOUT, chosen.rows, reason="to be strangers")


# --- what people look at -----------------------------------------------------------------------------------


def contact_sheet(path: Path, plan: Plan, photos: Photos, *, shown: int = 10, side: int = 128) -> None:
    """Draw some test originals, each with its translations by both models at every strength."""
    made = {(r["identity"], r["model"], r["strength"]): r for r in read_translations()}
    tested = photos.of("test")[:shown]
    head, foot, gap = 20, 12, 6
    columns = 1 + len(plan.test_strengths)
    height = 2 * (side + gap) + foot
    sheet = Image.new("RGB", (columns * (side + gap) + gap, head + height * len(tested)), "white")
    pen = ImageDraw.Draw(sheet)
    for at, strength in enumerate(plan.test_strengths, 1):
        pen.text((gap + at * (side + gap), 4), f"strength {strength:g}", fill="black")
    for line, photo in enumerate(tested):
        top = head + line * height
        _paste(sheet, Path(photo.path), gap, top, side)
        prompt = made[photo.name, MODELS[0], plan.test_strengths[0]]["prompt"]
        said = [*textwrap.wrap(photo.words, 20), "to", *textwrap.wrap(prompt, 20), "", "above: a", "below: b"]
        pen.text((gap, top + side + 4), "\n".join(said), fill="black")
        for at, strength in enumerate(plan.test_strengths, 1):
            for below, model in enumerate(MODELS):
                row = made[photo.name, model, strength]
                _paste(
                    sheet,
                    Path(row["path"]),
                    gap + at * (side + gap),
                    top + below * (side + gap),
                    side,
                )
    sheet.save(path, quality=88)


def _paste(sheet: Image.Image, path: Path, x: int, y: int, side: int) -> None:
    with Image.open(path) as picture:
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (x, y))
