"""How large the miniature world is, what is measured in it, and the photos that it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODELS = ("a", "b")
"""Model a is learned from and seen; b is another one, with another autoencoder, and unseen."""
SIZE = 256
SPLITS = {"train": 0.5, "validation": 0.1, "test": 0.4}
"""Shares of the originals, in the order of a hash of their names."""
WORLD, BOTH, WITHOUT = Path("world.zarr"), Path("both.zarr"), Path("without.zarr")
"""What is solved, searched and reported on; the pairs of both models; the world, test originals taken out."""


@dataclass(frozen=True)
class Plan:
    """How large the world is, and how it is translated and measured.

    Attributes
    ----------
    prompts : tuple of (str, int)
        Each model with its prompts of an original that is trained or chosen on, at each training strength.
    train_strengths, test_strengths : tuple of float
    steps : int
        Of the whole schedule; a strength runs that part of them.
    guidance : float
    origins, references : int or None
        Photos that are used at most: originals, and what they are searched among.
    swept : tuple of str
        Methods whose rank is chosen on validation among ``ranks``.
    rank : int
        Of CosFace, and of what is said of a higher rank than ``low_rank``.
    cosface_steps, ablation_steps : int
    ablations : tuple of str
        Of ``latentstore ablate``.
    repeats : int
        Resamples, and halvings of the originals.
    batch : int
        Pictures translated at once.
    encoder : str
        Of the latents that are searched.
    theory : bool
        Check the paper's lemmas, too.
    """

    prompts: tuple[tuple[str, int], ...] = (("a", 2), ("b", 1))
    train_strengths: tuple[float, ...] = (0.6, 0.9)
    test_strengths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    steps: int = 10
    guidance: float = 3.0
    origins: int | None = None
    references: int | None = None
    swept: tuple[str, ...] = (
        *("gnull", "svd", "plda", "cca"),
        *("regression", "procrustes", "kissme", "analytic"),
    )
    ranks: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    rank: int = 512
    low_rank: int = 64
    cosface_steps: int = 300
    ablations: tuple[str, ...] = ()
    ablation_steps: int = 400
    repeats: int = 10
    batch: int = 8
    encoder: str = "tiny"
    theory: bool = False


SMALL = Plan(
    prompts=(("a", 2), ("b", 1)),
    test_strengths=(0.5, 0.9),
    steps=2,
    origins=40,
    references=60,
    swept=("gnull", "svd"),
    ranks=(4, 16),
    rank=16,
    low_rank=4,
    cosface_steps=4,
    ablations=("layers",),
    ablation_steps=4,
    repeats=2,
)
"""A few pictures and hardly any steps: a try of everything, of which no figure means anything."""


@dataclass(frozen=True)
class Photo:
    """A photo of the world: its name, its class words, and where it stands."""

    name: str
    words: str
    split: str
    origin: bool

    @property
    def path(self) -> str:
        """Of its file, in the work folder."""
        return f"photos/{self.name}.png"


@dataclass(frozen=True)
class Photos:
    """The world's photos, and the class words of all photos."""

    listed: tuple[Photo, ...]
    vocabulary: tuple[str, ...]

    @property
    def origins(self) -> list[Photo]:
        """Photos that neither an autoencoder nor a model has seen."""
        return [p for p in self.listed if p.origin]

    def of(self, *splits: str) -> list[Photo]:
        """Return the originals of some splits."""
        return [p for p in self.origins if p.split in splits]
