"""Decoder training data: a mixture of documents becomes packed, masked token rows.

    documents -> examples (data/examples.py) -> drawn by weight from the parts of a mixture
              -> rows (data/packing.py) -> batches

Everything random is a function of (seed, part, index of the example), and the order is index
arithmetic, so an iterator resumes exactly, whatever the number of threads that read ahead.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import grain

from leon_jax.config import UserError
from leon_jax.data import packing
from leon_jax.data.examples import Encoder, MakeExample, Part, Room
from leon_jax.data.masking import MaskingConfig

# Between the seeds of two parts, because every epoch takes the next seed.
_SEEDS_OF_A_PART = 2**20


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Settings of `make`.

    Attributes:
      length: tokens of a row.
      max_positions: how many positions an example may take; by default as many as a row has.
      part_step: see `leon_jax.vocabulary.Vocabulary.positions`.
      batch_size: rows of a batch (of this process).
      seed: decides order, neighbours and masks.
      packing: how examples become rows (see `leon_jax.data.packing`): "whole", none is cut, and
        retrieved documents that do not fit the row are left out; or "stream", examples of any
        length, cut where a row is full.
      packing_bins: of "whole": rows that are filled side by side, in batches; more bins pad less,
        and cost a longer replay after a restart.
      spare_spans: of "whole": an example keeps room for this many masked spans; more only where it
        fits.
      threads: threads that make examples ahead; 0 makes them when they are needed.
    """

    length: int
    batch_size: int
    seed: int = 0
    packing: Literal["whole", "stream"] = "whole"
    packing_bins: int = 4
    spare_spans: int = 4
    threads: int = 2
    max_positions: int | None = None
    part_step: int = 1

    def __post_init__(self) -> None:
        for name in ("length", "batch_size", "packing_bins", "part_step"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.threads < 0:
            raise UserError(f"threads is {self.threads}; it must be at least 0")
        if self.packing == "stream" and self.part_step > 1:
            raise UserError(
                f"part_step is {self.part_step}, but a stream is cut inside parts, which then "
                'start nowhere; set model.part_step to 1 or data.packing to "whole"'
            )


def make(
    parts: Sequence[Part],
    encoder: Encoder,
    config: PipelineConfig,
    masking: MaskingConfig,
    *,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Endless batches, with an iterator that can be checkpointed.

    Args:
      parts: a mixture; its examples are drawn in proportion to the parts' weights.
      encoder: documents to ids.
      config: sizes and seed.
      masking: the CM3 objective.
      shard: (index, count) of this process; processes read disjoint examples of one order.

    Returns:
      dict(ids, targets, segment_ids, positions: int32[batch_size, length],
      weights: float32[batch_size, length]). `targets[t]` is the id after `ids[t]` in the same
      example; `weights` is 0 where there is none.

    Raises:
      UserError: the shard does not exist; while iterating, see `MakeExample`.
    """
    threads = config.threads
    made = examples(parts, encoder, config, masking, shard=shard).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8 * max(threads, 1))
    )
    if config.packing == "stream":
        rows: grain.IterDataset = packing.Stream(made, config.length)
    else:
        bins = config.batch_size * config.packing_bins
        rows = packing.whole(made, config.length, bins, config.seed, encoder.vocabulary)
    return rows.batch(config.batch_size, drop_remainder=True)


def examples(
    parts: Sequence[Part],
    encoder: Encoder,
    config: PipelineConfig,
    masking: MaskingConfig,
    *,
    shard: tuple[int, int] = (0, 1),
) -> grain.MapDataset:
    """What `make` packs: endless examples (see `MakeExample`), shuffled anew every epoch of a part.

    Any run of examples, in any shard, holds each part's share of them, to within one example.
    Shares are those of the weights in hundredths of the smallest, rounded down.
    """
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"shard is {shard}; the index must be between 0 and the count")
    room = Room()
    if config.packing == "whole":
        positions = config.max_positions or config.length
        room = Room(config.length, positions, config.part_step, config.spare_spans)
    datasets = []
    for number, part in enumerate(parts):
        seed = config.seed + number * _SEEDS_OF_A_PART
        datasets.append(
            grain.MapDataset.range(len(part.source))
            .seed(seed % 2**32)
            .shuffle()
            .repeat()
            # Before the cut into shards, so that no two of them draw the same random numbers.
            .random_map(MakeExample(part, encoder, masking, room), seed=(seed + 1) % 2**32)
            .slice(slice(index, None, count))
        )
    # After it: a cut through the mixture could fall in step with it, one part a shard.
    return grain.MapDataset.mix(datasets, [part.weight for part in parts])
