"""Where images come from: folders and lists, tar shards, and whatever fsspec reads."""

from latentstore.sources.places import SourceError
from latentstore.sources.source import Source

__all__ = ["Source", "SourceError"]
