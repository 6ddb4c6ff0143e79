"""HTML pages in one file: style, tables and embedded images. They need no network."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
import PIL.Image

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1c1c1c; background: #fff }
h2 { margin-top: 2.5rem }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-weight: 600 }
th, td { border-bottom: 1px solid #ddd; padding: .5rem .75rem; vertical-align: middle }
small { color: #555; display: block; line-height: 1.3 }
.number { text-align: right; font-variant-numeric: tabular-nums }
.good { color: #14692b } .bad { color: #a3231f }
"""


def image_tag(pixels: np.ndarray | PIL.Image.Image, alt: str) -> str:
    """Returns an <img> tag with the image embedded as PNG."""
    image = pixels if isinstance(pixels, PIL.Image.Image) else PIL.Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table; cells are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def page(title: str, sections: Sequence[tuple[str, str]], style: str = "") -> str:
    """Returns a whole page.

    Args:
      title: the title, plain text.
      sections: (heading, HTML body) pairs. A section without a heading continues the one before.
      style: more CSS.
    """
    body = "".join(
        (f"<h2>{html.escape(name)}</h2>" if name else "") + content for name, content in sections
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f'</title><meta name="viewport" content="width=device-width"><style>{_STYLE}{style}'
        f"</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>"
    )
