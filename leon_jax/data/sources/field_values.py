"""Checks the fields of a record."""

import json
from collections.abc import Mapping
from typing import Any

from leon_jax.data.sources.raw_record import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    Reason,
    Reject,
    SourceConfig,
)

# The field names of each metadata attribute of `RawRecord`. LAION's tables spell it LICENSE.
METADATA_FIELDS = {
    "key": ("key",),
    "licence": ("licence", "license", "LICENSE"),
    "attribution": ("attribution",),
    "language": ("language",),
    "origin": ("source",),
    "group": ("group",),
}
# All fields that `read_metadata` reads.
METADATA_NAMES = (*(name for names in METADATA_FIELDS.values() for name in names), "url")
_MAX_DETAIL_LENGTH = 300


class RecordError(Exception):
    """A record, or the rest of a shard, is rejected."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(detail)
        self.reason: Reason = reason

    def reject(self, key: str) -> Reject:
        """Returns the reject of the record `key`."""
        return Reject(printable(key), self.reason, printable(str(self))[:_MAX_DETAIL_LENGTH])


def printable(text: str) -> str:
    """Escapes lone surrogates, so that the text can be encoded as UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def check_text(value: Any, name: str) -> str:
    """Returns the text in a field.

    Args:
      value: value of the field: a string, or bytes in UTF-8.
      name: name of the field in error messages.

    Raises:
      RecordError: the value is missing, not a text, not valid Unicode, or longer than
        `MAX_TEXT_BYTES`.
    """
    if value is None:
        raise RecordError("missing_field", f"{name} is missing")
    if not isinstance(value, str | bytes):
        raise RecordError("unreadable_record", f"{name} is a {type(value).__name__}, not a text")
    try:
        data = value.encode() if isinstance(value, str) else value
        text = data.decode()
    except UnicodeError as error:
        raise RecordError("not_utf8", f"{name}: {error}") from error
    if len(data) > MAX_TEXT_BYTES:
        raise RecordError(
            "record_too_large", f"{name} has {len(data)} bytes, at most {MAX_TEXT_BYTES}"
        )
    return text


def check_image(value: Any, name: str) -> bytes:
    """Returns the encoded image in a field.

    Args:
      value: value of the field: bytes, or a dict with the key "bytes".
      name: name of the field in error messages.

    Raises:
      RecordError: the value is missing, not bytes, or longer than `MAX_IMAGE_BYTES`.
    """
    if isinstance(value, dict) and "bytes" in value:  # the format of Hugging Face's `datasets`
        value = value["bytes"]
    if value is None:
        raise RecordError("missing_field", f"{name} is missing")
    if not isinstance(value, bytes):
        raise RecordError("unreadable_record", f"{name} is a {type(value).__name__}, not bytes")
    if len(value) > MAX_IMAGE_BYTES:
        raise RecordError(
            "record_too_large", f"{name} has {len(value)} bytes, at most {MAX_IMAGE_BYTES}"
        )
    return value


def parse_object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object. NaN and infinities, which JSON does not have, become None.

    Raises:
      RecordError: the bytes are not a JSON object in UTF-8, or an object has a duplicate name.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=lambda _: None)
    except UnicodeError as error:
        raise RecordError("not_utf8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise RecordError("unreadable_record", f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RecordError(
            "unreadable_record", f"it is a JSON {type(value).__name__}, not an object"
        )
    return value


def read_metadata(record: Mapping[str, Any], config: SourceConfig) -> dict[str, Any]:
    """Returns the metadata of a record: the attributes of `RawRecord` except `parts`.

    A missing field gives "". If neither the record nor the configuration has an attribution, the
    URL of the image (`url`) is used.

    Raises:
      RecordError: a field is not a text.
    """
    metadata = {}
    for attribute, names in METADATA_FIELDS.items():
        name, value = next(
            ((name, record[name]) for name in names if record.get(name) is not None), ("", "")
        )
        if attribute in ("key", "group") and type(value) is int:
            value = str(value)
        metadata[attribute] = check_text(value, name)
    if not metadata["attribution"] and not config.attribution and record.get("url") is not None:
        metadata["attribution"] = check_text(record["url"], "url")
    return metadata


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Rejects objects with a duplicate name, because JSON readers disagree about their value."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has a duplicate name")
    return value
