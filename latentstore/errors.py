"""Named failures of the data side. Each message says what, the values, and what to do."""

from __future__ import annotations


class LatentStoreError(Exception):
    """Base of every expected failure; the command line prints its text and exits with ``exit_code``."""

    exit_code = 1


class UsageError(LatentStoreError, ValueError):
    """The request itself is off: a wrong path, an empty folder, an unknown name."""

    exit_code = 2


class StoreError(LatentStoreError):
    """A store cannot be used as asked."""


class StoreNotFoundError(UsageError, FileNotFoundError):
    """There is no store at the path."""


class StoreFormatError(StoreError, ValueError):
    """The folder is no latentstore store, or of another schema version."""


class StoreLockedError(StoreError, BlockingIOError):
    """Another process is writing to the store."""


class StoreWriteError(StoreError, OSError):
    """Writing failed: disk full, no permission, a vanished disk."""


class StoreIncompleteError(StoreError):
    """The store still has rows that were never written."""


class CorruptStoreError(StoreError, ValueError):
    """Bytes on disk do not match their record."""


class SpaceMismatchError(LatentStoreError, ValueError):
    """Latents of two different spaces were about to meet."""


class ManifestError(UsageError):
    """An input manifest cannot be used."""


class EncoderError(UsageError):
    """The encoder, or a model that translates, is unknown, cannot be loaded, or of the wrong kind."""


class EncoderUnreachableError(EncoderError):
    """The hub does not answer: the name may well be right."""

    exit_code = 1


class ImageError(LatentStoreError, ValueError):
    """An image cannot be used; ``status`` is the name recorded in the row."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.facts: object | None = None


class ResultsError(LatentStoreError, ValueError):
    """A results file does not fit the schema."""


class MissingExtraError(LatentStoreError, ImportError):
    """An optional dependency is needed; the message holds the pip line."""
