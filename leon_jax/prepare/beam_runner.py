"""Prepares shards on a cluster: Apache Beam calls `shard_encoding.Worker` for each shard.

Every worker loads the models once. The sources, the model files and the output folder must have
the same paths on all workers and on the machine that starts the pipeline: addresses in buckets, or
paths on a shared disk. The disk must be able to rename folders, because a finished shard is renamed
to its final name.
"""

import logging
from collections.abc import Sequence
from typing import Any

from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.prepare.config import PrepareConfig
from leon_jax.prepare.prepare import Runner, Sources
from leon_jax.prepare.shard_encoding import Shard, Worker, is_complete

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
    raise UserError(
        f"--runner needs the package {error.name}; run: pip install 'leon_jax[beam]'"
    ) from error


class PrepareShards(beam.DoFn):
    """Encodes shards and yields their counts; see `leon_jax.prepare.shard_encoding.Worker`."""

    def __init__(self, config: PrepareConfig, sources: Sources, folder: str):
        self.config, self.sources, self.folder = config, sources, folder
        self.worker: Worker | None = None

    def setup(self) -> None:
        """Loads the models. Beam calls this once for each copy of the object."""
        self.worker = Worker(self.config, self.sources, self.folder)

    def process(self, shard: Shard) -> Any:
        """Yields `(name, count)` pairs: the numbers of documents and rejects of a shard."""
        assert self.worker is not None, "Beam calls setup first"
        yield from self.worker(shard).items()


def on_beam(runner: str, arguments: Sequence[str] = ()) -> Runner:
    """Returns a runner that encodes shards in a Beam pipeline.

    The runner raises `UserError` if the pipeline fails. Shards that are complete by then remain.

    Args:
      runner: name of the Beam runner, for example "DirectRunner" or "DataflowRunner".
      arguments: pipeline options, for example "--project=x".
    """

    def run(config: PrepareConfig, sources: Sources, folder: str, shards: Sequence[Shard]) -> None:
        folder = str(storage.absolute(folder))
        try:
            options = PipelineOptions([f"--runner={runner}", *arguments])
            with beam.Pipeline(options=options) as pipeline:
                counts = (
                    pipeline
                    | "Shards" >> beam.Create(list(shards))
                    # Without a reshuffle Beam may fuse the steps and use a single worker.
                    | "Spread" >> beam.Reshuffle()
                    | "Prepare" >> beam.ParDo(PrepareShards(config, sources, folder))
                    | "Count" >> beam.CombinePerKey(sum)
                )
                _ = counts | "Log" >> beam.Map(lambda pair: logging.info("%s: %d", *pair))
        except UserError:
            raise
        except Exception as error:  # each Beam runner raises its own exceptions
            logging.exception("the pipeline on %s failed", runner)
            raise UserError(f"the pipeline on {runner} failed; see its log") from error
        missing = [
            shard.name for shard in shards if not is_complete(storage.path(folder) / shard.name)
        ]
        if missing:
            raise UserError(
                f"{len(missing)} shards are missing, among them {missing[0]}; check that all "
                f"workers can write to {folder}"
            )

    return run
