"""Converts documents to token ids and back. Only this module knows the layout of a sequence.

    document             </s> part <break> part ... </s>
    with retrieval       </s> retrieved parts <break> ... <break> query parts </s>
    hole at the end      </s> part <break> ... <break>
                                                completion: part </s>
    hole before the end  </s> part <break> <sentinel:0> <break> part </s> <sentinel:0>
                                                completion: part <eoss> <sentinel:1> ...

The layouts are those of CM3Leon (Yu et al. 2023, figures 8 and 9, and its training code). A hole
before the end has the layout of CM3 masking, with the whole part masked. Text never becomes a
control token, because it is encoded with ids of the text range only.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Image, Modality, Part, Text
from leon_jax.tokenizers.class_names import ClassNames
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary

Ids = Int32[np.ndarray, "length"]


class DocumentTokenizer:
    """Encodes documents, builds prompts for their holes, and decodes the model's completions.

    For every document with holes, and `parts` that fit them:

        training example   concatenate([prompt(document), completion(document, parts)])
        decoding           fill(document, completion(document, parts)) has the holes filled

    Args:
      vocabulary: the joint id layout.
      text: the text tokenizer. Its tokens must fit the vocabulary's text range.
      image_shape: (rows, cols) of the codes of every image.

    Raises:
      UserError: the text tokenizer is larger than the text range, or the shape is not positive.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text: TextTokenizer | ClassNames,
        image_shape: tuple[int, int],
    ):
        if text.size > vocabulary.text_tokens:
            raise UserError(
                f"the text tokenizer has {text.size} tokens, but the vocabulary has room for "
                f"{vocabulary.text_tokens} (text_tokens)"
            )
        rows, cols = image_shape
        if rows < 1 or cols < 1:
            raise UserError(f"image_shape is {image_shape}; it must be (rows, cols), both positive")
        self.vocabulary = vocabulary
        self.text = text
        self.image_shape = (int(rows), int(cols))

    @property
    def image_tokens(self) -> int:
        """Number of ids of an image."""
        return self.image_shape[0] * self.image_shape[1]

    def check_task(self, document: Document, num_docs: int = 0) -> None:
        """Checks that models with this layout can fill the document's holes; here always.

        Args:
          document: a document, with or without holes.
          num_docs: number of retrieved documents before it.
        """

    def words(self, text: str) -> str:
        """Returns a prompt in words, for a retrieval encoder: here the text itself."""
        return text

    def encode(self, document: Document | Sequence[Document], is_open: bool | None = None) -> Ids:
        """Encodes a document, or retrieved documents followed by the query, without infills.

        A hole before the end becomes a sentinel (numbered from 0, in order). A hole at the end
        leaves the sequence open: it stops where the part would start. Any other sequence ends with
        `</s>`.

        Args:
          document: one document, or several with the query last.
          is_open: False encodes a hole at the end as a sentinel, too. None: the sequence is open
            if it has a hole at the end.

        Raises:
          UserError: a retrieved document has a hole, there are more holes than sentinels, or an
            image has no codes or codes that do not fit.
        """
        retrieved, query = split_query(document)
        for index, neighbour in enumerate(retrieved):
            if neighbour.holes:
                raise UserError(f"retrieved document {index} has a hole; only the query may")
        parts = [part for neighbour in retrieved for part in neighbour.parts] + list(query.parts)
        pieces: list[Sequence[int] | Ids] = [[self.vocabulary.eos]]
        is_open = _is_open(query) if is_open is None else is_open
        holes = 0
        for index, part in enumerate(parts):
            if index:
                pieces.append([self.vocabulary.break_id])
            if not isinstance(part, Hole):
                pieces.append(self._encode_part(part))
            elif index < len(parts) - 1 or not is_open:
                pieces.append([self._sentinel(holes)])
                holes += 1
        if not is_open:
            pieces.append([self.vocabulary.eos])
        # Unsafe casting, because an empty list of ids becomes floats.
        return np.concatenate(pieces, dtype=np.int32, casting="unsafe")

    def prompt(self, document: Document | Sequence[Document]) -> Ids:
        """Returns the prompt after which a model generates the content of a hole.

        If the document ends with a hole, it is that hole. The holes before it stay sentinels: `</s>
        <sentinel:0> <break>` is the prompt of unconditional images. Otherwise it is the first hole.

        Raises:
          UserError: the document has no hole, or `encode` cannot encode it.
        """
        _, query = split_query(document)
        if not query.holes:
            raise UserError("the document has no hole to fill; put a Hole where the content goes")
        ids = self.encode(document)
        if _is_open(query):
            return ids
        return np.append(ids, np.int32(self._sentinel(0)))

    def completion(self, document: Document | Sequence[Document], parts: Sequence[Part]) -> Ids:
        """Returns the correct completion of `prompt(document)`: the target of a training example.

        Args:
          document: a document with holes, or several with the query last.
          parts: the content of every hole, in order. If the document ends with a hole, only the
            content of that hole; the others stay masked.

        Raises:
          UserError: `parts` do not fit the holes in number or modality.
        """
        _, query = split_query(document)
        positions = query.holes[-1:] if _is_open(query) else query.holes
        if len(parts) != len(positions):
            raise UserError(f"there are {len(parts)} parts for {len(positions)} holes")
        ids: list[int] = []
        for index, (position, part) in enumerate(zip(positions, parts, strict=True)):
            modality = _modality(query, position)
            if not isinstance(part, Image if modality == "image" else Text):
                raise UserError(
                    f"part {index} is {type(part).__name__}; hole {index} takes {modality}"
                )
            if _is_open(query):
                return np.array([*self._encode_part(part), self.vocabulary.eos], np.int32)
            # The first sentinel belongs to the prompt.
            ids += [self._sentinel(index)] if index else []
            ids += [*self._encode_part(part), self.vocabulary.eoss]
        return np.array(ids, np.int32)

    def fill(
        self, document: Document | Sequence[Document], completion: Int[np.ndarray, "length"]
    ) -> Document:
        """Fills the holes of a document with the completion of `prompt(document)`.

        A hole at the end takes everything up to `</s>`, `<break>` or the end of the completion.
        Holes before the end are read as `content <eoss> <sentinel:1> content <eoss> ...`. The last
        `<eoss>` may be missing. Holes without content stay holes. Padding is ignored.

        Args:
          document: the argument of `prompt`. The last document of a list is filled.
          completion: the generated ids, without the prompt.

        Raises:
          UserError: the completion is malformed.
        """
        _, query = split_query(document)
        vocabulary = self.vocabulary
        ids = self._unpadded(completion)
        if not query.holes:
            raise UserError("the document has no hole to fill")
        if _is_open(query):
            position = query.holes[-1]
            stops = np.flatnonzero(np.isin(ids, [vocabulary.eos, vocabulary.break_id]))
            content = ids[: stops[0]] if len(stops) else ids
            return query.replace(position, self._decode_part(content, _modality(query, position)))
        ids = np.append(np.int32(self._sentinel(0)), ids)
        infills = self._infills(ids, complete=False)
        if len(infills) > len(query.holes):
            raise UserError(f"there are {len(infills)} infills for {len(query.holes)} holes")
        for position, content in zip(query.holes, infills, strict=False):
            part = self._decode_part(content, _modality(query, position))
            query = query.replace(position, part)
        return query

    def decode(self, ids: Int[np.ndarray, "length"]) -> Document:
        """Decodes a complete sequence to a document.

        The sequence is an encoded document without holes, with or without CM3 masking, or a prompt
        followed by its completion. The ids do not mark borders between retrieved documents, so all
        parts are in one document. Padding at the end is ignored. Images have codes, not pixels.

        Raises:
          UserError: the ids are not such a sequence. The message names the wrong id.
        """
        vocabulary = self.vocabulary
        ids = self._unpadded(ids)
        if len(ids) == 0 or ids[0] != vocabulary.eos:
            first = vocabulary.name(ids[0]) if len(ids) else "nothing"
            raise UserError(f"a document starts with </s>, not with {first}")
        ends = np.flatnonzero(ids[1:] == vocabulary.eos)
        if len(ends) != 1:
            problem = "has no </s> at its end" if len(ends) == 0 else "has more than one document"
            raise UserError(f"the sequence {problem}; a document ends with one </s>")
        source, tail = ids[1 : ends[0] + 1], ids[ends[0] + 2 :]
        pieces, start = [], 0
        holes = np.flatnonzero(vocabulary.is_sentinel(source))
        infills = self._infills(tail, complete=True)
        if len(holes) != len(infills):
            raise UserError(f"there are {len(infills)} infills for {len(holes)} sentinels")
        for index, (hole, infill) in enumerate(zip(holes.tolist(), infills, strict=True)):
            self._expect_sentinel(source[hole], index)
            pieces += [source[start:hole], infill]
            start = hole + 1
        source = np.concatenate([*pieces, source[start:]])
        breaks = np.flatnonzero(source == vocabulary.break_id)
        segments = np.split(source, breaks)
        return Document(
            tuple(
                self._decode_part(segment[1:] if index else segment)
                for index, segment in enumerate(segments)
            )
        )

    def _encode_part(self, part: Part) -> list[int] | Ids:
        if isinstance(part, Text):
            start = self.vocabulary.text_start
            return [start + token for token in self.text.encode(part.text)]
        if not isinstance(part, Image):
            raise UserError(f"a {type(part).__name__} cannot be encoded as a part")
        if part.codes is None:
            raise UserError("the image has no codes yet; encode it with the image tokenizer first")
        if part.codes.shape != self.image_shape:
            raise UserError(
                f"the image has {list(part.codes.shape)} codes; this tokenizer takes "
                f"{list(self.image_shape)}"
            )
        if part.codes.max() >= self.vocabulary.image_codes:
            raise UserError(
                f"the image has code {part.codes.max()}; the vocabulary has "
                f"{self.vocabulary.image_codes} image codes"
            )
        return self.vocabulary.image_start + part.codes.ravel()

    def _decode_part(self, ids: Ids, modality: str | None = None) -> Part:
        """Decodes one part. It must have the given modality; None: either modality."""
        vocabulary = self.vocabulary
        image = vocabulary.is_image(ids)
        if modality is None:
            modality = "image" if image.any() else "text"
        correct = image if modality == "image" else vocabulary.is_text(ids)
        if not correct.all():
            wrong = vocabulary.name(ids[np.flatnonzero(~correct)[0]])
            raise UserError(f"{wrong} is inside a part that is {modality}")
        if modality == "text":
            return Text(self.text.decode((ids - vocabulary.text_start).tolist()))
        if len(ids) != self.image_tokens:
            raise UserError(f"an image has {self.image_tokens} ids, not {len(ids)}")
        return Image(codes=(ids - vocabulary.image_start).reshape(self.image_shape))

    def _infills(self, ids: Ids, *, complete: bool) -> list[Ids]:
        """Splits `<sentinel:0> content <eoss> <sentinel:1> content <eoss> ...` into contents."""
        contents: list[Ids] = []
        start = 0
        for stop in [*np.flatnonzero(ids == self.vocabulary.eoss).tolist(), len(ids)]:
            if start == len(ids):
                break
            if stop == len(ids) and complete:
                raise UserError("the last infill has no <eoss> at its end")
            if start == stop:
                raise UserError("an <eoss> is where a sentinel was expected")
            self._expect_sentinel(ids[start], len(contents))
            contents.append(ids[start + 1 : stop])
            start = stop + 1
        return contents

    def _expect_sentinel(self, token: int, index: int) -> None:
        if token != self._sentinel(index):
            name = self.vocabulary.name(token)
            raise UserError(f"{name} is where <sentinel:{index}> was expected")

    def _sentinel(self, index: int) -> int:
        if index >= self.vocabulary.sentinels:
            raise UserError(
                f"the document has more than {self.vocabulary.sentinels} holes, one for each "
                "sentinel of the vocabulary"
            )
        return self.vocabulary.sentinel(index)

    def _unpadded(self, ids: Int[np.ndarray, "length"]) -> Ids:
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise UserError(f"ids must be one row of integers, not {ids.dtype}{list(ids.shape)}")
        ids = ids.astype(np.int32)
        content = np.flatnonzero(ids != self.vocabulary.pad)
        return ids[: content[-1] + 1] if len(content) else ids[:0]


def split_query(document: Document | Sequence[Document]) -> tuple[list[Document], Document]:
    """Returns the retrieved documents, and the query, which is the last document."""
    documents = [document] if isinstance(document, Document) else list(document)
    if not documents:
        raise UserError("there is no document to encode: the list is empty")
    return documents[:-1], documents[-1]


def _modality(document: Document, position: int) -> Modality:
    """Returns the modality of the hole at `position`."""
    hole = document.parts[position]
    assert isinstance(hole, Hole)
    return hole.modality


def _is_open(document: Document) -> bool:
    """Returns whether the document ends with a hole, which is filled by causal generation."""
    return isinstance(document.parts[-1], Hole)
