"""The same work on a cluster engine: Apache Beam calls the function of `shard.py` for each shard.

Every worker loads the models once. Sources, model files and the output must be at the same paths
on all workers and on the machine that starts the pipeline, on a file system that renames folders,
because that is how a shard's folder is put in place.
"""

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from leon_jax.config import UserError
from leon_jax.prepare.config import PrepareConfig
from leon_jax.prepare.prepare import Runner, Sources
from leon_jax.prepare.shard_encoding import Shard, Worker

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
    raise UserError(
        f"--runner needs the package {error.name}; run: pip install 'leon_jax[beam]'"
    ) from error


class PrepareShards(beam.DoFn):
    """Shards to their counts; see `leon_jax.prepare.shard_encoding.Worker`."""

    def __init__(self, config: PrepareConfig, sources: Sources, folder: str):
        self.config, self.sources, self.folder = config, sources, folder
        self.worker: Worker | None = None

    def setup(self) -> None:
        """Loads the models; Beam calls it once for each copy of this object."""
        self.worker = Worker(self.config, self.sources, self.folder)

    def process(self, shard: Shard) -> Any:
        """Yields `(what, number)` pairs."""
        assert self.worker is not None, "Beam calls setup first"
        yield from self.worker(shard).items()


def on_beam(runner: str, arguments: Sequence[str] = ()) -> Runner:
    """Does the shards with a runner of Beam, for example "DirectRunner" or "DataflowRunner".

    Args:
      runner: its name.
      arguments: options of the pipeline, for example "--project=x".

    Raises (when it is run):
      UserError: the pipeline failed; shards that were done stay done.
    """

    def run(config: PrepareConfig, sources: Sources, folder: str, shards: Sequence[Shard]) -> None:
        folder = str(pathlib.Path(folder).absolute())
        try:
            options = PipelineOptions([f"--runner={runner}", *arguments])
            with beam.Pipeline(options=options) as pipeline:
                counts = (
                    pipeline
                    | "Shards" >> beam.Create(list(shards))
                    # Each shard may go to another worker, whoever made the list.
                    | "Spread" >> beam.Reshuffle()
                    | "Prepare" >> beam.ParDo(PrepareShards(config, sources, folder))
                    | "Count" >> beam.CombinePerKey(sum)
                )
                _ = counts | "Log" >> beam.Map(lambda pair: logging.info("%s: %d", *pair))
        except UserError:
            raise
        except Exception as error:  # each runner has its own
            logging.exception("the pipeline on %s failed", runner)
            raise UserError(f"the pipeline on {runner} failed; its log says where") from error
        missing = [shard.name for shard in shards if not pathlib.Path(folder, shard.name).is_dir()]
        if missing:
            raise UserError(
                f"{len(missing)} shards are not done, {missing[0]} among them; do all workers see "
                f"{folder}?"
            )

    return run
