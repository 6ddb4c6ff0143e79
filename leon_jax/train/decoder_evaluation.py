"""Evaluates a decoder on held-out documents: its loss with and without retrieved documents.

A query document is not masked, and its images are unchanged. It comes after the training documents
that its text retrieves or, if these are too few, that its image retrieves. The most relevant one is
the last. As in training, retrieved documents that do not fit a row are left out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Array, Int32

from leon_jax.config import UserError
from leon_jax.data import packing
from leon_jax.data.document_folder import TRAIN
from leon_jax.data.examples import Limits, join
from leon_jax.retrieval.exact_search import NONE
from leon_jax.retrieval.prepared_folder import PreparedFolder
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.evaluation import Evaluation, HeldOut, choose_held_out, names
from leon_jax.vocabulary import Vocabulary

# The largest number of retrieved documents of an evaluation.
MAX_RETRIEVED = 2
# Rows that are filled in parallel when examples are packed.
_BINS = 8

Ids = Int32[np.ndarray, "length"]
Example = dict[str, np.ndarray]


def make_evaluation(
    config: DecoderTraining,
    tokenizer: DocumentTokenizer,
    outputs: Callable[[Any, dict[str, Array]], dict[str, Array]],
) -> Evaluation | None:
    """Prepares the evaluation of a decoder.

    Its metrics are means over the query documents' tokens, in nats: `image_loss_k` and
    `text_loss_k` with k = 0, 1, 2 retrieved documents, up to the largest number that the run trains
    with and that fits a row. The lowest `image_loss_k` with the largest k is that of the best
    model.

    Args:
      config: the configuration of the run.
      tokenizer: encodes documents as ids.
      outputs: maps (decoder, batch) to `image_loss` and `text_loss`, the sums of each row.

    Returns:
      The evaluation; None: no folder has held-out documents.

    Raises:
      UserError: see `choose_held_out`; or a document cannot be read, or none fits a row.
    """
    held_out = choose_held_out(config.data, PreparedFolder)
    if not held_out:
        return None
    limits = Limits(config.data.length, config.model.max_length, config.model.part_step)
    trained = max(
        number
        for part in config.data.components
        for number, share in enumerate(part.retrieved or (1.0,))
        if share > 0
    )
    examples: list[list[Example]] = [[] for _ in range(min(trained, MAX_RETRIEVED) + 1)]
    largest = 0
    for query, retrieved in _queries(held_out, tokenizer, len(examples) - 1):
        for number, group in enumerate(examples):
            used = _fitting(query, retrieved[:number], tokenizer.vocabulary, limits)
            if used is not None:
                largest = max(largest, used)
                group.append(
                    _example(query, retrieved[:used], tokenizer.vocabulary, limits.part_step)
                )
    examples = examples[: largest + 1]
    if not examples[0]:
        raise UserError(
            f"no document of {names(held_out)} fits a row of config.data.length, {limits.tokens} "
            "tokens; raise it, or set config.loop.eval_every to 0"
        )
    packed = [_pack(group, limits.tokens, tokenizer.vocabulary) for group in examples]
    rows = {name: np.concatenate([group[name] for group in packed]) for name in packed[0]}
    retrieved_of_row = np.repeat(np.arange(len(packed)), [len(group["ids"]) for group in packed])
    is_target = rows["weights"] > 0
    tokens = {
        "image_loss": (is_target & tokenizer.vocabulary.is_image(rows["targets"])).sum(1),
        "text_loss": (is_target & tokenizer.vocabulary.is_text(rows["targets"])).sum(1),
    }

    def metrics(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        values = {}
        for name, counts in tokens.items():
            for number in range(len(packed)):
                rows_of_number = retrieved_of_row == number
                if total := int(counts[rows_of_number].sum()):
                    losses = sums[name][rows_of_number].astype(np.float64)
                    values[f"{name}_{number}"] = losses.sum() / total
        return values

    numbers = ", ".join(map(str, range(largest))) + " and " * (largest > 0) + str(largest)
    return Evaluation(
        documents=(
            f"{len(examples[0])} documents of {names(held_out)}, with {numbers} retrieved "
            f"document{'s' * (largest != 1)}"
        ),
        rows=rows,
        batch_size=config.batch_size // config.microbatches,
        outputs=outputs,
        metrics=metrics,
        loss=f"{'image' if tokens['image_loss'].any() else 'text'}_loss_{largest}",
    )


def _queries(
    held_out: Sequence[HeldOut[PreparedFolder]], tokenizer: DocumentTokenizer, count: int
) -> Iterator[tuple[Ids, list[Ids]]]:
    """Yields the ids of each query, and of up to `count` retrieved documents, the best first.

    A split without a table of neighbours retrieves nothing.
    """
    for part in held_out:
        queries, table = part.folder.records(part.split, pixels=False), None
        if count and all(p.is_file() for p in part.folder.paths(part.split, "neighbours.npy")):
            table = part.folder.neighbours(part.split)
            documents = part.folder.records(TRAIN, pixels=False)
        for row in part.documents.tolist():
            try:
                retrieved: list[Ids] = []
                if table is not None:
                    ids = np.concatenate([table[row]["by_text_ids"], table[row]["by_image_ids"]])
                    best = list(dict.fromkeys(ids[ids != NONE].tolist()))[:count]
                    retrieved = [tokenizer.encode(documents[number]) for number in best]
                yield tokenizer.encode(queries[row]), retrieved
            except UserError as error:
                raise UserError(f"document {row} of {part.name}: {error}") from error


def _fitting(
    query: Ids, retrieved: Sequence[Ids], vocabulary: Vocabulary, limits: Limits
) -> int | None:
    """Returns how many of the best retrieved documents fit a row; None: the query does not fit."""
    for count in range(len(retrieved), -1, -1):
        ids, _ = join(query, retrieved[:count][::-1], vocabulary)
        positions = vocabulary.positions(ids[:-1], limits.part_step)
        if len(positions) <= limits.tokens and positions[-1] < limits.positions:
            return count
    return None


def _example(
    query: Ids, retrieved: Sequence[Ids], vocabulary: Vocabulary, part_step: int
) -> Example:
    """Returns an example as `leon_jax.data.examples.MakeExample` does, without masks.

    `weights` is 1 at the image and text tokens of the query and 0 elsewhere.
    """
    ids, query_start = join(query, retrieved[::-1], vocabulary)
    targets = ids[1:]
    is_query = np.arange(1, len(ids)) >= query_start
    weights = is_query & (vocabulary.is_image(targets) | vocabulary.is_text(targets))
    return {
        "ids": ids[:-1],
        "targets": targets,
        "weights": weights.astype(np.float32),
        "positions": vocabulary.positions(ids[:-1], part_step),
    }


def _pack(examples: Sequence[Example], length: int, vocabulary: Vocabulary) -> Example:
    """Packs examples into rows of `length` tokens; see `leon_jax.data.packing.whole`."""
    dataset = grain.MapDataset.source(examples).to_iter_dataset(grain.ReadOptions(num_threads=0))
    rows = list(packing.whole(dataset, length, _BINS, 0, vocabulary))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
