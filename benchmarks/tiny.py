"""Claim: what the learned encoder ``tiny`` gains and loses against the linear ``patch`` when searched in.

Photographs that ``tiny`` was not trained on, altered, against all photographs of the folder: raw, centred,
PCA-whitened and the analytic map at its defaults.

    python -m benchmarks.tiny --images FOLDER [--out FILE]
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import latentstore
from latentstore import attacks, images, results
from latentstore.encoders import Encoder, load_encoder
from latentstore.results import Figure, Report, Role
from latentstore.training.fit_patch import held_out
from solvers.analytic import Analytic
from solvers.closed import Centred, Identity, PairData, Pca
from solvers.metrics import average_precision, bootstrap, paired_bootstrap
from solvers.projection import Projection

ENCODERS = {"patch": "patch", "tiny": str(Path(latentstore.__file__).parent / "data" / "tiny")}
ATTACKS = (attacks.jpeg(10), attacks.crop(0.9), attacks.colour(0.5), attacks.colour(1.0))
DIGITS = 5
OUT = Path(__file__).parent / "results" / "tiny.json"


def photos(folder: Path) -> tuple[list[Image.Image], np.ndarray]:
    """Return the folder's pictures, and which of them (indices) no training saw."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".png"))
    pictures = [images.decode(path.read_bytes())[0] for path in paths]
    return pictures, np.array([i for i, path in enumerate(paths) if held_out(path.name)])


def encode(encoder: Encoder, pictures: list[Image.Image]) -> np.ndarray:
    """Return (n, dim) latents."""
    size, parts = encoder.space.image_size, []
    for at in range(0, len(pictures), encoder.batch):
        batch = np.stack([images.resize(p, size) for p in pictures[at : at + encoder.batch]])
        parts.append(encoder.encode(batch, np.arange(len(batch))))
    return np.concatenate(parts)


def maps(gallery: np.ndarray) -> Iterator[tuple[str, Projection]]:
    data = PairData.from_gallery(gallery)
    yield "raw", Identity().fit(data).projection()
    yield "centred", Centred().fit(data).projection()
    for exponent, sign in ((0.25, "¼"), (0.5, "½")):
        yield f"PCA-whitened {sign}, rank 512", Pca(512, exponent).fit(data).projection()
    yield "analytic", Analytic().fit(data).projection()


def precisions(
    encoder: Encoder, pictures: list[Image.Image], asked: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """Return average precision by attack, map and query."""
    gallery = encode(encoder, pictures)
    attacked = {
        attack.name: encode(
            encoder, [attack(pictures[i], zlib.crc32(f"{attack.name} {i}".encode())) for i in asked]
        )
        for attack in ATTACKS
    }
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in attacked}
    for name, projection in maps(gallery):
        references = projection.references(gallery)
        for attack, queries in attacked.items():
            ranking = average_precision(
                projection.queries(queries), asked, references, np.arange(len(gallery))
            )
            found[attack][name] = ranking.ap
    return found


def figures(found: dict[str, dict[str, dict[str, np.ndarray]]]) -> Iterator[Figure]:
    """Yield mAP by encoder, attack and map, and the paired gains of ``tiny``; intervals over photos."""
    for attack in (a.name for a in ATTACKS):
        for name in found["patch"][attack]:
            role: Role = "method" if name == "analytic" else "control"
            ap = {encoder: found[encoder][attack][name] for encoder in ENCODERS}
            each = np.arange(len(ap["patch"]))
            for encoder, values in ap.items():
                interval = bootstrap(values, each)
                yield _figure("mAP", f"{encoder}, {name}", role, attack, values, interval)
            interval = paired_bootstrap(ap["tiny"], ap["patch"], each)
            yield _figure(
                "gain over patch", f"tiny, {name}", role, attack, ap["tiny"] - ap["patch"], interval
            )


def _figure(
    name: str, subject: str, role: Role, group: str, values: np.ndarray, interval: tuple[float, float]
) -> Figure:
    value, low, high = (round(float(x), DIGITS) for x in (values.mean(), *interval))
    return Figure(name, value, subject, role, group, "fraction", (low, high), len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="the folder that tiny was trained on")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    pictures, asked = photos(args.images)
    found = {
        name: precisions(load_encoder(source, device="cpu"), pictures, asked)
        for name, source in ENCODERS.items()
    }
    lines = list(figures(found))
    for f in lines:
        low, high = (100 * x for x in f.interval or (f.value, f.value))
        print(f"{f.group:<12} {f.name:<16} {f.subject:<32} {100 * f.value:6.2f} {low:6.2f} {high:6.2f}")
    report = Report(
        kind="benchmark",
        title="The learned encoder and the linear one, on altered photographs",
        summary=[
            "Held-out photos, altered, against all photos; 95 % intervals over photos, paired for gains.",
            "Pictures come back better from tiny; they are not found more often for it.",
        ],
        data={"images": "own folder", "gallery": len(pictures), "queries": len(asked)},
        settings={"attacks": [a.name for a in ATTACKS]},
        figures=lines,
        caveats=[
            "Attacks on pixels; no translation by a text-guided diffusion model.",
            "The gallery holds the photos that both encoders were fitted on; the queries are held-out ones.",
        ],
        reproduce=["python -m benchmarks.tiny --images FOLDER"],
        **results.stamp(),
    )
    report.write(args.out)


if __name__ == "__main__":
    main()
