"""Sequences of published models that draw an image for a prompt and do nothing else.

CM3Leon's sequences (`leon_jax.tokenizers.documents`) serve every task. Most published models were
trained on one layout only:

    before   text   after   image codes, row by row
             or, for guidance, unconditional in place of the text

A family of such models differs from CM3Leon in five things. Each is stored once in the model
folder, so that loading a folder needs no table of families:

    what a layer is          `Form` and the sizes            header of decoder.safetensors
    ids of the tokens        `Vocabulary`                    header of decoder.safetensors
    layout of a sequence     `PromptTemplate`                header of decoder.safetensors
    text to tokens           a BPE or names of classes       text.json
    sampling                 `SamplingParams`                model.json

Only the layout is new here. It belongs to the weights, like the vocabulary: other weights in the
same folder would need another one. Ids, not strings, so that it does not depend on a tokenizer:

    family      before                          after               unconditional
    LlamaGen    -                               -                   the null class
    Chameleon   <s>                             <break>             no text
    SimpleAR    <|t2i|> A highly ... of         <|soi|>             a negative prompt
    Janus       <|User|>:                       <|Assistant|>: ...  <pad>, one for each text token

LlamaGen is the family that is converted. The others show that three tuples of ids are enough, but
for Janus, whose unconditional text is as long as the text, and for Lumina, whose grid ends each row
with an id.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Image, Part, Text
from leon_jax.tokenizers.class_names import ClassNames
from leon_jax.tokenizers.documents import DocumentTokenizer, Ids, split_query
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """The layout of the sequences of a family.

    Attributes:
      family: name of the family, for messages.
      unconditional: ids in place of the text, for guidance.
      before: ids before the text.
      after: ids between the text and the image.
    """

    family: str
    unconditional: tuple[int, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class TemplateTokenizer(DocumentTokenizer):
    """Encodes a text and its image, or the prompt for an image, in the layout of a template.

    Args:
      vocabulary, text, image_shape: see `DocumentTokenizer`.
      template: the layout.

    Raises:
      UserError: see `DocumentTokenizer`; or an id of the template is outside the vocabulary, or the
        unconditional prompt is empty.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text: TextTokenizer | ClassNames,
        image_shape: tuple[int, int],
        template: PromptTemplate,
    ):
        super().__init__(vocabulary, text, image_shape)
        self.template = template
        ids = (*template.before, *template.unconditional, *template.after)
        if not ids or not all(0 <= token < vocabulary.size for token in ids):
            raise UserError(
                f"the prompt template has the ids {list(ids)}; it needs ids from 0 to "
                f"{vocabulary.size - 1}"
            )

    def check_task(self, document: Document, num_docs: int = 0) -> None:
        """Checks that the document is a prompt for an image, or has no hole; see the base class.

        Raises:
          UserError: it is another task, or there are retrieved documents.
        """
        has_text_hole = any(_is_hole(part, "text") for part in document.parts)
        if num_docs or has_text_hole or not self._is_layout(document):
            raise UserError(self._refusal)

    def words(self, text: str) -> str:
        """Returns a prompt in words: the names of a class in place of its number.

        Raises:
          UserError: there is no such class.
        """
        if isinstance(self.text, ClassNames):
            return self.text.decode(self.text.encode(text))
        return text

    def encode(self, document: Document | Sequence[Document], is_open: bool | None = None) -> Ids:
        """Encodes a text and an image, or a prompt that ends before the image.

        Args:
          document: a text and an image, of which each may be a hole, or the image alone. Without a
            text, the ids are those of the unconditional prompt.
          is_open: has no effect; a hole for an image is always open.

        Raises:
          UserError: the document is of another task, the text cannot be encoded, or an image has no
            codes or codes that do not fit.
        """
        del is_open
        retrieved, query = split_query(document)
        if retrieved or not self._is_layout(query):
            raise UserError(self._refusal)
        text, image = query.parts[0], query.parts[-1]
        template = self.template
        content = self._encode_part(text) if isinstance(text, Text) else template.unconditional
        codes = self._encode_part(image) if isinstance(image, Image) else ()
        pieces = [template.before, content, template.after, codes]
        return np.concatenate(pieces, dtype=np.int32, casting="unsafe")

    def completion(self, document: Document | Sequence[Document], parts: Sequence[Part]) -> Ids:
        """Returns the codes of the image; no id follows them. See the base class.

        Raises:
          UserError: `parts` is not one image.
        """
        return super().completion(document, parts)[:-1]

    def decode(self, ids: Int[np.ndarray, "length"]) -> Document:
        """Decodes a complete sequence to a document; see the base class.

        The unconditional prompt gives a document with an image alone.

        Raises:
          UserError: the ids have another layout.
        """
        ids, template = self._unpadded(ids), self.template
        start, stop = len(template.before), len(ids) - self.image_tokens - len(template.after)
        before, text, after = ids[:start], ids[start : max(start, stop)], ids[max(start, stop) :]
        after, codes = np.split(after, [len(template.after)])
        if (tuple(before.tolist()), tuple(after.tolist())) != (template.before, template.after):
            raise UserError(f"the sequence of {len(ids)} ids has another layout")
        image = self._decode_part(codes, "image")
        if tuple(text.tolist()) == template.unconditional:
            return Document((image,))
        return Document((self._decode_part(text, "text"), image))

    @property
    def _refusal(self) -> str:
        return (
            f"a model of {self.template.family} draws one image for one prompt; it writes no text, "
            "reads no image and no retrieved documents, and fills no other hole"
        )

    @staticmethod
    def _is_layout(document: Document) -> bool:
        """Returns whether the document has an image, or its hole, after at most one text."""
        *texts, image = document.parts
        if len(texts) > 1 or not (isinstance(image, Image) or _is_hole(image, "image")):
            return False
        is_prompt = isinstance(image, Hole)
        return all(isinstance(t, Text) or (is_prompt and _is_hole(t, "text")) for t in texts)


def _is_hole(part: Part, modality: str) -> bool:
    return isinstance(part, Hole) and part.modality == modality
