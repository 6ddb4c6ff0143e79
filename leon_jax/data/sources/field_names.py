"""The usual names of fields with texts and images, and the captions that a record gives.

Every source that has fields uses these names. If a record has several of them, the first counts.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from leon_jax.data import svg_files
from leon_jax.data.sources.field_values import RecordError, check_text
from leon_jax.data.sources.raw_record import RawRecord, Reject

TEXT_NAMES = (
    "text", "caption", "captions", "texts", "TEXT", "Caption", "alt_text", "prompt", "title",
    "description",
)  # fmt: skip
# The order in formats whose programs write `caption`: img2dataset, TensorFlow Datasets.
CAPTION_FIRST = ("caption", "captions", *TEXT_NAMES)
# Fields with the path of an image file, or with the image itself.
IMAGE_NAMES = (
    "image", "file_name", "path", "image_path", "img", "picture", "filename", "file", "img_path",
    "image_file", "filepath", "file_path",
)  # fmt: skip
# Fields with an encoded image.
ENCODED_NAMES = ("jpg", "jpeg", "png", "webp")
_MAX_LISTED = 20


def choose(
    names: Collection[str], configured: str, usual: Sequence[str], content: str, kind: str = "field"
) -> str:
    """Returns the name of the field to read.

    Args:
      names: names of the fields that are there.
      configured: the name that the configuration gives, or "".
      usual: the usual names, the preferred ones first.
      content: "text" or "image".
      kind: what the source calls a field, for error messages.

    Raises:
      RecordError: none of the names is there. The message lists the fields, and the setting that
        chooses one.
    """
    for name in (configured,) if configured else usual:
        if name in names:
            return name
    raise RecordError("missing_field", missing(names, configured, usual, content, kind))


def missing(
    names: Collection[str], configured: str, usual: Sequence[str], content: str, kind: str = "field"
) -> str:
    """Returns why there is no text or image: the fields that are there, and what chooses one."""
    listed = ", ".join(list(names)[:_MAX_LISTED]) or "none"
    flag, setting = ("--text_field", "text") if content == "text" else ("--image_field", "picture")
    wanted = f"there is no {kind} {configured}" if configured else f"no {kind} holds the {content}"
    return (
        f"{wanted}; the {kind}s are {listed}; choose one with {flag}=NAME ({setting} of the "
        f"source), or use {', '.join(dict.fromkeys(usual[:2]))}"
    )


def filled(record: Mapping[str, Any]) -> list[str]:
    """Returns the names of the fields that have a value."""
    return [name for name, value in record.items() if value is not None]


def caption_records(
    metadata: dict[str, Any], captions: Any, image: bytes, name: str = "caption"
) -> list[RawRecord | Reject]:
    """Returns one record per caption of an image.

    The records of several captions have the keys KEY#1, KEY#2, ..., and form the group KEY unless
    the metadata names a group. A single caption, in a list or not, has the key KEY.

    Args:
      metadata: attributes of `RawRecord`, with the key KEY of the image.
      captions: a text, or a sequence of texts.
      image: the encoded image.
      name: name of the field in error messages.

    Raises:
      RecordError: there is no caption, or the only one is not a text.
    """
    if isinstance(captions, str | bytes) or not isinstance(captions, Sequence):
        captions = [captions]
    if not captions:
        raise RecordError("no_text", f"{name} is an empty list")
    if len(captions) == 1:
        return [RawRecord(**metadata, parts=(check_text(captions[0], name), image))]
    records: list[RawRecord | Reject] = []
    for number, caption in enumerate(captions, start=1):
        fields = {
            **metadata,
            "key": f"{metadata['key']}#{number}",
            "group": metadata.get("group") or metadata["key"],
        }
        try:
            records.append(RawRecord(**fields, parts=(check_text(caption, name), image)))
        except RecordError as error:
            records.append(error.reject(fields["key"]))
    return records


def title_or(error: RecordError, image: bytes) -> str:
    """Returns the title of an SVG drawing as the caption of a record without one.

    Args:
      error: why the record has no caption.
      image: the encoded image.

    Raises:
      RecordError: `error`, if the image is no drawing or has no title.
    """
    title = svg_files.caption(image)
    if not title:
        raise error
    return title
