"""Chooses the static sizes of the compiled programs for a queue, and checks which requests fit."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from leon_jax.engine.decode_loop import output_sizes, round_up_rows
from leon_jax.engine.engine import Engine, TokenRequest
from leon_jax.engine.sampling_params import SamplingParams, distinct_variants, variant_key


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The static sizes of the compiled programs.

    Attributes:
      groups: number of groups of slots.
      samples: number of slots in a group.
      prompt_lengths: padded length of the prompts of each stream.
      spans: maximum number of spans of a grammar.
      max_new_tokens: maximum number of ids that a row generates.
      variants: one example of each variant of sampling parameters (see `variant_key`).
    """

    groups: int
    samples: int
    prompt_lengths: tuple[int, ...]
    spans: int
    max_new_tokens: int
    variants: tuple[SamplingParams, ...]

    @classmethod
    def of(cls, engine: Engine, requests: Sequence[TokenRequest]) -> "BatchSizes":
        """Returns the sizes for a queue of exactly these requests.

        The number of groups is rounded up to a multiple of the batch shards of the current mesh
        (see `round_up_rows`).

        Args:
          engine: the engine with the slots and the padded prompt lengths.
          requests: one or more requests that `Engine.check` accepts.
        """
        params = [sample.params for request in requests for sample in request.samples]
        samples = group_size([len(request.samples) for request in requests], engine.slots)
        units = sum(-(-len(request.samples) // samples) for request in requests)
        streams = max(each.guidance.streams for each in params)
        spans, new_tokens = output_sizes([request.grammar for request in requests])
        return cls(
            # The number of units is rounded up to a power of two, so that few programs are needed.
            round_up_rows(min(engine.slots // samples, next_power_of_two(units))),
            samples,
            tuple(
                engine.bucket(max(len(stream_ids(request, stream)) for request in requests))
                for stream in range(streams)
            ),
            spans,
            new_tokens,
            distinct_variants(params),
        )

    def grow(self, other: "BatchSizes") -> "BatchSizes":
        """Returns `other` with the larger lengths of both, and with the variants of both.

        The lengths are `prompt_lengths`, `spans` and `max_new_tokens`. If only one of the two has
        a stream, the stream keeps its length.
        """
        longer, shorter = self.prompt_lengths, other.prompt_lengths
        if len(longer) < len(shorter):
            longer, shorter = shorter, longer
        lengths = [max(pair) for pair in zip(longer, shorter, strict=False)]
        return dataclasses.replace(
            other,
            prompt_lengths=(*lengths, *longer[len(shorter) :]),
            spans=max(self.spans, other.spans),
            max_new_tokens=max(self.max_new_tokens, other.max_new_tokens),
            variants=distinct_variants([*self.variants, *other.variants]),
        )

    def fits(self, request: TokenRequest) -> bool:
        """Returns whether the request can run within these sizes.

        The number of samples does not matter, because samples without a free slot wait.
        """
        params = [sample.params for sample in request.samples]
        streams = max(each.guidance.streams for each in params)
        spans, new_tokens = output_sizes([request.grammar])
        variants = {variant_key(variant) for variant in self.variants}
        return (
            streams <= len(self.prompt_lengths)
            and all(
                len(stream_ids(request, stream)) <= length
                for stream, length in enumerate(self.prompt_lengths)
            )
            and spans <= self.spans
            and new_tokens <= self.max_new_tokens
            and all(variant_key(each) in variants for each in params)
        )


def stream_ids(request: TokenRequest, stream: int) -> np.ndarray:
    """Returns the ids of a stream, int[n].

    If the request has fewer streams, returns the first id of stream 0. No sample of the request
    uses that stream.
    """
    streams = request.streams
    return streams[stream] if stream < len(streams) else streams[0][:1]


def group_size(samples: Sequence[int], slots: int) -> int:
    """Returns the number of samples that share a group.

    It minimises the number of rounds, then the number of prompts to read, then the group size.

    Args:
      samples: number of samples of each request, for one or more requests.
      slots: number of samples that are decoded at once, 1 or more.

    Returns:
      1 to min(slots, max(samples)).
    """

    def cost(size: int) -> tuple[int, int, int]:
        units = sum(-(-count // size) for count in samples)
        return -(-units // (slots // size)), units, size

    return min(range(1, min(slots, max(samples)) + 1), key=cost)


def next_power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`, which is 1 or more."""
    return 1 << (count - 1).bit_length()
