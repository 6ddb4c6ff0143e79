"""One process of a run of several, in which one host is slow or hangs.

`python -m tests.train.slow_host WORKDIR ADDRESS PROCESSES PROCESS STEPS SLOW SECONDS FROM COMPILE
LOOP` trains the model of `test_training_loop`. Host SLOW sleeps SECONDS before each part of a batch
that it reads, from part FROM on. It compiles for COMPILE seconds longer than the others. LOOP has
more keys of the loop, as JSON.
"""

import json
import pathlib
import sys
import time

import jax

from leon_jax import sharding
from leon_jax.train import training_loop
from tests.train.test_training_loop import ToyConfig, ToyProgram


class SlowProgram(ToyProgram):
    """Its batches are late from number `first` on, and its step is traced slowly."""

    def __init__(self, config: ToyConfig, seconds: float, first: int, tracing: float) -> None:
        super().__init__(config)
        self.seconds, self.first, self.count = seconds, first, 0
        self.tracing = tracing

    def step(self, state, batch):
        time.sleep(self.tracing)
        return super().step(state, batch)

    def batches(self, shard=0, shards=1):
        return super().batches(shard, shards).map(self.delayed)

    def delayed(self, batch):
        self.count += 1
        if self.count >= self.first:
            time.sleep(self.seconds)
        return batch


if __name__ == "__main__":
    workdir, address, *numbers, loop = sys.argv[1:]
    processes, process, steps, slow = map(int, numbers[:4])
    seconds, first, tracing = float(numbers[4]), int(numbers[5]), float(numbers[6])
    if process != slow:
        seconds = tracing = 0.0
    jax.distributed.initialize(address, processes, process)
    settings = training_loop.LoopConfig(
        mesh=(processes, 1, 1, 1), data_shards=4, save_every=1000, sample_every=1000,
        **json.loads(loop),
    )  # fmt: skip
    with jax.set_mesh(sharding.make_mesh(settings.mesh)):
        program = SlowProgram(ToyConfig(steps), seconds, first, tracing)
        training_loop.run(program, settings, pathlib.Path(workdir))
