"""Parses licences as SPDX expressions and checks them against a list of accepted licences."""

import functools
import re
from typing import Any

from leon_jax.config import UserError

# Datasets of web images often give a Creative Commons licence as its URL.
_CREATIVE_COMMONS = re.compile(
    r"https?://(?:www\.)?creativecommons\.org/(?:licenses|publicdomain)/([a-z-]+)/([0-9.]+)/?"
    r"(?:deed(?:\.[a-z-]+)?|legalcode)?/?",
    re.IGNORECASE,
)

# The SPDX syntax for a licence that SPDX does not list.
_REFERENCE = re.compile(r"LicenseRef-[A-Za-z0-9.-]+")
_MAX_LENGTH = 400


def normal(licence: str) -> str | None:
    """Returns the normalised SPDX expression of a licence field, or None if it is not valid.

    The field may hold SPDX identifiers and expressions in any case (`cc-by-4.0`,
    `MIT OR Apache-2.0`), `LicenseRef-...`, or the URL of a Creative Commons licence.

    Raises:
      UserError: the package license-expression is missing.
    """
    licence = licence.strip()
    return _normal(licence) if len(licence) <= _MAX_LENGTH else None


@functools.lru_cache(4096)
def _normal(licence: str) -> str | None:
    if not licence:
        return None
    if match := _CREATIVE_COMMONS.fullmatch(licence):
        name, version = match[1].lower(), match[2]
        names = {"zero": "CC0-1.0", "mark": "LicenseRef-Public-Domain-Mark"}
        licence = names.get(name, f"CC-{name}-{version}")
    parsed = _parse(licence)
    return None if parsed is None else str(parsed)


def check_list(accepted: tuple[str, ...]) -> None:
    """Checks a list of accepted licences.

    Raises:
      UserError: an entry is not an SPDX licence identifier.
    """
    for licence in accepted:
        if normal(licence) != licence:
            hint = f"; did you mean {normal(licence)!r}?" if normal(licence) else ""
            raise UserError(
                f"licences holds {licence!r}, which is not an SPDX licence identifier{hint}"
            )


@functools.lru_cache(4096)
def allows(accepted: tuple[str, ...], expression: str) -> bool:
    """Tells whether a list of accepted licences allows an SPDX expression.

    `A OR B` needs one accepted licence, `A AND B` needs both. `A WITH exception` counts as a
    separate licence.
    """
    return _allowed(_parse(expression), accepted)


def _allowed(node: Any, accepted: tuple[str, ...]) -> bool:
    operator = getattr(node, "operator", "").strip()
    if operator in ("AND", "OR"):
        return (all if operator == "AND" else any)(_allowed(a, accepted) for a in node.args)
    return node is not None and str(node) in accepted


def _parse(expression: str) -> Any:
    """Parses an SPDX expression and normalises its identifiers; None if one is unknown."""
    if _REFERENCE.fullmatch(expression):
        return expression
    spdx = _spdx()
    try:
        parsed = spdx.parse(expression, strict=True)
        names, unknown = spdx.license_keys(parsed), spdx.unknown_license_keys(parsed)
    except Exception:  # the parser raises several exceptions, also RecursionError
        return None
    # The parser replaces some LicenseRef names by listed licences; such an expression is invalid.
    references = set(_REFERENCE.findall(expression))
    return parsed if references <= set(names) and set(unknown) <= references else None


@functools.cache
def _spdx() -> Any:
    try:
        import license_expression
    except ImportError as error:
        raise UserError(
            f"checking licences needs the package {error.name}; run: pip install 'leon_jax[data]'"
        ) from error
    return license_expression.get_spdx_licensing()
