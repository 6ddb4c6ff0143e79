"""Licences as SPDX expressions, and whether a list of accepted ones allows them."""

import functools
import re
from typing import Any

from leon_jax.config import UserError

# How data sets of web pictures name Creative Commons licences.
_CREATIVE_COMMONS = re.compile(
    r"https?://(?:www\.)?creativecommons\.org/(?:licenses|publicdomain)/([a-z-]+)/([0-9.]+)/?"
    r"(?:deed(?:\.[a-z-]+)?|legalcode)?/?",
    re.IGNORECASE,
)

# A licence that SPDX does not list.
_OWN = re.compile(r"LicenseRef-[A-Za-z0-9.-]+")
_LONGEST = 400


def normal(licence: str) -> str | None:
    """The SPDX expression that a licence field names; None if it names none.

    Knows SPDX identifiers and expressions in any case (`cc-by-4.0`, `MIT OR Apache-2.0`),
    `LicenseRef-...`, and addresses of Creative Commons licences.

    Raises:
      UserError: the package license-expression is missing.
    """
    licence = licence.strip()
    return _normal(licence) if len(licence) <= _LONGEST else None


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
    """Checks an allow-list.

    Raises:
      UserError: an entry is no SPDX licence identifier.
    """
    for licence in accepted:
        if normal(licence) != licence:
            hint = f"; did you mean {normal(licence)!r}?" if normal(licence) else ""
            raise UserError(
                f"licences holds {licence!r}, which is no SPDX licence identifier{hint}"
            )


@functools.lru_cache(4096)
def allows(accepted: tuple[str, ...], expression: str) -> bool:
    """Whether a document under this SPDX expression may be used.

    `A OR B` needs one of them to be accepted, `A AND B` both. `A WITH exception` counts as a
    licence of its own.
    """
    return _allowed(_parse(expression), accepted)


def _allowed(node: Any, accepted: tuple[str, ...]) -> bool:
    operator = getattr(node, "operator", "").strip()
    if operator in ("AND", "OR"):
        return (all if operator == "AND" else any)(_allowed(a, accepted) for a in node.args)
    return node is not None and str(node) in accepted


def _parse(expression: str) -> Any:
    """The parsed expression with identifiers in SPDX's spelling; None if one is unknown."""
    if _OWN.fullmatch(expression):
        return expression
    spdx = _spdx()
    try:
        parsed = spdx.parse(expression, strict=True)
        names, unknown = spdx.license_keys(parsed), spdx.unknown_license_keys(parsed)
    except Exception:  # the parser has several kinds of its own, and recursion errors
        return None
    # The parser takes some names of one's own for aliases of licences that SPDX lists.
    own = set(_OWN.findall(expression))
    return parsed if own <= set(names) and set(unknown) <= own else None


@functools.cache
def _spdx() -> Any:
    try:
        import license_expression
    except ImportError as error:
        raise UserError(
            f"licences are checked with the package {error.name}; run: pip install 'leon_jax[data]'"
        ) from error
    return license_expression.get_spdx_licensing()
