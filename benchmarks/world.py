"""Claims of the paper, on translations that two networks made from text prompts: the miniature world.

Models a and b (latentstore/data/world, trained from scratch by latentstore.training) translate photos that
neither has seen. W learns from pairs by a alone, and is asked for translations by both. All the paper's
figures follow, each beside its controls, and what its claims come to here.

    OMP_NUM_THREADS=1 python -m benchmarks.world PHOTOS [PHOTOS …] [--work FOLDER] [--small] [--out FILE]

``PHOTOS`` are the folders or tar files that the models were trained on, with their SOURCES.csv: the tenth
that was held out by hash is used. ``--work`` keeps every stage: the same command goes on where it stopped.
Writes the results, and beside them a sheet of pictures (.jpg) and a page (.html).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import latentstore
from benchmarks import world_findings, world_maps, world_models, world_pictures
from benchmarks.world_maps import COSFACE, STARTED
from benchmarks.world_plan import MODELS, SMALL, SPLITS, Photos, Plan
from latentstore import results
from latentstore.errors import LatentStoreError, UsageError
from latentstore.files import write_atomic
from latentstore.report import reading, write_html
from latentstore.results import CHOSEN, Curve, Figure, Report
from solvers.errors import SolverError

OUT = Path(__file__).parent / "results" / "world.json"
BUILT_IN = Path(latentstore.__file__).parent / "data" / "world"
SETTINGS, STAGES = Path("settings.json"), Path("stages")
DIGITS, POINTS = 6, 100
_FEW_PHOTOS = (
    "Both models are small and learned from some three thousand photos: their translations are not those of "
    "published models, and figures do not compare with the paper's."
)
_FEWER_PAIRS = (
    "Upper bounds rest on fewer training pairs (the unseen model's), and are low for that. Differences "
    "between maps of each model rest on equally many pairs of the same originals."
)
_OTHER_RULES = (
    "Some findings rest on other rules: cos φ on the band of random matrices, column spaces on a range over "
    "halvings of the same photos (which is no confidence interval), Table 4 on a fixed bound."
)
KEPT = ("mAP", "Acc", "gain over best control")
"""What of an evaluation goes into the results."""


class Stages:
    """Makes each stage once, and keeps it in ``stages/``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        STAGES.mkdir(exist_ok=True)

    def did(self, name: str, work: Callable[[], object]) -> None:
        """Do a stage that leaves files, unless it was done."""
        done = STAGES / f"{name}.done"
        if not done.exists():
            began = time.perf_counter()
            work()
            write_atomic(done, f"{time.perf_counter() - began:.1f}\n".encode())
            self._say(name, done)
        self.seconds[name] = float(done.read_text(encoding="utf-8"))

    def report(self, name: str, work: Callable[[], Report]) -> Report:
        """Return the report of a stage, made now unless it was made."""
        path = STAGES / f"{name}.json"

        def make() -> None:
            work().write(path)

        self.did(name, make)
        return results.load(path)

    def _say(self, name: str, done: Path) -> None:
        print(f"{name:<24} {float(done.read_text(encoding='utf-8')):8.1f} s", flush=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", nargs="+", type=Path, help="folders or tar files with SOURCES.csv")
    for name in MODELS:
        parser.add_argument(f"--{name}", type=Path, default=BUILT_IN / name, help="a pipeline of diffusers")
    parser.add_argument("--work", type=Path, default=Path("world"), help="keeps every stage")
    parser.add_argument("--small", action="store_true", help="a quick try of everything")
    parser.add_argument("--guidance", type=float, help="of classifier-free guidance")
    parser.add_argument("--origins", type=int, help="held-out photos to use at most")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(words)
    named = {k: v for k, v in (("guidance", args.guidance), ("origins", args.origins)) if v is not None}
    plan = replace(SMALL if args.small else Plan(), **named)
    try:
        run(args.photos, {name: getattr(args, name) for name in MODELS}, args.work, args.out, plan)
    except (LatentStoreError, SolverError, OSError) as exc:
        print(f"Error: {exc}", file=sys.stderr)
        return getattr(exc, "exit_code", 1)
    return 0


def run(sources: Sequence[Path], models: Mapping[str, Path], work: Path, out: Path, plan: Plan) -> None:
    """Go through all stages in a work folder, and write what came of them.

    Raises
    ------
    UsageError
        A wrong path, too few photos, or a work folder of other settings.
    EncoderError
        A model cannot be loaded.
    """
    folders = {name: folder.resolve() for name, folder in models.items()}
    for name, folder in folders.items():
        if not (folder / "model_index.json").is_file():
            raise UsageError(
                f"No pipeline lies in {folder}: name the folder that training wrote, --{name} FOLDER."
            )
    photos, out = [source.resolve() for source in sources], out.resolve()
    if not out.parent.is_dir():
        raise UsageError(f"--out is {out}, but there is no folder {out.parent}. Make it, or choose another.")
    work.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(work):  # no path of this machine gets into the results
        named = [source.name for source in photos]
        _agree({"photos": named, "models": {name: digest(f) for name, f in folders.items()}, **asdict(plan)})
        stages = Stages()
        stages.did("photos", partial(world_pictures.write_photos, photos, plan))
        world = world_pictures.read_photos()
        pictures(stages, plan, world, folders)
        made = measured(stages, plan, world, folders)
        reports = assembled(made, stages, plan, world)
        write_atomic(out, reading.merged(reports))
        write_html(reports, out.with_suffix(".html"))
        world_pictures.contact_sheet(out.with_suffix(".jpg"), plan, world)
    print(*reports[0].summary, sep="\n")


def _agree(settings: Mapping[str, Any]) -> None:
    """Keep the settings of a work folder, or refuse others than those it has."""
    asked = json.loads(json.dumps(settings))
    if not SETTINGS.exists():
        write_atomic(SETTINGS, (json.dumps(asked, indent=1) + "\n").encode())
    held = json.loads(SETTINGS.read_text(encoding="utf-8"))
    other = [name for name in asked if held.get(name) != asked[name]]
    if other:
        raise UsageError(
            f"{Path.cwd()} was made with {other[0]} {held.get(other[0])}, and {asked[other[0]]} is asked for "
            "now. Choose another --work folder, or go on with the settings of then."
        )


def digest(folder: Path) -> str:
    """Return the SHA-256 of what a model is made of: the files of its parts, with their names."""
    found = hashlib.sha256()
    for file in sorted(p for p in folder.glob("*/*") if p.is_file()):
        found.update(f"{file.relative_to(folder).as_posix()} ".encode())
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def pictures(stages: Stages, plan: Plan, world: Photos, models: dict[str, Path]) -> None:
    """Translate and encode."""

    def translate() -> None:
        from latentstore.training.diffusion import DESIGNS

        templates = {name: DESIGNS[name].template for name in MODELS}
        world_pictures.translate(plan, world, models, templates)

    stages.did("translations", translate)
    listed = world_pictures.manifests(plan, world)
    for store, rows in listed.items():
        stages.did(f"encode {store.stem}", partial(world_pictures.encode, store, rows, plan.encoder))
    stages.did("take out", partial(world_pictures.take_out, world.of("test")))


def measured(stages: Stages, plan: Plan, world: Photos, models: dict[str, Path]) -> dict[str, Report]:
    """Return every stage's report."""
    made: dict[str, Report] = {}

    def keep(name: str, work: Callable[[], Report]) -> Report:
        made[name] = stages.report(name, work)
        return made[name]

    for method in plan.swept:
        swept = keep(f"sweep-{method}", partial(world_maps.sweep, method, plan))
        keep(f"solve-{method}", partial(world_maps.solve, method, swept, plan))
    for name in (COSFACE, STARTED):
        keep(f"solve-{name}", partial(world_maps.train, name, plan))
    names = [*plan.swept, COSFACE, STARTED]
    first = str(keep("headline", partial(world_maps.headline, names)).settings[CHOSEN])
    keep("own", partial(world_maps.fit_own, plan))
    keep("evaluation", partial(world_maps.evaluate, names, first))
    keep("paired", partial(world_maps.paired, names, first, plan))
    for method in (COSFACE, "gnull"):
        keep(f"compare-{method}", partial(world_maps.compare, method, plan))
    learned = [n for n in dict.fromkeys((first, "gnull", "svd")) if n in names]
    keep("residuals", partial(world_models.residuals, learned))
    keep("apart", world_models.tell_apart)
    keep("table 4", partial(world_models.table_4, models, plan.encoder))
    if plan.theory:
        keep("theory", partial(world_models.check_theory, models, plan))
    tested = [(p.name, p.path) for p in world.of("test")]
    keep("verdicts", partial(world_models.verdicts, first, tested))
    if plan.ablations:
        keep("ablation", partial(world_maps.ablate, plan))
    return made


# --- the results -------------------------------------------------------------------------------------------


def assembled(made: Mapping[str, Report], stages: Stages, plan: Plan, world: Photos) -> list[Report]:
    """Return the reports that are written: the world's own first, and those that have tables of their own."""
    findings = world_findings.find(made)
    evaluation = made["evaluation"]
    parts = [made[name] for name in ("paired", "residuals", "apart", "table 4", "own", "verdicts")]
    figures = [f for f in evaluation.figures if _wanted(f)]
    figures += [f for report in parts for f in report.figures]
    main = replace(
        evaluation,
        title="The miniature world: translations by two small diffusion models, traced",
        summary=[world_findings.lead(findings), *(f.sentence for f in findings)],
        data={**_described(plan, world), "findings": [f.to_dict() for f in findings]},
        settings={**_settings(made, plan), CHOSEN: made["headline"].settings[CHOSEN]},
        reproduce=["python -m benchmarks.world PHOTOS"],
        figures=[_rounded(f) for f in figures],
        curves=made[f"solve-{COSFACE}"].curves,
        caveats=[*_caveats(plan), *dict.fromkeys(c for r in (evaluation, *parts) for c in r.caveats)],
        timings=stages.seconds,
    )
    others = [made["sweep-gnull"], made["sweep-svd"], made[f"compare-{COSFACE}"], made["compare-gnull"]]
    others += [made[name] for name in ("ablation", "theory") if name in made]
    return [main, *map(_slim, others)]


def _wanted(figure: Figure) -> bool:
    """Tell whether a figure of the evaluation stands in one of the paper's tables: by domain or strength."""
    placed = figure.axes.keys() & {"domain", "strength"}
    alone = "model" in figure.axes and "strength" not in figure.axes  # the same as by domain
    return figure.name in KEPT and bool(placed) and not alone


def _slim(report: Report) -> Report:
    """Leave out of a sweep what its curves show, and digits that mean nothing."""
    figures, curves = report.figures, report.curves
    if report.kind == "sweep":
        figures = []
    if report.kind == "compare":
        # Of all pairs of maps those that are of one number of pairs.
        left_out = {c.label for c in curves if c.plot == "principal angles"} - set(world_maps.COMPARED)
        figures = [f for f in figures if f.group not in left_out]
        curves = [c for c in curves if c.label not in left_out]
    figures, curves = [_rounded(f) for f in figures], [_thinned(c) for c in curves]
    return replace(report, figures=figures, curves=curves, machine={})


def _thinned(curve: Curve) -> Curve:
    """Keep as many points of a spectrum as a plot can show."""
    if curve.low is not None or len(curve.x) <= POINTS:
        return curve
    kept = [round(i * (len(curve.x) - 1) / (POINTS - 1)) for i in range(POINTS)]
    return replace(curve, x=[curve.x[i] for i in kept], y=[curve.y[i] for i in kept])


def _rounded(figure: Figure) -> Figure:
    if figure.name.startswith("cos φ"):
        return figure  # it differs from 1 in its last digits
    value, *span = (float(f"{v:.{DIGITS}g}") for v in (figure.value, *(figure.interval or ())))
    return replace(figure, value=value, interval=(span[0], span[1]) if span else None)


def _described(plan: Plan, world: Photos) -> dict[str, Any]:
    originals = {split: len(world.of(split)) for split in SPLITS}
    made, distractors = world_pictures.read_translations(), len(world.listed) - len(world.origins)
    return {
        "originals": f"{len(world.origins)} photos that no network has seen: {originals}",
        "searched among": f"{len(world.listed)} photos, of which {distractors} are distractors",
        "translations": len(made),
        "training pairs of a": sum(r["split"] == "train" and r["model"] == "a" for r in made),
        "training pairs of b": sum(r["split"] == "train" and r["model"] == "b" for r in made),
        "test translations of each": sum(r["split"] == "test" and r["model"] == "a" for r in made),
    }


def _settings(made: Mapping[str, Report], plan: Plan) -> dict[str, Any]:
    chosen = {
        name.removeprefix("solve-"): r.settings for name, r in made.items() if name.startswith("solve-")
    }
    return {
        **{k: v for k, v in asdict(plan).items() if k not in ("swept", "ranks", "ablations")},
        "maps": {
            name: {k: v for k, v in s.items() if k not in ("out", "method")} for name, s in chosen.items()
        },
    }


def _caveats(plan: Plan) -> list[str]:
    out = [
        _FEW_PHOTOS,
        "Models and autoencoders have seen the distractors in training, and none of the originals.",
        "Prompts are class words that are not the photo's own; both models have the same ones.",
        _FEWER_PAIRS,
        "Findings rest on 95 % intervals over photos, one by one: among so many, one or two may be chance.",
        _OTHER_RULES,
        "Rank and λ of every gnull, of model b's pairs, too, are those that suit model a's validation pairs.",
    ]
    if plan != Plan():
        out.insert(
            0, "A try with other settings than the full run's (see the settings): no figure here means much."
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
