"""Documents whose last hole is an image made of another image: edited, or continued."""

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Text
from leon_jax.generate import context_limits
from leon_jax.generate.inputs import ImageInput, image_part, text_part
from leon_jax.generate.model import Model


def edit_document(image: ImageInput, instruction: str) -> Document:
    """The prompt of CM3Leon's instruction for edits (table 5).

    Raises:
      UserError: the image cannot be read, or the instruction is empty.
    """
    text = text_part("instruction", instruction)
    if not text.text:
        raise UserError("the instruction is empty; say what to change")
    task = Text("Edit first image following the instruction")
    return Document((task, image_part(image), text, Hole("image")))


def extend_document(
    model: Model, image: ImageInput, prompt: str, rows: float
) -> tuple[Document, str]:
    """A prompt with an image of which the first rows of tokens are kept.

    Args:
      model: tokenizes the image.
      image: the image.
      prompt: what the whole image shows.
      rows: the share that is kept, more than 0 and less than 1.

    Returns:
      The document, and how many rows are kept, in words.

    Raises:
      UserError: nothing, or all, of the image is kept; or an argument cannot be used.
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
