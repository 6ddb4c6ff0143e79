"""From the programs' host batches to global batches on the mesh.

The training data of a run are cut into a fixed number of *data shards*, each an endless stream of
its own part of every batch. Which process reads which shards follows from the mesh: each reads
those that its devices hold rows of. So a batch does not depend on the number of processes, and a
run can go on with more or fewer of them, bit for bit.
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
    """Endless global batches `{name: array[batch, ...]}`, the first axis split over the mesh.

    Make it, and use it, under `jax.set_mesh`.

    Args:
      make: the data of one shard.
      shards: how many there are. With fewer shards than processes several processes read the same
        one, which is right but slower.

    Raises:
      UserError: `shards` is below 1; or whatever `make` raises.
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
        """Where every shard is, as JSON by its number; the same on all processes."""
        local_states = {
            str(shard): json.dumps(iterator.get_state())
            for shard, iterator in self._iterators.items()
        }
        if jax.process_count() == 1:
            return local_states
        return _merge_over_processes(local_states)

    def set_state(self, states: Mapping[str, str]) -> None:
        """Goes to where `get_state` was called, by any number of processes.

        Raises:
          UserError: the states are those of another number of shards.
        """
        if len(states) != self._shards:
            raise UserError(
                f"the checkpoint's data come in {len(states)} shards, but loop.data_shards is "
                f"{self._shards}; put it back"
            )
        for shard, iterator in self._iterators.items():
            iterator.set_state(json.loads(states[str(shard)]))

    def _join(self, parts: dict[int, np.ndarray]) -> jax.Array:
        rows, *rest = next(iter(parts.values())).shape
        shape = (rows * self._shards, *rest)

        def piece(index: tuple[slice, ...] | None) -> Shaped[np.ndarray, "rows *rest"]:
            assert index is not None
            start, stop, _ = index[0].indices(shape[0])
            pieces = []
            for shard in range(start // rows, -(-stop // rows)):
                first = shard * rows
                pieces.append(parts[shard][max(start - first, 0) : stop - first])
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

        return jax.make_array_from_callback(shape, self._layout, piece)


def local_shards(layout: jax.NamedSharding, shards: int) -> list[int]:
    """The shards that this process's devices hold rows of, for batches split like `layout`."""
    parts = len({str(i) for i in layout.devices_indices_map((layout.mesh.size,)).values()})
    # On a ruler of parts * shards units both parts and shards begin at whole units.
    needed: set[int] = set()
    for index in layout.addressable_devices_indices_map((parts * shards,)).values():
        assert index is not None
        start, stop, _ = index[0].indices(parts * shards)
        needed.update(range(start // parts, -(-stop // parts)))
    return sorted(needed)


def _merge_over_processes(local: dict[str, str]) -> dict[str, str]:
    """The union of the dictionaries of all processes; collective."""
    text = np.frombuffer(json.dumps(local).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
    # Spaces after JSON mean nothing.
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(text)] = text
    union: dict[str, str] = {}
    for row in multihost_utils.process_allgather(padded):
        union |= json.loads(bytes(row).decode())
    return union
