"""Captions of photographs from their class words, and a tokenizer made of them."""

from __future__ import annotations

import csv
import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from latentstore.errors import UsageError

SOURCES = "SOURCES.csv"
"""The table beside the photographs: columns ``file`` and ``class``."""
TOKENS = 16
"""Longest caption, in tokens."""
END = "</w>"
"""Marks the end of a word."""


def read_words(sources: Sequence[Path]) -> dict[str, str]:
    """Return each photo's class words, by file name.

    The last part of a class's path counts: ``Vegetables/Pepper/Red-Bell-Pepper`` is a "red bell pepper".

    Raises
    ------
    UsageError
        No folder or tar file among ``sources`` holds ``SOURCES.csv``, or it lacks a column.
    """
    words = {row["file"]: as_words(row["class"]) for row in _rows(sources)}
    if not words:
        raise UsageError(
            f"No {SOURCES} lies in {', '.join(map(str, sources))}: captions are made of its columns `file` "
            "and `class`."
        )
    return words


def read_licences(sources: Sequence[Path]) -> dict[str, str]:
    """Return where each photo is from, and under which licence, by file name, as far as the table tells.

    Raises
    ------
    UsageError
        A table lacks a column.
    """
    return {
        row["file"]: ", ".join(filter(None, (row.get("path"), row.get("licence")))) or row["file"]
        for row in _rows(sources)
    }


def _rows(sources: Sequence[Path]) -> Iterator[dict[str, str]]:
    for text in _tables(sources):
        rows = csv.DictReader(io.StringIO(text))
        if not {"file", "class"} <= set(rows.fieldnames or ()):
            raise UsageError(f"{SOURCES} has the columns {rows.fieldnames}; it needs `file` and `class`.")
        yield from rows


def as_words(name: str) -> str:
    """Return a class's name as words."""
    last = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return " ".join(last.replace("_", " ").replace("-", " ").lower().split())


def _tables(sources: Sequence[Path]) -> Iterable[str]:
    for source in sources:
        if source.is_dir():
            for path in sorted(source.rglob(SOURCES)):
                yield path.read_text(encoding="utf-8")
            continue
        with tarfile.open(source) as tar:
            for member in tar:
                file = tar.extractfile(member) if Path(member.name).name == SOURCES else None
                if file is not None:
                    yield file.read().decode("utf-8")


def tokenizer(captions: Iterable[str]) -> Any:
    """Return a ``CLIPTokenizer`` to which every word of the captions is one token.

    A word that no caption holds falls apart into letters.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    blank = CLIPTokenizer().backend_tokenizer
    words = {
        word
        for caption in captions
        for word, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(caption))
    }
    alphabet = sorted(ByteLevel.alphabet())
    pairs = merges(words)
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *alphabet,
        *(a + END for a in alphabet),
        *map("".join, pairs),
    ]
    return CLIPTokenizer(
        vocab={token: k for k, token in enumerate(dict.fromkeys(tokens))},
        merges=pairs,
        model_max_length=TOKENS,
    )


def merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return the merges of byte-pair encoding (Sennrich et al., 2016) until each word is one token.

    The commonest pair first, and of equals the first in the alphabet: the trainer of `tokenizers` settles
    these by the order of a hash table, another one in every process.
    """
    split = {word: [*word[:-1], word[-1] + END] for word in sorted(set(words))}
    found: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in split.values() for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best)
        for parts in split.values():
            k = 0
            while k + 1 < len(parts):
                if (parts[k], parts[k + 1]) == best:
                    parts[k : k + 2] = ["".join(best)]
                k += 1
    return found
