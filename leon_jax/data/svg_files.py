"""Rasterises SVG drawings, and reads their titles and descriptions.

A drawing is untrusted. It is parsed without external entities, and what was checked is what is
drawn: a drawing that names another file is refused, so drawing reads no file. It is drawn in a
process of its own, because deep nesting crashes the library, and filters can run for hours.
"""

import importlib.util
import os
import re
import subprocess
import sys
import zlib
from typing import Any
from xml.etree import ElementTree

from leon_jax.data.image_error import ImageError

# The longer side of the image in pixels; a drawing has no pixels of its own.
SIDE = 512
MAX_BYTES = 16 * 2**20
# Limits of drawing: seconds of the processor.
_SECONDS = 20
_PROGRAM = """
import sys
sys.path.append(sys.argv[1])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[3]), int(sys.argv[3])))
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except ImportError:
    pass  # not on Windows
import resvg_py
side = int(sys.argv[2])
sys.stdout.buffer.write(bytes(resvg_py.svg_to_bytes(
    svg_string=sys.stdin.buffer.read().decode(), width=side, height=side, dpi=96,
    skip_system_fonts=True,
)))
"""
_GZIP = b"\x1f\x8b"
_START = re.compile(rb"<(?:[\w.-]+:)?svg[\s>]")
# The elements whose references resvg follows; it follows none in styles.
_REFERENCES = ("image", "feImage", "use")


def is_svg(data: bytes) -> bool:
    """Tells whether the first bytes of a file look like an SVG drawing, plain or gzipped.

    Args:
      data: the file, or at least its first 64 KiB.
    """
    if data.startswith(_GZIP):
        data = _unpacked(data, 2**16)
    head = data[: 2**16].removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"<") and _START.search(head) is not None and b"<html" not in head


def caption(data: bytes) -> str:
    """Returns the title of a drawing, else its description, else "".

    The title is the `<title>` of the drawing, the description its `<desc>`. If the root element
    has neither, the metadata of the drawing (Dublin Core, as Inkscape writes it) is read.

    Args:
      data: the file. Other files give "".
    """
    if not is_svg(data):
        return ""
    try:
        root = _parse(data, "the drawing")
    except ImageError:
        return ""
    texts_by_tag = {_local(child.tag): "".join(child.itertext()) for child in reversed(root)}
    texts = [texts_by_tag.get("title", ""), texts_by_tag.get("desc", "")]
    for metadata in (child for child in root if _local(child.tag) == "metadata"):
        # The titles of a licence or of a person are deeper.
        for work in (node for node in metadata.iter() if _local(node.tag) == "Work"):
            fields = {_local(field.tag): "".join(field.itertext()) for field in reversed(work)}
            texts += [fields.get("title", ""), fields.get("description", "")]
    return next((text for text in (" ".join(text.split()) for text in texts) if text), "")


def rasterise(data: bytes, name: str) -> bytes:
    """Returns a PNG file of a drawing, with transparency. Its longer side is `SIDE` pixels.

    System fonts are not used, because the image would depend on the machine. So text that is not
    stored as outlines is left out.

    Args:
      data: the SVG file, plain or gzipped.
      name: name of the drawing in error messages.

    Raises:
      ImageError: the package resvg-py is missing, or the drawing is damaged, names another file,
        or takes too long or too much memory.
    """
    library = importlib.util.find_spec("resvg_py")
    if library is None or library.origin is None:
        raise ImageError(
            f"{name} is an SVG drawing, which needs the package resvg-py; "
            "run: pip install 'leon_jax[images]'"
        )
    root = _parse(data, name)
    _check_references(root, name)
    try:
        # Write the checked tree, so that another parser cannot read the file differently.
        text = ElementTree.tostring(root, encoding="utf-8")
        packages = os.path.dirname(os.path.dirname(library.origin))
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, packages, str(SIDE), str(_SECONDS)],
            input=text, capture_output=True, timeout=2 * _SECONDS, check=False,
        )  # fmt: skip
    except (RecursionError, ValueError, subprocess.TimeoutExpired) as error:
        raise ImageError(f"{name} is an SVG drawing that cannot be drawn: {error}"[:300]) from error
    if done.returncode or not done.stdout:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"drawing it ended with code {done.returncode}"
        raise ImageError(f"{name} is an SVG drawing that cannot be drawn: {reason}"[:300])
    return done.stdout


def _parse(data: bytes, name: str) -> ElementTree.Element:
    if data.startswith(_GZIP):
        data = _unpacked(data, MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} is an SVG drawing of over {MAX_BYTES // 2**20} MiB")
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise ImageError(f"{name} is a damaged SVG drawing: {error}") from error
    if _local(root.tag) != "svg":
        raise ImageError(f"{name} is not an SVG drawing; its root is {_local(root.tag)[:50]}")
    return root


def _check_references(root: ElementTree.Element, name: str) -> None:
    """Checks that a drawing names no file and no address outside of itself."""
    for element in root.iter():
        if _local(element.tag) in _REFERENCES:
            for attribute, value in element.attrib.items():
                value = value.strip()
                if _local(attribute) == "href" and value and not value.startswith(("#", "data:")):
                    raise ImageError(
                        f"{name} is an SVG drawing that needs the file {value[:80]!r}; embed it"
                    )


def _unpacked(data: bytes, limit: int) -> bytes:
    """Returns at most `limit` unpacked bytes of gzipped data; damaged data ends early."""
    try:
        return zlib.decompressobj(wbits=31).decompress(data, limit)
    except zlib.error:
        return b""


def _local(tag: Any) -> str:
    """Returns the name of an element or attribute without its namespace."""
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""
