"""Input pipelines: shuffled mixtures, and the packed, masked token rows of the decoder.

    documents -> examples (data/examples.py) -> mixture, sampled by weight
              -> rows (data/packing.py) -> batches

All randomness is a function of the seed, the component and the index of the example, and the order
is index arithmetic. An iterator therefore resumes exactly, with any number of threads.
"""

from collections.abc import Sequence

import grain

from leon_jax.config import UserError
from leon_jax.data import packing
from leon_jax.data.config import DataConfig, FolderComponent
from leon_jax.data.examples import Component, DocumentEncoder, Limits, MakeExample
from leon_jax.data.masking import MaskingConfig

# Distance between the seeds of two components; every epoch of a component uses the next seed.
_SEED_STRIDE = 2**20


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
    """Returns an endless dataset of batches, whose iterator can be checkpointed.

    Args:
      components: the components of the mixture; examples are sampled by their weights.
      encoder: encodes documents as ids.
      config: length and packing of rows, and the number of threads.
      masking: the CM3 objective.
      batch_size: rows per batch of this process, at least 1.
      seed: seed of the order, the retrieved documents and the masks.
      max_positions, part_step: as for `examples`.
      shard: (index, count) of this process; processes read disjoint examples of the same order.

    Returns:
      dict(ids, targets, segment_ids, positions: int32[batch_size, length],
      weights: float32[batch_size, length]). `targets[t]` is the id after `ids[t]` in the same
      example. `weights` is 0 at padding.

    Raises:
      UserError: the shard does not exist, or a value does not fit; while iterating, see
        `MakeExample`.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    unpacked = examples(
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
        rows: grain.IterDataset = packing.Stream(unpacked, config.length)
    else:
        bins = batch_size * config.packing_bins
        rows = packing.whole(unpacked, config.length, bins, seed, encoder.vocabulary)
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
    """Returns an endless dataset of unpacked examples (see `MakeExample`), shuffled every epoch.

    Each component has its share of any consecutive examples of a shard, to within one example.
    Shares follow the weights, rounded down to hundredths of the smallest weight.

    Args:
      components, encoder, config, masking, seed, shard: as for `make`.
      max_positions: maximum number of positions of an example; by default the length of a row.
      part_step: see `leon_jax.vocabulary.Vocabulary.positions`.

    Raises:
      UserError: the shard does not exist, or `part_step` does not fit.
    """
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"shard is {shard}; the index must be at least 0 and below the count")
    if part_step < 1:
        raise UserError(f"part_step is {part_step}; it must be at least 1")
    if config.packing == "stream" and part_step > 1:
        raise UserError(
            f'part_step is {part_step}, but the packing "stream" splits parts, so positions of '
            'parts are undefined; set model.part_step to 1 or data.packing to "whole"'
        )
    limits = Limits()
    if config.packing == "whole":
        limits = Limits(config.length, max_positions or config.length, part_step)
    return shuffled_mixture(
        [len(component.source) for component in components],
        [MakeExample(component, encoder, masking, limits) for component in components],
        [component.settings for component in components],
        seed=seed,
        shard=shard,
    )


def shuffled_mixture(
    lengths: Sequence[int],
    transforms: Sequence[grain.transforms.RandomMap],
    settings: Sequence[FolderComponent],
    *,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> grain.MapDataset:
    """Returns an endless dataset of a mixture, in which every component is shuffled every epoch.

    Each component has its share of any consecutive examples of a shard, to within one example.
    Shares follow the weights, rounded down to hundredths of the smallest weight.

    Args:
      lengths: number of items of each component, at least 1.
      transforms: for each component, maps the index of an item to an example.
      settings: weight of each component, the number of its order, and where the order begins.
      seed: seed of the order and of the transforms.
      shard: (index, count); shards are disjoint parts of the same order.
    """
    index, count = shard
    datasets = []
    streams = zip(lengths, transforms, settings, strict=True)
    for place, (length, transform, component) in enumerate(streams):
        stream = place if component.stream is None else component.stream
        first_seed = seed + stream * _SEED_STRIDE
        datasets.append(
            grain.MapDataset.range(length)
            .seed(first_seed % 2**32)
            .shuffle()
            .repeat()
            # Map before slicing into shards, so that shards use different random numbers.
            .random_map(transform, seed=(first_seed + 1) % 2**32)
            .slice(slice(component.start + index, None, count))
        )
    # Mix after slicing: slicing the mixture could put each component into a single shard.
    return grain.MapDataset.mix(datasets, [component.weight for component in settings])
