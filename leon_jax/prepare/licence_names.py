"""The names of licences as people write them, and the SPDX expressions that they may mean."""

import re

# Creative Commons and others give licences as URLs.
_CREATIVE_COMMONS_URL = re.compile(
    r"(?:https?://)?(?:www\.)?creativecommons\.org/(?:licenses|publicdomain)/([a-z+-]+)/([0-9.]+)"
    r"(?:/([a-z]{2,3}))?/?(?:deed(?:\.[a-z_-]+)?|legalcode(?:\.[a-z_-]+)?)?/?",
    re.IGNORECASE,
)
_LIST_URL = re.compile(
    r"https?://(?:www\.)?(?:spdx\.org/licenses|opensource\.org/licenses?)/([\w.+-]+?)(?:\.html)?/?",
    re.IGNORECASE,
)
# The names of the parts of a Creative Commons licence, longest first.
_PARTS = (
    (r"attribution", "by"),
    (r"non-?commercial", "nc"),
    (r"share-?alike", "sa"),
    (r"no-?deriv(?:ative)?s?(?:-works)?", "nd"),
)
_CREATIVE_COMMONS = re.compile(
    r"cc-(by(?:-nc)?(?:-sa|-nd)?)-([0-9]\.[0-9])(?:-([a-z]{2,3}))?", re.IGNORECASE
)
_PUBLIC_DOMAIN = re.compile(r"(?:in-)?(?:the-)?public-domain|pd")
_FILLERS = re.compile(r"(?:^|-)(?:the|license|licence|licensed|version|under|international|"
                      r"unported|generic|intl)(?=-|$)")  # fmt: skip
# The licences of GNU: "GPL-2" says neither "only" nor "or later".
_GNU = re.compile(
    r"(?:gnu-)?(a?gpl|lgpl|gfdl)-?v?([0-9](?:\.[0-9])?)(\+|-or-later|-or-newer|-only)?"
)
_GNU_NAMES = (
    (r"affero-general-public", "agpl"),
    (r"(?:lesser|library)-general-public", "lgpl"),
    (r"general-public", "gpl"),
    (r"free-documentation", "gfdl"),
)
_NAMES = {
    "expat": "MIT",
    "x11": "X11",
    "zero-clause-bsd": "0BSD",
    "new-bsd": "BSD-3-Clause",
    "simplified-bsd": "BSD-2-Clause",
    "open-font-1.1": "OFL-1.1",
    "sil-open-font-1.1": "OFL-1.1",
    "mozilla-public-2.0": "MPL-2.0",
    "open-database-1.0": "ODbL-1.0",
    "free-art-1.3": "LAL-1.3",
    "cc0": "CC0-1.0",
    "cc-zero": "CC0-1.0",
    "cc-zero-1.0": "CC0-1.0",
    "cc0-universal": "CC0-1.0",
    "cc0-1.0-universal": "CC0-1.0",
    "public-domain-mark": "LicenseRef-Public-Domain-Mark",
    "public-domain-mark-1.0": "LicenseRef-Public-Domain-Mark",
    "cc-public-domain-mark-1.0": "LicenseRef-Public-Domain-Mark",
}


def spellings(licence: str) -> list[str]:
    """Returns SPDX expressions that a name or URL may mean; the first valid one is meant.

    Args:
      licence: a licence that is no SPDX expression, without white space at its ends.
    """
    if match := _CREATIVE_COMMONS_URL.fullmatch(licence):
        name, version, port = match[1].lower(), match[2], match[3]
        names = {"zero": "CC0-1.0", "mark": "LicenseRef-Public-Domain-Mark"}
        return [names.get(name, f"CC-{name}-{version}" + (f"-{port.upper()}" if port else ""))]
    if match := _LIST_URL.fullmatch(licence):
        return [match[1]]
    name = _simple(licence)
    if _PUBLIC_DOMAIN.fullmatch(name):
        return ["LicenseRef-Public-Domain"]
    if name in _NAMES:
        return [_NAMES[name]]
    if match := _GNU.fullmatch(_gnu(name)):
        ending = "only" if match[3] == "-only" else "or-later"
        return [f"{match[1].upper()}-{_full(match[2])}-{ending}"]
    if match := _CREATIVE_COMMONS.fullmatch(_creative_commons(name)):
        return ["CC-" + "-".join(filter(None, (match[1], match[2], match[3]))).upper()]
    # "Apache License 2" is Apache-2.0, and "MIT License" is MIT.
    return [name, f"{name}.0"]


def candidates(licence: str) -> tuple[str, ...]:
    """Returns the SPDX identifiers that an ambiguous name may mean, or () if it is not ambiguous.

    "GPL-2" may be GPL-2.0-only or GPL-2.0-or-later, and "CC BY" names no version. Identifiers of
    the SPDX list are not ambiguous: "GPL-2.0" is an old one for GPL-2.0-only.
    """
    name = _simple(licence)
    match = _GNU.fullmatch(_gnu(name))
    if match and not match[3] and not re.fullmatch(r"[A-Za-z]+-[0-9]\.[0-9]", licence):
        stem = f"{match[1].upper()}-{_full(match[2])}"
        return f"{stem}-only", f"{stem}-or-later"
    stem = _creative_commons(name)
    if re.fullmatch(r"cc-by(?:-nc)?(?:-sa|-nd)?", stem):
        return f"{stem.upper()}-4.0", f"{stem.upper()}-3.0", f"{stem.upper()}-2.0"
    return ()


def _simple(licence: str) -> str:
    """Returns a name in lower case, with - between words and without "license", "version", ..."""
    name = re.sub(r"[\s,_()/–-]+", "-", licence.lower()).strip("-.")
    name = re.sub(r"(?<=-)v\.?-?(?=[0-9])", "", name)
    name = re.sub(r"(?<=[a-z])v(?=[0-9])", "-", name)
    name = re.sub(r"(?<=[a-z])(?=[0-9]\.[0-9]$)", "-", name)  # "ccby4.0"
    return _FILLERS.sub("", name).strip("-")


def _gnu(name: str) -> str:
    for words, short in _GNU_NAMES:
        name = re.sub(words, short, name)
    return re.sub(r"-or-any-later$|-or-\(?at-your-option\)?-any-later$", "-or-later", name)


def _creative_commons(name: str) -> str:
    name = name.replace("creative-commons", "cc")
    for words, short in _PARTS:
        name = re.sub(words, short, name)
    name = re.sub(r"^cc(?=by)", "cc-", name)
    # The order of the parts varies: CC-BY-SA-NC.
    match = re.fullmatch(
        r"(?:cc-)?((?:by|nc|sa|nd)(?:-(?:by|nc|sa|nd))*)(-[0-9.]+(?:-[a-z]+)?)?", name
    )
    if match is None or "by" not in match[1].split("-"):
        return name
    parts = [part for part in ("by", "nc", "sa", "nd") if part in match[1].split("-")]
    return "cc-" + "-".join(parts) + (match[2] or "")


def _full(version: str) -> str:
    return version if "." in version else f"{version}.0"
