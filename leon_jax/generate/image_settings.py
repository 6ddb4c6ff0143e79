"""The settings of image generation."""

import dataclasses

from leon_jax.config import UserError
from leon_jax.engine.engine import Sample
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.generate import ranking
from leon_jax.model_description import GenerationDefaults


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """Settings for generating the images of a prompt.

    Attributes:
      params: sampling parameters; if there are several, image i uses number i modulo their count.
        None: those of the model.
      num_images: number of images that are returned, 1 or more.
      num_docs: maximum number of retrieved documents; None: the model's default.
      seed: seed of the first generated image. Image i has the seed `seed` + i. All seeds must be
        from 0 to 2**32 - 1.
      best_of: number of images that are generated; the `num_images` of them that fit the prompt
        best are returned, best first. None: `num_images`, returned in the order of their seeds.
      rank_by: "clip", the cosine similarity of image and prompt by the retrieval encoder; or
        "likelihood", the likelihood of the prompt as a caption of the image.

    Raises:
      UserError: a value is out of range.
    """

    params: tuple[SamplingParams, ...] | None = None
    num_images: int = 1
    num_docs: int | None = None
    seed: int = 0
    best_of: int | None = None
    rank_by: ranking.Ranking = "clip"

    def __post_init__(self):
        for params in self.params or ():
            params.check()
        if self.params == ():
            raise UserError("params is empty; give at least one SamplingParams")
        if self.num_images < 1:
            raise UserError(f"num_images is {self.num_images}; it must be at least 1")
        count = self.num_images if self.best_of is None else self.best_of
        check_seed(self.seed, count)
        ranking.check(self.rank_by, count, self.num_images)

    def filled(self, defaults: GenerationDefaults) -> "ImageSettings":
        """Returns the settings with a model's defaults for `params` and `num_docs` of None."""
        params = (defaults.sampling,) if self.params is None else self.params
        num_docs = defaults.num_docs if self.num_docs is None else self.num_docs
        return dataclasses.replace(self, params=params, num_docs=num_docs)

    @property
    def max_docs(self) -> int:
        """`num_docs` of settings that are filled.

        Raises:
          ValueError: `num_docs` is None; see `filled`.
        """
        if self.num_docs is None:
            raise ValueError("num_docs is None; call filled with the defaults of a model")
        return self.num_docs

    @property
    def samples(self) -> tuple[Sample, ...]:
        """One sample for each generated image.

        Raises:
          ValueError: `params` is None; see `filled`.
        """
        params = self.params
        if params is None:
            raise ValueError("params is None; call filled with the defaults of a model")
        count = self.num_images if self.best_of is None else self.best_of
        return tuple(Sample(self.seed + i, params[i % len(params)]) for i in range(count))


def check_seed(seed: int, count: int = 1) -> None:
    """Checks the seeds `seed`, ..., `seed` + `count` - 1.

    Raises:
      UserError: one of them is not from 0 to 2**32 - 1.
    """
    if not 0 <= seed <= 2**32 - count:
        raise UserError(f"seed is {seed}; it must be from 0 to {2**32 - count}")
