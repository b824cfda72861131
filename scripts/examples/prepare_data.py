#!/usr/bin/env python3
"""Make a dataset for Megatron from text on this machine; nothing is downloaded.

python scripts/examples/prepare_data.py --output runs/data/stdlib
python scripts/examples/prepare_data.py --output runs/data/docs --text docs --max-mib 1

Every machine with Python has some text: the source of its standard library. It becomes a
dataset in Megatron's own format (``core/datasets/indexed_dataset.py``), one token a byte and
one document a file. Any release reads it with its ``NullTokenizer``, which needs no vocabulary
file and takes the last number of the vocabulary for the end of a document
(``core/tokenizers/text/libraries/null_tokenizer.py``).
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

END_OF_DOCUMENT = 256
"""The token after each document: the first number that is not a byte."""

VOCABULARY = 257
"""The bytes and the end of a document."""

DEFAULT_BYTES = 8 * 2**20
"""How much text is taken unless more is asked for."""

SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True)
class TextDataset:
    """A dataset on disk, ``<prefix>.bin`` and ``<prefix>.idx``, and what is in it."""

    prefix: Path
    documents: int
    tokens: int

    def flags(self) -> list[str]:
        """Return Megatron's flags to train on it."""
        return [
            "--data-path",
            str(self.prefix),
            "--tokenizer-type",
            "NullTokenizer",
            "--vocab-size",
            str(VOCABULARY),
        ]


def standard_library() -> Path:
    """Return the folder with the source of Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def write_dataset(
    prefix: str | Path,
    folder: str | Path | None = None,
    max_bytes: int = DEFAULT_BYTES,
) -> TextDataset:
    """Write the text of ``folder`` as a dataset of Megatron.

    Args:
        prefix: where to write: ``<prefix>.bin`` and ``<prefix>.idx``.
        folder: where to read, with all folders below; the ``.py`` files of the standard
            library if not given. Files are taken in the order of their paths, so the
            same folder gives the same dataset, byte for byte. What is not UTF-8 text is
            left out.
        max_bytes: stop after so much text; the last file is cut there.

    Raises:
        ValueError: there is no text in the folder, or ``max_bytes`` leaves no room for any.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes = {max_bytes}: ask for at least one byte of text")
    source = standard_library() if folder is None else Path(folder)
    if not source.is_dir():
        raise ValueError(f"no folder at {str(source)!r}: give one that has text files")
    suffix = ".py" if folder is None else ""
    texts = _texts(source, suffix, max_bytes)
    first = next(texts, None)
    if first is None:
        raise ValueError(
            f"no text in {str(source)!r}: there is no non-empty UTF-8 file"
            f"{' named *' + suffix if suffix else ''} in it or in the folders below. "
            "Give a folder that has some."
        )
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    return _write(prefix, itertools.chain([first], texts))


def _write(prefix: Path, texts: Iterable[bytes]) -> TextDataset:
    """Write the two files; they appear complete or not at all."""
    # Imported late: it takes seconds, and must not come before the CPU backend.
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    bin_part, idx_part = Path(f"{prefix}.bin.part"), Path(f"{prefix}.idx.part")
    documents = tokens = 0
    try:
        builder = IndexedDatasetBuilder(str(bin_part), dtype=np.uint16)
        for text in texts:
            document = np.empty(len(text) + 1, dtype=np.uint16)
            document[:-1] = np.frombuffer(text, dtype=np.uint8)
            document[-1] = END_OF_DOCUMENT
            builder.add_document(document, [len(document)])
            documents += 1
            tokens += len(document)
        builder.finalize(str(idx_part))
        os.replace(bin_part, f"{prefix}.bin")
        os.replace(idx_part, f"{prefix}.idx")
    finally:
        bin_part.unlink(missing_ok=True)
        idx_part.unlink(missing_ok=True)
    return TextDataset(prefix, documents, tokens)


def _texts(folder: Path, suffix: str, max_bytes: int) -> Iterator[bytes]:
    """Yield the text of each file, in order, until ``max_bytes`` are out."""
    left = max_bytes
    for path in _files(folder):
        if left == 0:
            return
        if not path.name.endswith(suffix):
            continue
        content = path.read_bytes()
        if content and _is_text(content):
            yield content[:left]
            left -= min(left, len(content))


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, sorted, without hidden ones and installed packages."""
    entries = sorted(folder.iterdir())
    for entry in entries:
        if entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS:
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _files(entry)
        elif entry.is_file():
            yield entry


def _is_text(content: bytes) -> bool:
    """Tell text from other files: UTF-8 without a zero byte."""
    try:
        return "\0" not in content.decode("utf-8")
    except UnicodeDecodeError:
        return False


def main() -> int:
    """Write the dataset and print the flags to train on it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument(
        "--text",
        metavar="DIR",
        help=f"folder of UTF-8 text files (default: the .py files of {standard_library()})",
    )
    parser.add_argument(
        "--max-mib",
        type=float,
        default=DEFAULT_BYTES / 2**20,
        metavar="N",
        help="take at most N MiB of text (default: %(default)g)",
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # Megatron names each optional package it does not find
    try:
        dataset = write_dataset(
            arguments.output, arguments.text, max_bytes=int(arguments.max_mib * 2**20)
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{dataset.documents} documents, {dataset.tokens} tokens (one a byte)")
    print(f"train on it with: {shlex.join(dataset.flags())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
