"""Assembles global batches on the mesh from the host batches of data shards.

A run's training data has a fixed number of *data shards*. Each shard is an endless stream of its
part of every batch. A process reads the shards whose rows its devices hold. So batches do not
depend on the number of processes, and a run can resume with more or fewer of them, bit for bit.
"""

import json
from collections.abc import Callable, Mapping

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from leon_jax import sharding
from leon_jax.config import UserError

# (shard, shards) -> endless host batches {name: array[rows of the shard, ...]}.
MakeShard = Callable[[int, int], grain.IterDataset]


class Feed:
    """An iterator of global batches `{name: array[batch, ...]}`, sharded over the first axis.

    Create and use it under `jax.set_mesh`.

    Args:
      make: makes the host batches of one shard; may raise UserError.
      shards: number of data shards. With fewer shards than processes, several processes read the
        same shard, which is correct but slower.

    Raises:
      UserError: `shards` is below 1.
    """

    def __init__(self, make: MakeShard, shards: int = 1) -> None:
        if shards < 1:
            raise UserError(f"data_shards is {shards}; it must be at least 1")
        self._layout, self._shards = sharding.batch_sharding(), shards
        self._iterators = {
            shard: iter(make(shard, shards)) for shard in local_shards(self._layout, shards)
        }

    def __next__(self) -> dict[str, jax.Array]:
        parts = {shard: next(iterator) for shard, iterator in self._iterators.items()}
        names = next(iter(parts.values()))
        return {
            name: self._join({shard: part[name] for shard, part in parts.items()}) for name in names
        }

    def get_state(self) -> dict[str, str]:
        """Returns the position of every shard, as JSON by shard number; same on all processes."""
        local_states = {
            str(shard): json.dumps(iterator.get_state())
            for shard, iterator in self._iterators.items()
        }
        if jax.process_count() == 1:
            return local_states
        return _merge_over_processes(local_states)

    def set_state(self, states: Mapping[str, str]) -> None:
        """Restores the positions that `get_state` returned on any number of processes.

        Raises:
          UserError: the number of shards differs.
        """
        if len(states) != self._shards:
            raise UserError(
                f"loop.data_shards is {self._shards}, but the checkpoint has {len(states)} data "
                f"shards; set it to {len(states)}"
            )
        for shard, iterator in self._iterators.items():
            iterator.set_state(json.loads(states[str(shard)]))

    def _join(self, parts: dict[int, np.ndarray]) -> jax.Array:
        rows, *item_shape = next(iter(parts.values())).shape
        shape = (rows * self._shards, *item_shape)

        def device_rows(index: tuple[slice, ...] | None) -> Shaped[np.ndarray, "rows *item"]:
            assert index is not None
            start, stop, _ = index[0].indices(shape[0])
            pieces = []
            for shard in range(start // rows, -(-stop // rows)):
                first = shard * rows
                pieces.append(parts[shard][max(start - first, 0) : stop - first])
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

        return jax.make_array_from_callback(shape, self._layout, device_rows)


def local_shards(layout: jax.NamedSharding, shards: int) -> list[int]:
    """Returns the shards whose rows this process's devices hold, given a batch layout."""
    parts = len({str(i) for i in layout.devices_indices_map((layout.mesh.size,)).values()})
    # An array of parts * shards rows splits evenly both into parts and into shards.
    needed: set[int] = set()
    for index in layout.addressable_devices_indices_map((parts * shards,)).values():
        assert index is not None
        start, stop, _ = index[0].indices(parts * shards)
        needed.update(range(start // parts, -(-stop // parts)))
    return sorted(needed)


def _merge_over_processes(local: dict[str, str]) -> dict[str, str]:
    """Returns the union of the dictionaries of all processes; a collective operation."""
    text = np.frombuffer(json.dumps(local).encode(), np.uint8)
    max_length = int(multihost_utils.process_allgather(np.array(len(text))).max())
    # JSON ignores trailing spaces.
    padded = np.full(max_length, ord(" "), np.uint8)
    padded[: len(text)] = text
    union: dict[str, str] = {}
    for row in multihost_utils.process_allgather(padded):
        union |= json.loads(bytes(row).decode())
    return union
