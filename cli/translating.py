"""translate: originals through image-to-image models into a folder that encode takes; a rerun goes on."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cli.translation_folder import MANIFEST, Folder, opened
from cli.translation_plan import Job, Original, Originals, choose, draw, file_name, find_prompts
from latentstore.errors import ImageError, UsageError
from latentstore.manifest import is_url
from latentstore.translate import (
    GUIDANCE,
    SHIPPED,
    STEPS,
    Translator,
    check_model,
    check_name,
    name_of,
    real_steps,
)

Count = Callable[[int, int], None]
NAMED = 20
"""Originals that are named where some are left out."""


@dataclass(frozen=True)
class TranslateOptions:
    """What is asked for.

    Attributes
    ----------
    models : tuple of str
        ``FOLDER``, ``OWNER/NAME``, or one of them with a name: ``NAME=FOLDER``.
    strengths : tuple of float
        In (0, 1].
    prompt : tuple of str
        Shared by all originals.
    prompts : Path or None
        A list of each original's own.
    per_origin : int or None
        Translations of an original by each model at each strength; None for one under each prompt.
    split : str or None
        Translate only originals of this split.
    limit : int or None
        Originals at most.
    image_size : int or None
        Side in pixels; None for each model's own.
    quality : int
        Of the JPEG files, whose colours are at half resolution (4:2:0).
    batch : int
        Pictures translated at once. It may move last bits, and is no part of the settings.
    """

    models: tuple[str, ...]
    strengths: tuple[float, ...] = (0.9,)
    prompt: tuple[str, ...] = ()
    prompts: Path | None = None
    per_origin: int | None = None
    split: str | None = None
    steps: int = STEPS
    guidance: float = GUIDANCE
    limit: int | None = None
    image_size: int | None = None
    quality: int = 90
    batch: int = 4
    seed: int = 0
    device: str = "auto"
    revision: str | None = None


@dataclass
class Translated:
    """What a run did.

    Attributes
    ----------
    out, manifest : str
    originals : int
        That were chosen.
    translations : int
        In the folder now, of this run and of earlier ones; those whose originals are ``gone`` not counted.
    made, kept : int
        Translations made by this run, and those asked for that were there.
    models : dict
        Name → digest and size in pixels.
    steps : dict
        Strength → steps that were run of the schedule.
    bad : list of (path, why)
        The first originals that could not be used, 20 at most, of ``n_bad``.
    unprompted : int
        Originals of the split that have no prompt.
    strangers : int
        Rows of the file of prompts that name no original.
    cut : int
        Prompts that are longer than a model reads.
    seconds : float
        Of translating, without loading the models.
    """

    out: str
    manifest: str
    originals: int = 0
    translations: int = 0
    gone: int = 0
    made: int = 0
    kept: int = 0
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    n_bad: int = 0
    unprompted: int = 0
    strangers: int = 0
    cut: int = 0
    seconds: float = 0.0


def translate(
    originals: Originals,
    out: Path,
    options: TranslateOptions,
    *,
    on_start: Count = lambda todo, total: None,
    on_rows: Count = lambda rows, bad: None,
) -> Translated:
    """Translate originals by each model at each strength into ``out``, and list all for ``encode``.

    What is there of the same settings is kept. A translation is decided by its original, prompt, model,
    strength, number and the seed: not by the order, nor by what else is asked for.

    Parameters
    ----------
    originals : Originals
    out : Path
    options : TranslateOptions
    on_start : callable
        Called once with (translations to make, translations asked for).
    on_rows : callable
        Called with (translations, those that cannot be made) after each batch.

    Raises
    ------
    UsageError
        Options that do not fit each other, the models, or what is in the folder.
    EncoderError
        A model cannot be loaded, or fails.
    """
    models = _models(options)
    strengths = tuple(dict.fromkeys(options.strengths))
    done = Translated(str(out), str(out / MANIFEST))
    done.steps = {repr(s): real_steps(s, options.steps) for s in strengths}
    prompts = find_prompts(originals, options.prompt, options.prompts, options.seed)
    done.strangers = prompts.strangers
    chosen, done.unprompted = choose(
        originals, prompts, split=options.split, limit=options.limit, seed=options.seed
    )
    done.originals = len(chosen)
    _refuse_inside(originals, out)
    jobs = [job for original in chosen for job in prompts.jobs(original, options.per_origin)]
    for model in models.values():
        check_model(model, options.revision)
    with opened(out) as folder:
        run = _Run(folder, originals, options, done, on_rows)
        folder.agree(run.settings)
        work = {(m, s): list(run.batches(m, s, jobs)) for m in models for s in strengths}
        total = len(jobs) * len(work)
        todo = sum(len(new) for batches in work.values() for _, new in batches)
        done.kept = total - todo
        on_start(todo, total)
        for name, model in models.items():
            run.by_model(name, model, {s: work[name, s] for s in strengths})
        bad = {path for path, _ in (*run.bad.items(), *originals.unusable)}
        done.translations, done.gone = folder.write_manifest(originals, bad)
    left_out = [*run.bad.items(), *originals.unusable]
    done.bad, done.n_bad = left_out[:NAMED], len(left_out)
    done.cut = len(run.cut)
    return done


Batch = tuple[Sequence[Job], frozenset[str]]
"""Jobs that are translated together, and the paths of those that are to be made."""


class _Run:
    """One run over one folder."""

    def __init__(
        self,
        folder: Folder,
        originals: Originals,
        options: TranslateOptions,
        done: Translated,
        on_rows: Count,
    ) -> None:
        self.folder, self.originals, self.options, self.done = folder, originals, options, done
        self.on_rows = on_rows
        self.bad: dict[str, str] = {}
        self.cut: set[str] = set()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides every translation beside its own original, prompt, model and strength."""
        o = self.options
        named = {"steps": o.steps, "guidance": o.guidance, "quality": o.quality, "seed": o.seed}
        return {"originals": self.originals.named, **named}

    def batches(self, name: str, strength: float, jobs: Sequence[Job]) -> Iterator[Batch]:
        """Yield the batches in which something is to be made.

        They are cut from all jobs, so that a run that goes on computes each picture in the same company,
        and to the same bits whatever a device does.
        """
        for first in range(0, len(jobs), self.options.batch):
            batch = jobs[first : first + self.options.batch]
            paths = [(file_name(name, strength, j.original.identity, j.k), j.prompt) for j in batch]
            new = frozenset(path for path, prompt in paths if not self.folder.has(path, prompt))
            if new:
                yield batch, new

    def by_model(self, name: str, model: str, work: dict[float, list[Batch]]) -> None:
        """Make what is to be made by one model, which is loaded for it and let go after it."""
        translator = Translator(model, name=name, device=self.options.device, revision=self.options.revision)
        size = self.options.image_size or translator.size
        if size is None:
            raise UsageError(
                f"The configuration of model {name} does not say for which size it was made. Give "
                "--image-size."
            )
        for strength in work:
            translator.check((size, size, 3), strength=strength, steps=self.options.steps)
        facts = {"digest": translator.digest, "size": size}
        self.folder.agree({f"model {name}": facts})
        self.done.models[name] = facts
        began = time.perf_counter()
        for strength, batches in work.items():
            for batch, new in batches:
                self._make(translator, size, strength, batch, new)
        self.done.seconds += time.perf_counter() - began

    def _make(
        self, translator: Translator, size: int, strength: float, batch: Sequence[Job], new: frozenset[str]
    ) -> None:
        """Translate one batch, and write what is new of it."""
        # A fixed shape: the last batch, and the place of what cannot be read, are filled with grey.
        pictures = np.full((self.options.batch, size, size, 3), 128, np.uint8)
        prompts, seeds = [""] * len(pictures), [0] * len(pictures)
        usable: dict[int, str] = {}
        for i, job in enumerate(batch):
            identity = job.original.identity
            picture = self._picture(job.original, size)
            if picture is None:
                continue
            pictures[i], prompts[i] = picture, job.prompt
            seeds[i] = draw(self.options.seed, identity, translator.name, strength, job.k)
            path = file_name(translator.name, strength, identity, job.k)
            if path in new:
                usable[i] = path
        if usable:
            self.cut |= {p for p in set(prompts) - self.cut if not translator.reads_whole(p)}
            made = translator.translate(
                pictures,
                prompts,
                strength=strength,
                steps=self.options.steps,
                guidance=self.options.guidance,
                seeds=seeds,
            )
            files = {path: self._jpeg(made[i]) for i, path in usable.items()}
            lines = [
                {
                    "path": path,
                    "identity": batch[i].original.identity,
                    "k": batch[i].k,
                    "model": translator.name,
                    "strength": strength,
                    "prompt": batch[i].prompt,
                }
                for i, path in usable.items()
            ]
            self.folder.add(files, lines)
            self.done.made += len(usable)
        self.on_rows(len(new), len(new) - len(usable))

    def _picture(self, original: Original, size: int) -> npt.NDArray[np.uint8] | None:
        """Return an original's pixels, or None for one that cannot be read, which is noted once."""
        if original.path in self.bad:
            return None
        try:
            return self.originals.picture(original, size)
        except ImageError as exc:
            self.bad[original.path] = str(exc)
            return None

    def _jpeg(self, picture: npt.NDArray[np.uint8]) -> bytes:
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "JPEG", quality=self.options.quality)
        return out.getvalue()


def _refuse_inside(originals: Originals, out: Path) -> None:
    """Refuse to write where the originals are listed: translations would be taken for originals."""
    root, manifest = originals.named["root"], originals.named["manifest"]
    if manifest is None and not is_url(str(root)) and out.resolve().is_relative_to(Path(str(root)).resolve()):
        raise UsageError(
            f"--out is {out}, inside {root}: all images below that are originals, and a rerun would take "
            "the translations for some. Name a folder elsewhere."
        )


def _models(options: TranslateOptions) -> dict[str, str]:
    """Return name → folder or hub name."""
    if not options.models:
        raise UsageError(
            "No model is named. Give --model FOLDER of a diffusers pipeline, a hub name (OWNER/NAME), or one "
            f"of the small ones that come with the package ({', '.join(SHIPPED)})."
        )
    found: dict[str, str] = {}
    for word in options.models:
        name, equals, where = word.partition("=")
        if Path(word).exists() or not equals:
            name, where = name_of(word), word
        if name in found:
            raise UsageError(
                f"{found[name]} and {where} are both called {name!r}. Name one of them otherwise: --model "
                f"NAME={where}."
            )
        check_name(name)
        found[name] = where
    return found
