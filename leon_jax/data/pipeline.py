"""Decoder training data: a mixture of documents becomes packed, masked token rows.

    documents -> examples (data/examples.py) -> chosen by weight from the components of a mixture
              -> rows (data/packing.py) -> batches

Everything random is a function of (seed, component, index of the example), and the order is index
arithmetic, so an iterator resumes exactly, whatever the number of threads that read ahead.
"""

from collections.abc import Sequence

import grain

from leon_jax.config import UserError
from leon_jax.data import packing
from leon_jax.data.config import DataConfig
from leon_jax.data.examples import Component, DocumentEncoder, Limits, MakeExample
from leon_jax.data.masking import MaskingConfig

# Between the seeds of two components, because every epoch takes the next seed.
_SEEDS_OF_A_COMPONENT = 2**20


def make(
    components: Sequence[Component],
    encoder: DocumentEncoder,
    config: DataConfig,
    masking: MaskingConfig,
    *,
    batch_size: int,
    seed: int = 0,
    max_positions: int | None = None,
    part_step: int = 1,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Endless batches, with an iterator that can be checkpointed.

    Args:
      components: a mixture; its examples are chosen in proportion to the components' weights.
      encoder: documents to ids.
      config: the length of a row, how it is packed, and how many threads work ahead.
      masking: the CM3 objective.
      batch_size: rows of a batch (of this process), at least 1.
      seed: decides order, neighbours and masks.
      max_positions, part_step: as for `examples`.
      shard: (index, count) of this process; processes read disjoint examples of one order.

    Returns:
      dict(ids, targets, segment_ids, positions: int32[batch_size, length],
      weights: float32[batch_size, length]). `targets[t]` is the id after `ids[t]` in the same
      example; `weights` is 0 where there is none.

    Raises:
      UserError: the shard does not exist, or a value does not fit; while iterating, see
        `MakeExample`.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    made = examples(
        components,
        encoder,
        config,
        masking,
        seed=seed,
        max_positions=max_positions,
        part_step=part_step,
        shard=shard,
    ).to_iter_dataset(
        grain.ReadOptions(
            num_threads=config.threads, prefetch_buffer_size=8 * max(config.threads, 1)
        )
    )
    if config.packing == "stream":
        rows: grain.IterDataset = packing.Stream(made, config.length)
    else:
        bins = batch_size * config.packing_bins
        rows = packing.whole(made, config.length, bins, seed, encoder.vocabulary)
    return rows.batch(batch_size, drop_remainder=True)


def examples(
    components: Sequence[Component],
    encoder: DocumentEncoder,
    config: DataConfig,
    masking: MaskingConfig,
    *,
    seed: int = 0,
    max_positions: int | None = None,
    part_step: int = 1,
    shard: tuple[int, int] = (0, 1),
) -> grain.MapDataset:
    """What `make` packs: endless examples (see `MakeExample`), shuffled anew every epoch.

    Any run of examples, in any shard, holds each component's share of them, to within one example.
    Shares are those of the weights in hundredths of the smallest, rounded down.

    Args:
      components, encoder, config, masking, seed, shard: as for `make`.
      max_positions: how many positions an example may take; by default as many as a row has.
      part_step: see `leon_jax.vocabulary.Vocabulary.positions`.

    Raises:
      UserError: the shard does not exist, or `part_step` does not fit.
    """
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"shard is {shard}; the index must be between 0 and the count")
    if part_step < 1:
        raise UserError(f"part_step is {part_step}; it must be at least 1")
    if config.packing == "stream" and part_step > 1:
        raise UserError(
            f"part_step is {part_step}, but a stream is cut inside parts, which then "
            'start nowhere; set model.part_step to 1 or data.packing to "whole"'
        )
    limits = Limits()
    if config.packing == "whole":
        limits = Limits(config.length, max_positions or config.length, part_step)
    datasets = []
    for number, component in enumerate(components):
        first = seed + number * _SEEDS_OF_A_COMPONENT
        datasets.append(
            grain.MapDataset.range(len(component.source))
            .seed(first % 2**32)
            .shuffle()
            .repeat()
            # Before the cut into shards, so that no two of them draw the same random numbers.
            .random_map(MakeExample(component, encoder, masking, limits), seed=(first + 1) % 2**32)
            .slice(slice(index, None, count))
        )
    # After it: a cut through the mixture could fall in step with it, one component a shard.
    return grain.MapDataset.mix(datasets, [component.settings.weight for component in components])
