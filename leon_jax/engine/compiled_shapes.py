"""The static sizes of the compiled programs: which requests fit, and which sizes suit a queue."""

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
      groups: groups of slots.
      samples: slots of a group.
      prompt_lengths: padded length of the prompts of each stream.
      spans, max_new_tokens: the longest grammar.
      variants: one example of each variant of sampling parameters.
    """

    groups: int
    samples: int
    prompt_lengths: tuple[int, ...]
    spans: int
    max_new_tokens: int
    variants: tuple[SamplingParams, ...]

    @classmethod
    def of(cls, engine: Engine, requests: Sequence[TokenRequest]) -> "BatchSizes":
        """The sizes that suit these requests if they are all that there is."""
        params = [sample.params for request in requests for sample in request.samples]
        samples = group_size([len(request.samples) for request in requests], engine.slots)
        units = sum(-(-len(request.samples) // samples) for request in requests)
        streams = max(each.guidance.streams for each in params)
        spans, new_tokens = output_sizes([request.grammar for request in requests])
        return cls(
            # A power of two, so that few programs serve all queues.
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
        """`other`, with lengths and variants that suit both."""
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
        """Whether the request can run within these sizes."""
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
    """The ids of a stream; one id if the request has fewer streams: no row of it reads them."""
    streams = request.streams
    return streams[stream] if stream < len(streams) else streams[0][:1]


def group_size(samples: Sequence[int], slots: int) -> int:
    """How many samples share a group: the fewest rounds, then the fewest prompts to read.

    Args:
      samples: the number of samples of each request.
      slots: how many samples run side by side.
    """

    def cost(size: int) -> tuple[int, int, int]:
        units = sum(-(-count // size) for count in samples)
        return -(-units // (slots // size)), units, size

    return min(range(1, min(slots, max(samples)) + 1), key=cost)


def next_power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
