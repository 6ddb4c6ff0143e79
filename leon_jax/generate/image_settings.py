"""The settings of a request for images."""

import dataclasses

from leon_jax.config import UserError
from leon_jax.engine.engine import Sample
from leon_jax.engine.guidance import ClassifierFree
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.generate import ranking


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How images are generated for a prompt.

    Attributes:
      params: how ids are sampled; of several, the images take turns.
      num_images: how many images are returned. They have the seeds `seed`, `seed` + 1, ...
      num_docs: how many documents are retrieved and read first, at most.
      seed: of the first image, 0 or more; all seeds are below 2**32.
      best_of: how many images are generated; the `num_images` that fit the prompt best are
        returned, best first. None: as many as are returned, in the order of their seeds.
      rank_by: "clip", the cosine of image and prompt by the retrieval encoder; or "likelihood",
        that of the prompt as a caption of the image.

    Raises:
      UserError: a value is out of range.
    """

    params: tuple[SamplingParams, ...] = (SamplingParams(ClassifierFree(3.0)),)
    num_images: int = 1
    num_docs: int = 2
    seed: int = 0
    best_of: int | None = None
    rank_by: ranking.Ranking = "clip"

    def __post_init__(self):
        for params in self.params:
            params.check()
        if self.num_images < 1:
            raise UserError(f"num_images is {self.num_images}; it must be at least 1")
        count = self.num_images if self.best_of is None else self.best_of
        check_seed(self.seed, count)
        ranking.check(self.rank_by, count, self.num_images)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """One for each image that is generated."""
        count = self.num_images if self.best_of is None else self.best_of
        return tuple(Sample(self.seed + i, self.params[i % len(self.params)]) for i in range(count))


def check_seed(seed: int, count: int = 1) -> None:
    """Checks the seeds from `seed` on.

    Raises:
      UserError: one of them is not a number of 32 bits.
    """
    if not 0 <= seed <= 2**32 - count:
        raise UserError(f"seed is {seed}; it must be from 0 to {2**32 - count}")
