"""Captions as tokens: byte-pair encoding learnt from the training captions (Sennrich et al., arXiv 1508.07909).

The alphabet is the 256 bytes, not letters, so that no caption is unknown: a word that was never seen is spelt in
pieces that were. Encoding is Hugging Face `tokenizers`'; what was learnt is the list of merges, which lies in a buffer:
a checkpoint carries its own tokenizer.

    id 0            padding
    id 1 … 256      the bytes
    id 257 + k      what merge k makes of two tokens
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING = 0
BYTES = 256
UNUSED = -1  # in place of a merge that the captions had nothing for


class Captions(nn.Module):
    """Captions (B strings) -> ids (B, length) int64 in 0 … vocabulary − 1, padded at the end.

    vocabulary    number of ids: padding, 256 bytes, and at most as many merges as are left
    length        tokens of a caption; what goes beyond is cut off

    Letters are made small and runs of blanks one blank, as nobody means anything by them. Before `learn` every caption
    is spelt in bytes. Raises `ValueError` for numbers that leave no room.
    """

    merges: Tensor  # (vocabulary − 257, 2) int32, the tokens that each merge joins, counted from 0 = the first byte

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        if vocabulary <= BYTES:
            raise ValueError(f"vocabulary: {vocabulary}; at least {BYTES + 1}: padding and the {BYTES} bytes")
        if length < 1:
            raise ValueError(f"length: {length}; a caption needs room for at least one token")
        self.vocabulary, self.length = vocabulary, length
        unused = torch.full((vocabulary - BYTES - 1, 2), UNUSED, dtype=torch.int32)
        self.register_buffer("merges", unused)

    def learn(self, captions: Iterable[str]) -> None:
        """Learn the merges from these captions, for good: a function of how often each word stands in them. Raises
        `ValueError` where there is none."""
        texts = [_plain(caption) for caption in captions]
        if not any(texts):
            raise ValueError("captions: none given to learn a vocabulary from")
        merges = _learn(texts, self.vocabulary - 1)
        self.merges.fill_(UNUSED)
        self.merges[: len(merges)] = torch.tensor(merges, dtype=torch.int32).view(-1, 2)

    def encode(self, captions: Sequence[str | None]) -> Tensor:
        """(B, length) int64, on the buffer's device. None, no caption, is padding alone."""
        tokenizer = self._tokenizer()
        ids = torch.full((len(captions), self.length), PADDING)
        for row, caption in zip(ids, captions, strict=True):
            known = tokenizer.encode(_plain(caption or "")).ids[: self.length]
            row[: len(known)] = torch.tensor(known, dtype=torch.int64) + 1
        return ids.to(self.merges.device)

    def decode(self, ids: Tensor) -> list[str]:
        """The captions that ids (B, length) stand for."""
        tokenizer = self._tokenizer()
        return [tokenizer.decode([k - 1 for k in row if k != PADDING]).strip() for row in ids.tolist()]

    def _tokenizer(self) -> Tokenizer:
        return _tokenizer(tuple(map(tuple, self.merges.tolist())))


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())


def _blank(merges: list[tuple[str, str]], vocabulary: dict[str, int]) -> Tokenizer:
    """A byte-level tokenizer of these merges. A word's token has the blank before it, and so has the first word's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _alphabet() -> list[str]:
    """The printable letters that stand for the bytes, in a fixed order."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _learn(texts: list[str], size: int) -> list[tuple[int, int]]:
    """At most size − 256 merges, as pairs of tokens."""
    from tokenizers import trainers

    tokenizer = _blank([], {letter: k for k, letter in enumerate(_alphabet())})
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=_alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = {letter: k for k, letter in enumerate(_alphabet())}
    merges = []
    for left, right in pairs[: size - BYTES]:
        merges.append((tokens[left], tokens[right]))
        tokens.setdefault(left + right, len(tokens))
    return merges


@lru_cache(maxsize=16)
def _tokenizer(merges: tuple[tuple[int, int], ...]) -> Tokenizer:
    """Raises `ValueError` for merges of tokens that are not there, as of a checkpoint of something else."""
    tokens = {letter: k for k, letter in enumerate(_alphabet())}
    letters, pairs = list(tokens), []
    for k, (left, right) in enumerate(merge for merge in merges if merge != (UNUSED, UNUSED)):
        if not (0 <= left < len(letters) and 0 <= right < len(letters)):
            raise ValueError(f"merges: merge {k} joins tokens {left} and {right}, but there are {len(letters)} by then")
        pair = (letters[left], letters[right])
        pairs.append(pair)
        if "".join(pair) not in tokens:
            letters.append("".join(pair))
            tokens[letters[-1]] = len(tokens)
    return _blank(pairs, tokens)
