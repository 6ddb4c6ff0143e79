"""Writes the data card of a folder: counts of documents, licences and rejected records.

card.md and card.html have the same content; card.html adds charts and sample images.
"""

import base64
import collections
import html
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from leon_jax.data.document_folder import PREPARED_FORMAT, DocumentFolder
from leon_jax.data.records import to_png
from leon_jax.documents import Document
from leon_jax.prepare.gather import OTHERS
from leon_jax.retrieval.prepared_folder import PreparedFolder

_HEADINGS = {
    "licence": "Licences",
    "source": "Sources",
    "language": "Languages",
    "size": "Shorter side of the original images, in pixels",
    "rejected": "Rejected records",
}

MEANINGS = {
    "unreadable_shard": "the rest of a file could not be read",
    "unreadable_record": "the record could not be read",
    "unsafe_name": "a name that leads out of its folder",
    "missing_field": "a field is missing or has a wrong type",
    "missing_picture": "the image file does not exist",
    "not_utf8": "text that is not valid Unicode",
    "record_too_large": "the record has too many bytes",
    "no_text": "no text",
    "no_picture": "no image",
    "text_too_long": "too many characters of text",
    "too_many_tokens": "too many token ids",
    "picture_unreadable": "a damaged image or an unknown format",
    "picture_too_large": "an image with too many pixels",
    "picture_too_small": "an image with too few pixels",
    "picture_too_narrow": "one side is much longer than the other",
    "picture_animated": "an animation, or several pages",
    "picture_mode": "colours that cannot be converted to 8-bit RGB",
    "licence_unknown": "no licence, or not an SPDX expression",
    "licence_not_allowed": "a licence that is not accepted",
    "key_repeated": "the key of an earlier document",
    "copy_exact": "the text and images of an earlier document",
    "copy_near": "a near duplicate of an earlier document",
    "copy_of_evaluation": "a near duplicate of a held-out document",
    "removed_by_request": "removed with --remove-keys",
    "picture_held_out": "the image of a held-out document",
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1c1c1c; background: #fff }
h2 { margin-top: 2.5rem } h3 { margin-bottom: .25rem }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .35rem .75rem; text-align: left;
  vertical-align: middle; overflow-wrap: anywhere }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 1% }
.bar { width: 40% } .bar div { background: #3d6ea5; height: .9rem; min-width: 1px }
figure { display: inline-block; width: 11rem; margin: 0 1rem 1rem 0; vertical-align: top;
  overflow-wrap: anywhere; font-size: .85rem; line-height: 1.35 }
figure img { width: 100%; border: 1px solid #eee }
small { color: #555 }
"""

_SAMPLES, _CAPTION = 12, 160


def write_card(folder: pathlib.Path, address: pathlib.Path | None = None) -> None:
    """Writes card.md and card.html into a documents folder or a prepared folder, atomically.

    Args:
      folder: the folder.
      address: the path that it will have, if it is not there yet.
    """
    prepared = DocumentFolder(folder, address)
    for name, text in (("card.md", markdown(prepared)), ("card.html", page(prepared))):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)


def markdown(prepared: DocumentFolder) -> str:
    """Returns the card as Markdown."""
    lines = ["# Data card", "", *_facts(prepared)]
    for split, tables in _tables(prepared).items():
        lines += ["", f"## {split}"]
        for name, table in tables.items():
            head = "reason | records" if name == "rejected" else f"{name} | documents"
            lines += ["", f"### {_HEADINGS[name]}", "", f"| {head} |", "|---|---:|"]
            lines += [
                f"| {_escaped(_label(name, key))} | {count:,} |" for key, count in table.items()
            ]
    credits = [f"- {_escaped(line)}" for line in attributions(prepared.manifest)]
    return "\n".join([*lines, "", "## Credits", "", *credits, ""])


def page(prepared: DocumentFolder) -> str:
    """Returns the card as a self-contained HTML page with a bar for each count."""
    body = ["<h1>Data card</h1>"]
    body += [f"<p>{html.escape(line)}</p>" for line in _facts(prepared) if line]
    for split, tables in _tables(prepared).items():
        body.append(f"<h2>{html.escape(split)}</h2>")
        for name, table in tables.items():
            largest = max(table.values(), default=1)
            rows = "".join(
                f"<tr><td>{html.escape(_label(name, key))}</td>"
                f'<td class="number">{count:,}</td>'
                f'<td class="bar"><div style="width:{100 * count / largest:.1f}%"></div></td></tr>'
                for key, count in table.items()
            )
            body.append(f"<h3>{_HEADINGS[name]}</h3><table>{rows}</table>")
    body.append("<h2>Sample documents of train</h2>")
    body += map(_figure, samples(prepared))
    body.append("<h2>Credits</h2><ul>")
    body += [f"<li>{html.escape(line)}</li>" for line in attributions(prepared.manifest)]
    body.append("</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Data card</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def samples(prepared: DocumentFolder) -> list[Document]:
    """Returns up to 12 evenly spaced documents of train."""
    is_encoded = prepared.manifest["format"] == PREPARED_FORMAT
    records = (
        PreparedFolder(prepared.folder, prepared.address) if is_encoded else prepared
    ).records()
    step = max(1, len(records) // _SAMPLES)
    return [records[row] for row in range(0, len(records), step)[:_SAMPLES]]


def _figure(document: Document) -> str:
    """Returns HTML with the first stored image of a document, its text, key and licence."""
    data = base64.b64encode(to_png(document.pixels)).decode()
    text, provenance = document.text, document.provenance
    caption = html.escape(text if len(text) <= _CAPTION else f"{text[:_CAPTION]}...")
    origin = f"{provenance.key}, {provenance.licence}" if provenance else ""
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}<br><small>{html.escape(origin)}</small></figcaption></figure>"
    )


def attributions(manifest: Mapping[str, Any]) -> list[str]:
    """Returns the credit lines of the documents, the most frequent first."""
    credits: collections.Counter[str] = collections.Counter()
    for tables in manifest["counts"].values():
        credits.update(tables["credit"])
    others = credits.pop(OTHERS, 0)
    ordered = sorted(credits.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"{name} ({count:,} document{'s' * (count > 1)})" for name, count in ordered]
    if others:
        lines.append(f"{others:,} more documents; their credit lines are in *.documents.jsonl")
    return lines


def _facts(prepared: DocumentFolder) -> list[str]:
    manifest = prepared.manifest
    config, rules = manifest["config"], manifest["config"]["duplicates"]
    splits = ", ".join(f"{count:,} {split}" for split, count in manifest["splits"].items())
    measure = "the inner product of the image embeddings"
    held_out = ", ".join(split for split in manifest["splits"] if split != "train") or "none"
    facts = [
        f"Documents: {splits}.",
        "",
        f"Accepted licences: {', '.join(config['licences'])}.",
        "",
    ]
    exact = f"Exact duplicates: {'dropped' if rules['exact'] else 'kept'}. "
    if not manifest["sha256"]:
        return [
            *facts,
            f"{exact}Train documents with an image of a held-out document (splits: {held_out}): "
            "dropped.",
            "",
            "The documents are not encoded.",
        ]
    near = f"dropped above {rules['near']} by {measure}" if rules["near"] else "not checked"
    evaluation = f"dropped above {rules['evaluation']}" if rules["evaluation"] else "not checked"
    return [
        *facts,
        f"{exact}Near duplicates in train: {near}. "
        f"Train documents similar to held-out ones (splits: {held_out}): {evaluation}.",
        "",
        "Made with "
        + ", ".join(f"{name} {sum_[:12]}" for name, sum_ in manifest["sha256"].items())
        + " (SHA-256).",
    ]


def _tables(prepared: DocumentFolder) -> Mapping[str, dict[str, dict[str, int]]]:
    counts = prepared.manifest["counts"]
    return {
        split: {name: _sorted(name, tables[name]) for name in _HEADINGS if tables.get(name)}
        for split, tables in counts.items()
    }


def _sorted(name: str, table: dict[str, Any]) -> dict[str, int]:
    """Sorts a table by count, the largest first; image sizes are sorted by size."""
    if name == "size":
        return dict(sorted(table.items(), key=lambda item: int(item[0].split()[0])))
    return dict(sorted(table.items(), key=lambda item: (-item[1], item[0])))


def _label(name: str, key: str) -> str:
    return f"{key}: {MEANINGS[key]}" if name == "rejected" else key


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
