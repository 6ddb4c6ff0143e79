"""The rows of a vector index as arrays on the devices of a mesh, one block at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Num


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes of the pieces of a search.

    Attributes:
      tile: rows that a device scores at once; a multiple of `LANES`.
      queries: queries of a batch of an approximate search.
      queries_exact: queries of a batch of an exact search.
      block: bytes of a block on one device. Two blocks are in memory at once if there are several.
    """

    tile: int
    queries: int
    queries_exact: int
    block: int


# Measured on two CPU cores: half the tile is as fast for k = 20 and a sixth slower for k = 128.
CPU = BlockSizes(tile=65_536, queries=1024, queries_exact=1024, block=2**27)
# Exact scores (32 MB) stay in a TPU's vector memory. Float32 products are bound by arithmetic even
# with so few queries.
CHIP = BlockSizes(tile=32_768, queries=1024, queries_exact=256, block=2**31)
# Lanes of a TPU's vector register. Tiles are multiples of it, and it is the smallest group of
# `top_k` on TPUs.
LANES = 128


class NotFiniteError(Exception):
    """One of the rows `start` to `stop` (exclusive) is not finite."""

    def __init__(self, start: int, stop: int):
        super().__init__(start, stop)
        self.start, self.stop = start, stop


class RowBlocks:
    """The rows of a vector index as a series of arrays on the devices of a mesh.

    Every process reads only the rows of its local devices. An index of one block stays on the
    devices.

    Args:
      read: returns rows `start` to `stop`, float16 or float32[stop - start, d].
      count: number of rows.
      dimensions: d.
      dtype: of the rows.
      mesh: the devices that share the rows.
    """

    def __init__(
        self,
        read: Callable[[int, int], np.ndarray],
        count: int,
        dimensions: int,
        dtype: np.dtype,
        mesh: jax.sharding.Mesh,
    ):
        self.read, self.count, self.dimensions, self.dtype = read, count, dimensions, dtype
        self.mesh = mesh
        self.sizes = CPU if mesh.devices.flat[0].platform == "cpu" else CHIP
        self.layout = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        row_bytes = dimensions * dtype.itemsize
        self.size, self.tile = block_size(count, mesh.size, row_bytes, self.sizes)
        self._resident: jax.Array | None = None
        self._finite: set[int] = set()  # first rows of the blocks that were checked

    def starts(self, keep: Bool[np.ndarray, "n"] | None) -> list[int]:
        """Returns the first row of each block that has a row to keep."""
        return [
            start
            for start in range(0, self.count, self.size)
            if keep is None or keep[start : start + self.size].any()
        ]

    def rows(self, start: int) -> Num[Array, "block d"]:
        """Returns the block that starts at row `start`, padded with zeros."""
        if self._resident is not None:
            return self._resident

        def read_shard(index: Any) -> np.ndarray:
            low, high, _ = index[0].indices(self.size)
            shard = np.zeros((high - low, self.dimensions), self.dtype)
            count = min(start + high, self.count) - (start + low)
            if count > 0:
                shard[:count] = self.read(start + low, start + low + count)
            return shard

        shape = (self.size, self.dimensions)
        block = jax.make_array_from_callback(shape, self.layout, read_shard)
        if self.size >= self.count:
            self._resident = block
        return block

    def allowed(
        self, start: int, keep: Bool[np.ndarray, "n"] | None
    ) -> Bool[Array, "block"] | None:
        """Returns the mask of the rows of a block that a search may return; None: all rows."""
        count = min(self.size, self.count - start)
        if keep is None and count == self.size:
            return None
        mask = np.zeros(self.size, bool)
        mask[:count] = True if keep is None else keep[start : start + count]
        return jax.make_array_from_callback(mask.shape, self.layout, mask.__getitem__)

    def check_finite(self, start: int, rows: Num[Array, "block d"]) -> None:
        """Checks a block the first time that it is used.

        Raises:
          NotFiniteError: the block has a number that is not finite.
        """
        if start not in self._finite and not _all_finite(rows):
            self._resident = None
            raise NotFiniteError(start, min(start + self.size, self.count))
        self._finite.add(start)


def block_size(count: int, devices: int, row_bytes: int, sizes: BlockSizes) -> tuple[int, int]:
    """Returns the rows of a block (over all devices) and of a tile, with little padding.

    Args:
      count: rows of the index.
      devices: number of devices that share a block.
      row_bytes: bytes of a row.
      sizes: the largest sizes. A block has at least one tile.
    """
    device_rows = max(-(-count // devices), 1)
    tiles = -(-device_rows // sizes.tile)
    blocks = -(-tiles // max(sizes.block // (row_bytes * sizes.tile), 1))
    tiles = -(-tiles // blocks)
    tile = -(-device_rows // (blocks * tiles * LANES)) * LANES
    return tiles * tile * devices, tile


@jax.jit
def _all_finite(rows):
    return jnp.isfinite(rows).all()


def put_padded(layout: jax.NamedSharding, size: int, rows: np.ndarray, value: float) -> jax.Array:
    """Puts rows on the devices, padded to `size` rows with `value`."""
    padded = np.full((size, *rows.shape[1:]), value, rows.dtype)
    padded[: len(rows)] = rows
    return jax.make_array_from_callback(padded.shape, layout, padded.__getitem__)


def next_power_of_two(count: int) -> int:
    """Rounds up to a power of two, so that a few compiled programs serve all sizes."""
    return 1 << (count - 1).bit_length()
