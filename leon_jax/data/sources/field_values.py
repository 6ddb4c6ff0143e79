"""The fields of a record: checked values, and the fault that refuses a record."""

import json
from collections.abc import Mapping
from typing import Any

from leon_jax.data.sources.raw_record import (
    LARGEST_PICTURE,
    LARGEST_TEXT,
    Reason,
    Reject,
    SourceConfig,
)

# What a record may say of itself, by the attribute of `Raw` that it becomes. The last spelling of
# a licence is that of LAION's tables.
CLAIMS = {
    "key": ("key",),
    "licence": ("licence", "license", "LICENSE"),
    "attribution": ("attribution",),
    "language": ("language",),
    "origin": ("source",),
    "group": ("group",),
}
# Every field that `claims` looks at.
CLAIM_NAMES = (*(name for names in CLAIMS.values() for name in names), "url")
_LONGEST_DETAIL = 300


class Fault(Exception):
    """Why a record, or the rest of a shard, is not used."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(detail)
        self.reason: Reason = reason

    def reject(self, key: str) -> Reject:
        """The refusal of what is called `key`."""
        return Reject(printable(key), self.reason, printable(str(self))[:_LONGEST_DETAIL])


def printable(text: str) -> str:
    """The text with lone surrogates spelled out, so that it can be written anywhere."""
    return text.encode(errors="backslashreplace").decode()


def check_text(value: Any, name: str) -> str:
    """A text of a record.

    Args:
      value: what stands in the field: a string, or its bytes in UTF-8.
      name: of the field, for the fault.

    Raises:
      Fault: there is none, or it is no text, no valid unicode or longer than `LARGEST_TEXT` bytes.
    """
    if value is None:
        raise Fault("missing_field", f"{name} is missing")
    if not isinstance(value, str | bytes):
        raise Fault("unreadable_record", f"{name} is a {type(value).__name__}, not a text")
    try:
        data = value.encode() if isinstance(value, str) else value
        text = data.decode()
    except UnicodeError as error:
        raise Fault("not_utf8", f"{name}: {error}") from error
    if len(data) > LARGEST_TEXT:
        raise Fault("record_too_large", f"{name} has {len(data)} bytes, at most {LARGEST_TEXT}")
    return text


def check_picture(value: Any, name: str) -> bytes:
    """The bytes of an encoded picture that stands in a field.

    Raises:
      Fault: there is none, or it is no bytes or longer than `LARGEST_PICTURE`.
    """
    if isinstance(value, dict) and "bytes" in value:  # as Hugging Face's library stores pictures
        value = value["bytes"]
    if value is None:
        raise Fault("missing_field", f"{name} is missing")
    if not isinstance(value, bytes):
        raise Fault("unreadable_record", f"{name} is a {type(value).__name__}, not bytes")
    if len(value) > LARGEST_PICTURE:
        raise Fault("record_too_large", f"{name} has {len(value)} bytes, at most {LARGEST_PICTURE}")
    return value


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object. NaN and infinities, which Python writes and JSON does not know, become None.

    Raises:
      Fault: it is not one, or a name in it stands twice, so that readers would differ.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=lambda _: None)
    except UnicodeError as error:
        raise Fault("not_utf8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise Fault("unreadable_record", f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Fault("unreadable_record", f"it is a JSON {type(value).__name__}, not an object")
    return value


def claims(record: Mapping[str, Any], config: SourceConfig) -> dict[str, str]:
    """What a record says of itself: the attributes of `Raw` but `parts`; "" where it says nothing.

    Where neither the record nor the configuration has a credit line, the address of the picture
    (`url`) is the best there is.

    Raises:
      Fault: a field is not a text.
    """
    said = {}
    for attribute, names in CLAIMS.items():
        name, value = next(
            ((name, record[name]) for name in names if record.get(name) is not None), ("", "")
        )
        if attribute in ("key", "group") and type(value) is int:
            value = str(value)
        said[attribute] = check_text(value, name)
    if not said["attribution"] and not config.attribution and record.get("url") is not None:
        said["attribution"] = check_text(record["url"], "url")
    return said


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found
