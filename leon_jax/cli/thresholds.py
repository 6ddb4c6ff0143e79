"""Measures the near-copy thresholds of a retrieval encoder on a documents folder.

    leon thresholds --folder=data/my_cats --encoder=runs/encoder/export/encoder.safetensors

This command writes selection.json beside the encoder. `leon encode` and model folders use it.
Retrieval skips documents that are near copies of the query or of each other, so that they differ.
The similarity at which two documents are near copies depends on the encoder and on the data.
"""

import json
import os
import pathlib

from absl import flags

from leon_jax.config import UserError

FLAGS = flags.FlagValues()
_FOLDER = flags.DEFINE_string(
    "folder", None, "A documents folder or a prepared folder.", flag_values=FLAGS
)
_SPLIT = flags.DEFINE_string("split", "train", "The split to measure.", flag_values=FLAGS)
_ENCODER = flags.DEFINE_string(
    "encoder", None, "The encoder: a file with text.json beside it, or a folder of OpenAI's CLIP.",
    flag_values=FLAGS,
)  # fmt: skip
_DOCUMENTS = flags.DEFINE_integer(
    "documents", 500, "The largest number of documents to measure.", lower_bound=8,
    flag_values=FLAGS,
)  # fmt: skip
_ALTERNATE_SOURCES = flags.DEFINE_bool(
    "alternate_sources", False, "Retrieved documents shall come from different sources in turn.",
    flag_values=FLAGS,
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Runs `leon thresholds`.

    Raises:
      UserError: a flag is missing, a file is missing or damaged, or there are too few documents.
    """
    del argv
    if _FOLDER.value is None:
        raise UserError("--folder is missing; it names a documents folder or a prepared folder")
    if _ENCODER.value is None:
        raise UserError("--encoder is missing; it names an encoder.safetensors or a CLIP folder")
    import jax

    from leon_jax import sharding
    from leon_jax.data.document_folder import DocumentFolder
    from leon_jax.retrieval import near_copies
    from leon_jax.retrieval.encoder import RetrievalEncoder

    folder, split = DocumentFolder(_FOLDER.value), _SPLIT.value
    groups = [line.get("group", "") for line in folder.listing(split)]
    with jax.set_mesh(sharding.make_mesh()):
        encoder = RetrievalEncoder.load(_ENCODER.value)
        thresholds = near_copies.measure(
            encoder, folder.records(split), _DOCUMENTS.value, groups=groups
        )
    values = {
        "near_copy_query": thresholds.document,
        "near_copy_document": thresholds.document,
        "near_copy_picture": thresholds.image,
        "alternate_sources": _ALTERNATE_SOURCES.value,
    }
    path = pathlib.Path(_ENCODER.value).parent / "selection.json"
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    print(f"near copies: documents above {thresholds.document}, images above {thresholds.image}")
    print(f"wrote {path}")
    if not (thresholds.separates_documents and thresholds.separates_images):
        print("the encoder scores some strangers as high as copies; it may need more training")
