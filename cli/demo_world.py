"""The demo's translations from text prompts, by the two small diffusion models that come with the package."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from cli.collection import Collection, Queries
from cli.translating import TranslateOptions, translate
from cli.translation_plan import Originals, draw
from cli.workflows import run_encode
from latentstore.errors import UsageError
from latentstore.translate import SHIPPED

HEADLINE = "translations from text prompts"
STRENGTH, STEPS, GUIDANCE = 0.6, 10, 3.0


def models() -> dict[str, Path]:
    """Return the models' folders by name; none where they, or what reads their prompts, are not installed."""
    if find_spec("transformers") is None:
        return {}
    return {name: folder for name, folder in SHIPPED.items() if (folder / "model_index.json").exists()}


def translated(originals: Path, out: Path, *, count: int, encoder: str, image_size: int) -> Collection:
    """Translate some test originals by each model, encode what they made, and open it.

    Every picture becomes another thing: its prompt is a class's words, drawn by seed.

    Parameters
    ----------
    originals : Path
        Store of the pictures.
    out : Path
        Folder for the pictures, ``translated``, and their store.
    count : int
        Originals.
    encoder : str
    image_size : int

    Raises
    ------
    UsageError
        No original could be translated.
    """
    folder = out / "translated"
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, str]] = []
    for name, model in models().items():
        prompts = folder / f"prompts-{name}.csv"
        _write_prompts(prompts, originals, model)
        options = TranslateOptions(
            models=(name,),
            strengths=(STRENGTH,),
            prompts=prompts,
            split="test",
            steps=STEPS,
            guidance=GUIDANCE,
            limit=count,
            batch=6,
        )
        done = translate(Originals.of_store(originals), folder / name, options)
        with Path(done.manifest).open(encoding="utf-8", newline="") as file:
            listed = [r for r in csv.DictReader(file) if r["role"] == "translation"]
        listed = listed[:count]  # an earlier run may have made more
        # Their origins lie in another store: here they are pictures to be asked for.
        rows += [r | {"path": f"{name}/{r['path']}", "role": "query"} for r in listed]
    if not rows:
        raise UsageError("None of the test pictures could be translated. Name a folder of other pictures.")
    manifest = folder / "manifest.csv"
    with manifest.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    run_encode(folder, out / "translated.zarr", manifest=manifest, encoder=encoder, image_size=image_size)
    return Collection.open(out / "translated.zarr")


def groups(made: Collection) -> list[Queries]:
    """Return the query groups: all translations (the headline), and those of each model."""
    rows = made.queries("test").rows
    each = [Queries(made, rows[made.model[rows] == name], f"translations by {name}") for name in models()]
    return [Queries(made, rows, HEADLINE), *each]


def _write_prompts(path: Path, originals: Path, model: Path) -> None:
    """Give each original one prompt, in the words that the model knows."""
    card = json.loads((model / "card.json").read_text(encoding="utf-8"))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["identity", "prompt"])
        for identity in np.unique(Collection.open(originals).identity):
            # By the picture and not by its place: a further one must not move the others' prompts.
            drawn = np.random.default_rng(draw("prompt", str(identity))).choice(card["classes"])
            writer.writerow([identity, card["template"].format(drawn)])
