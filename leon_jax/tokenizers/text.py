"""Byte-level BPE: converts any string to ids 0..n-1 and back, without loss.

It has no special tokens. Text that looks like a control token ("<break>", "</s>") is encoded with
ordinary ids. The joint vocabulary adds an offset to these ids.
"""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from leon_jax import storage
from leon_jax.config import UserError

SMALLEST = 256  # one token for each byte
LARGEST = 56_320  # CM3Leon's text vocabulary


class TextTokenizer:
    """Converts strings to ids 0..n-1 and back.

    Create it with `TextTokenizer.train` or `TextTokenizer.load`. It can be pickled.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._size = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], size: int, *, split_digits: bool = False) -> Self:
        """Learns the merges from `texts`. The same texts always give the same tokenizer.

        Args:
          texts: training texts, in any order.
          size: the largest number of tokens, 256 to 56,320. Few texts give fewer tokens; `.size`
            is the actual number.
          split_digits: whether every digit is a token of its own, so that numbers have few tokens
            that occur often.

        Raises:
          UserError: `size` is out of range.
        """
        if not SMALLEST <= size <= LARGEST:
            raise UserError(f"size is {size}; a text vocabulary has {SMALLEST} to {LARGEST} tokens")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = _pre_tokenizer(split_digits)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Reads a file that `save` wrote.

        Raises:
          UserError: the file is missing, or is not a byte-level BPE without special tokens.
        """
        try:
            content = storage.path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise UserError(f"cannot read the text tokenizer {path}: {reason}") from error
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the package raises bare Exceptions
            raise UserError(f"{path} is not a tokenizer file") from error
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        if (
            not isinstance(tokenizer.model, models.BPE)
            or not _is_byte_level(content)
            or tokenizer.get_added_tokens_decoder()
            or not alphabet <= set(tokenizer.get_vocab())
        ):
            raise UserError(f"{path} is not a byte-level BPE tokenizer without special tokens")
        return cls(tokenizer)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the tokenizer as one JSON file (the format of the package `tokenizers`).

        Raises:
          UserError: the folder does not exist or cannot be written.
        """
        try:
            storage.write(storage.path(path), self._tokenizer.to_str(pretty=True))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """Converts text to ids in 0..size-1. The empty text has no ids.

        Raises:
          UserError: the text has a lone surrogate, which is not valid unicode.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError(f"the text is not valid unicode: {text[:40]!r}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Converts ids to text. Bytes that are not UTF-8 become U+FFFD.

        Raises:
          UserError: an id is not in 0..size-1.
        """
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.size:
                raise UserError(f"text id {token} is not in 0..{self.size - 1}")
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _pre_tokenizer(split_digits: bool) -> pre_tokenizers.PreTokenizer:
    """Returns the pre-tokenizer, across whose pieces no token reaches."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not split_digits:
        return words
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


def _is_byte_level(content: str) -> bool:
    """Returns whether a tokenizer file has one of the pre-tokenizers of `_pre_tokenizer`."""
    value = json.loads(content)["pre_tokenizer"] or {}
    kinds = [part["type"] for part in value.get("pretokenizers", [value]) if part]
    return kinds in (["ByteLevel"], ["Digits", "ByteLevel"])
