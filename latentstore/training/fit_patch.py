"""Fit the built-in ``patch`` encoder: PCA of 8 x 8 RGB patches to 4 numbers.

    python -m latentstore.training.fit_patch PHOTOS [PHOTOS …] [--out FOLDER]

``PHOTOS`` are folders or tar files of photographs. One in ten, by hash of the file name, is held out for
the PSNR in the card. Writes ``patch.safetensors`` and the card ``patch.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from latentstore import images
from latentstore.encoders import PatchEncoder, patches, to_unit
from latentstore.errors import ImageError
from latentstore.manifest import IMAGE_SUFFIXES

CHANNELS = 4
SIZE = 256


def read_photos(sources: list[Path]) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Yield (name, (256, 256, 3) uint8 array) of every image in folders and tar files.

    Raises
    ------
    ImageError
        One of them is damaged: weights should not depend on what was skipped.
    """
    for source in sources:
        for name, data in _files(source):
            try:
                image, _ = images.decode(data)
            except ImageError as exc:
                reason = f"{name} in {source} cannot be trained on: {exc.reason}. Mend it, or take it out."
                raise ImageError(exc.status, reason) from exc
            yield name, images.resize(image, SIZE)


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
            yield path.name, path.read_bytes()
        return
    with tarfile.open(source) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None and Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(member.name).name, file.read()


def held_out(name: str) -> bool:
    """Tell whether a photo is in the tenth that is never fitted on."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10 == 0


def fit(photos: list[npt.NDArray[np.uint8]]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the mean patch (192,) and the leading principal components (4, 192), signs fixed."""
    total, outer, n = np.zeros(192), np.zeros((192, 192)), 0
    for photo in photos:
        x = patches(photo[None])[0].astype(np.float64)
        total += x.sum(0)
        outer += x.T @ x
        n += len(x)
    mean = total / n
    _, vectors = np.linalg.eigh(outer / n - np.outer(mean, mean))
    components = vectors[:, ::-1][:, :CHANNELS].T
    signs = np.sign(components[np.arange(CHANNELS), np.abs(components).argmax(1)])
    # safetensors writes the buffer as it lies: it must be in C order.
    return mean.astype(np.float32), np.ascontiguousarray(components * signs[:, None], dtype=np.float32)


def psnr(encoder: PatchEncoder, photos: list[npt.NDArray[np.uint8]]) -> float:
    """Return the mean over photos of the PSNR in dB (peak 2, pixels in [-1, 1], clipped)."""
    values = []
    for photo in photos:
        back = encoder.decode(encoder.encode(photo[None], np.zeros(1, np.int64)))[0]
        mse = float(((back.clip(-1, 1) - to_unit(photo)) ** 2).mean(dtype=np.float64))
        values.append(10 * np.log10(4 / max(mse, 1e-12)))
    return float(np.mean(values))


def main() -> None:
    """Fit, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", nargs="+", type=Path, help="folders or tar files of photographs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "data")
    args = parser.parse_args()

    fitted: list[npt.NDArray[np.uint8]] = []
    kept: list[npt.NDArray[np.uint8]] = []
    for name, photo in read_photos(args.photos):
        (kept if held_out(name) else fitted).append(photo)
    mean, components = fit(fitted)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({"mean": mean, "components": components}, args.out / "patch.safetensors")
    (args.out / "patch.safetensors").chmod(0o644)
    encoder = PatchEncoder(SIZE)
    card: dict[str, Any] = {
        "name": "patch",
        "what": "PCA of 8 x 8 RGB patches to 4 numbers: the best linear code of 4 x 32 x 32 numbers",
        "for": "trials; it is linear and knows nothing of what a picture shows",
        "photos_fitted": len(fitted),
        "photos_held_out": len(kept),
        "psnr_held_out_db": round(psnr(encoder, kept), 2),
        "psnr_fitted_db": round(psnr(encoder, fitted), 2),
        "weights_sha256": encoder.space.weights,
        "data": "3,526 photographs from GitHub mirrors of clothing-dataset-small (CC0-1.0), "
        "GroceryStoreDataset (MIT) and Caltech-101 (CC-BY-4.0, CaltechDATA D1.20086)",
        "command": "python -m latentstore.training.fit_patch PHOTOS",
    }
    (args.out / "patch.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
