"""How many words a tokenizer has, from its files, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_bpipe.estimate.errors import EstimateError


def tokenizer_size(kind: str | None, model: str | None, words: str | None) -> int | None:
    """Words of --tokenizer-type with its --tokenizer-model or --vocab-file; None: not to be known.

    Read are vocab.json and vocab.txt (GPT-2, BERT), tokenizer.json with what was added to it
    (Hugging Face) and SentencePiece models.  A file that is named and not here gives None, one that
    cannot be read EstimateError.
    """
    for text in (words, model):
        path = Path(text) if text else None
        if path is None or not path.exists():
            continue
        try:
            if path.is_dir():
                path = next((path / n for n in ("tokenizer.json",) if (path / n).exists()), path)
            if path.suffix == ".json":
                return _json_size(path)
            if path.suffix == ".txt":
                return len(path.read_text(encoding="utf-8").splitlines())
            if path.suffix == ".model" and kind != "TikTokenizer":
                return _pieces(path.read_bytes())
        except (OSError, ValueError, IndexError) as error:
            raise EstimateError(f"{path} is no tokenizer that can be read: {error}") from error
    return None


def _json_size(path: Path) -> int:
    data = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        vocab = data["model"].get("vocab", {})
        known = {entry[0] for entry in vocab} if isinstance(vocab, list) else set(vocab)
        return len(known | {added["content"] for added in data.get("added_tokens", [])})
    return len(data)


def _pieces(data: bytes) -> int:
    """Entries of field 1 of a SentencePiece model: sentencepiece_model.proto, ModelProto.pieces."""
    at, count = 0, 0
    while at < len(data):
        tag, at = _varint(data, at)
        count += tag >> 3 == 1
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = _varint(data, at)
            at += size
        else:
            raise ValueError(f"wire type {kind}")
    return count


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
