"""Parses licences as SPDX expressions and checks them against a list of accepted licences."""

import functools
import re
from typing import Any

from leon_jax.config import UserError
from leon_jax.prepare import licence_names

# The SPDX syntax for a licence that SPDX does not list.
_REFERENCE = re.compile(r"LicenseRef-[A-Za-z0-9.-]+")
_MAX_LENGTH = 400


def normal(licence: str) -> str | None:
    """Returns the normalised SPDX expression of a licence field, or None if it is not valid.

    The field may hold SPDX identifiers and expressions in any case (`cc-by-4.0`,
    `MIT OR Apache-2.0`), `LicenseRef-...`, the URL of a Creative Commons licence, or the name of
    one licence as people write it (`CC BY 4.0`, `MIT License`, `public domain`).

    Raises:
      UserError: the package license-expression is missing.
    """
    licence = licence.strip()
    return _normal(licence) if len(licence) <= _MAX_LENGTH else None


def explain(licence: str) -> str:
    """Returns why `normal` refuses a licence field, and what would be right."""
    licence = licence.strip()
    if not licence:
        return "neither the record nor its source states a licence (--licence=SPDX states one)"
    quoted = repr(licence if len(licence) <= 80 else licence[:80] + "...")
    candidates = licence_names.candidates(licence) if len(licence) <= _MAX_LENGTH else ()
    if candidates:
        return f"its licence {quoted} may be {' or '.join(candidates)}; write which one"
    return f"its licence {quoted} is not an SPDX expression, such as CC-BY-4.0 or LicenseRef-NAME"


@functools.lru_cache(4096)
def _normal(licence: str) -> str | None:
    if not licence or licence_names.candidates(licence):
        return None
    for spelling in (licence, *licence_names.spellings(licence)):
        parsed = _parse(spelling)
        if parsed is not None:
            return str(parsed)
    return None


def missing(accepted: tuple[str, ...], expression: str) -> tuple[str, ...]:
    """Returns the licences of an SPDX expression that a list must also have to allow it.

    Of `A OR B` these are the licences of the first.
    """
    return tuple(dict.fromkeys(_missing(_parse(expression), accepted)))


def _missing(node: Any, accepted: tuple[str, ...]) -> list[str]:
    if node is None or _allowed(node, accepted):
        return []
    operator = getattr(node, "operator", "").strip()
    if operator == "OR":
        return _missing(node.args[0], accepted)
    if operator == "AND":
        return [name for argument in node.args for name in _missing(argument, accepted)]
    return [str(node)]


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
