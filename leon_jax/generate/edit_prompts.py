"""Prompts that edit or extend an image: documents with an image hole at the end."""

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Text
from leon_jax.generate import context_limits
from leon_jax.generate.inputs import ImageInput, image_part, text_part
from leon_jax.generate.model import Model


def edit_document(image: ImageInput, instruction: str) -> Document:
    """Returns the prompt for an edit, in the format of CM3Leon's instructions (table 5).

    Args:
      image: the image to edit.
      instruction: the change to make.

    Raises:
      UserError: the image cannot be read, or the instruction is empty or has a lone surrogate.
    """
    text = text_part("instruction", instruction)
    if not text.text:
        raise UserError("the instruction is empty; say what to change")
    task = Text("Edit first image following the instruction")
    return Document((task, image_part(image), text, Hole("image")))


def extend_document(
    model: Model, image: ImageInput, prompt: str, rows: float
) -> tuple[Document, str]:
    """Returns a prompt with an image hole that begins with the first rows of an image's tokens.

    Args:
      model: the model whose image tokenizer encodes the image.
      image: the image.
      prompt: a description of the whole image.
      rows: fraction of the rows to keep, above 0 and below 1; rounded to whole rows of tokens.

    Returns:
      The document, and the number of kept rows as text, for example "4 of 8 rows".

    Raises:
      UserError: no row or every row is kept, the image cannot be read, or the prompt is empty, has
        a lone surrogate or does not fit the context.
    """
    height = model.tokenizer.image_shape[0]
    num_rows = round(rows * height) if 0 < rows < 1 else 0
    if not 0 < num_rows < height:
        raise UserError(
            f"rows is {rows}; it is a share, and an image has {height} rows of tokens, so "
            f"keep {1 / height:g} of it to {1 - 1 / height:g}"
        )
    text = text_part("prompt", prompt)
    context_limits.check_prompt(model.folder, text.text, 0)
    codes = model.encode_images(Document((image_part(image),))).codes
    return Document((text, Hole("image", codes[:num_rows]))), f"{num_rows} of {height} rows"
