"""The text tokenizer of OpenAI's CLIP: BPE over the bytes of lower-cased text.

The ids equal those of the CLIPTokenizer of transformers. OpenAI's program first repairs broken
encodings and undoes HTML escapes; this tokenizer does not change such text.
"""

import os
from collections.abc import Sequence
from typing import Self

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from leon_jax import storage
from leon_jax.config import UserError

WHOLE = "tokenizer.json"
PARTS = ("vocab.json", "merges.txt")
START, END = "<|startoftext|>", "<|endoftext|>"
# Marks the last token of a word, because this vocabulary has no spaces.
END_OF_WORD = "</w>"
# A word is the ending of a contraction, a run of letters, one digit, or a run of other characters.
WORD = r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class CLIPTextTokenizer:
    """Converts text to CLIP's ids and back, without start and end. Create it with `load`.

    Text that spells a control token ("<|endoftext|>") becomes that token, as in transformers.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()
        self.start, self.end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Reads tokenizer.json or, if it is missing, vocab.json and merges.txt.

        Raises:
          UserError: the files are missing or damaged, or have another kind of tokenizer.
        """
        folder = storage.local(folder)
        paths = [folder / WHOLE]
        if not paths[0].is_file():
            paths = [folder / name for name in PARTS]
        if not all(path.is_file() for path in paths):
            raise UserError(
                f"{folder} has no text tokenizer; it needs {WHOLE}, or {' and '.join(PARTS)}"
            )
        try:
            if len(paths) == 1:
                tokenizer = tokenizers.Tokenizer.from_file(str(paths[0]))
            else:
                tokenizer = _build(*models.BPE.read_file(*map(str, paths)))
        except Exception as error:  # the package raises bare Exceptions
            raise UserError(f"the text tokenizer in {folder} is damaged") from error
        model = tokenizer.model
        if not isinstance(model, models.BPE) or model.end_of_word_suffix != END_OF_WORD:
            raise UserError(f"{paths[0]} is not CLIP's tokenizer: a BPE of words ending in </w>")
        for token in (START, END):
            if tokenizer.token_to_id(token) is None:
                raise UserError(f"{paths[0]} is not CLIP's tokenizer: it has no token {token}")
        # A file may have the truncation and padding that were set when it was saved.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Converts text to any number of ids, without start and end. The empty text has no ids.

        Raises:
          UserError: the text has a lone surrogate, which is not valid unicode.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError(f"the text is not valid unicode: {text[:40]!r}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Converts ids to lower-case text with one space between words.

        `encode` converts the text to the same ids. Bytes that are not UTF-8, for example half of a
        character, become U+FFFD.

        Raises:
          UserError: an id is not in 0..size-1.
        """
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.size:
                raise UserError(f"text id {token} is not in 0..{self.size - 1}")
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text.replace(END_OF_WORD, " ").strip()


def _build(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Builds the tokenizer that tokenizer.json describes, from vocab.json and merges.txt."""
    model = models.BPE(
        vocab, merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Everything that is not a word is removed. These are the spaces.
            pre_tokenizers.Split(tokenizers.Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (START, END) if token in vocab]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in special]
    )
    return tokenizer
