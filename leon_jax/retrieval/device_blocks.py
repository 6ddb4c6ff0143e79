"""The rows of a bank as arrays on the devices of a mesh, a block at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Num


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How a search is cut into pieces.

    Attributes:
      tile: rows that a device scores at once, a multiple of `LANES`.
      queries: queries that are scored at once by an approximate search.
      queries_exact: and by an exact one.
      block: bytes of a block on one device; two blocks live at once where there are several.
    """

    tile: int
    queries: int
    queries_exact: int
    block: int


# On two CPU cores; half the tile is as fast for k = 20 and takes a sixth longer for k = 128.
CPU = Sizes(tile=65_536, queries=1024, queries_exact=1024, block=2**27)
# Exact scores (32 MB) stay in a TPU's vector memory, and float32 products are bound by arithmetic
# with so few queries, too.
CHIP = Sizes(tile=32_768, queries=1024, queries_exact=256, block=2**31)
# Lanes of a TPU's vector register: tiles are multiples of it, and `top_k` makes no smaller groups
# there.
LANES = 128


class NotFiniteError(Exception):
    """A row from `start` up to `stop` is not finite."""

    def __init__(self, start: int, stop: int):
        super().__init__(start, stop)
        self.start, self.stop = start, stop


class Blocks:
    """The rows of a bank as arrays on the devices of a mesh, made one after the other.

    Every process reads the rows of its own devices only. A bank of one block stays on the devices.

    Args:
      read: gives rows `start` to `stop`, float16 or float32[stop - start, d].
      count: how many rows there are.
      dimensions: d.
      dtype: of the rows.
      mesh: whose devices share them.
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
        self._finite: set[int] = set()  # first rows of the blocks that were looked at

    def starts(self, keep: Bool[np.ndarray, "n"] | None) -> list[int]:
        """First rows of the blocks that hold a row to keep."""
        return [
            start
            for start in range(0, self.count, self.size)
            if keep is None or keep[start : start + self.size].any()
        ]

    def rows(self, start: int) -> Num[Array, "block d"]:
        """The block from row `start` on, filled up with zeros."""
        if self._resident is not None:
            return self._resident

        def local(index: Any) -> np.ndarray:
            low, high, _ = index[0].indices(self.size)
            part = np.zeros((high - low, self.dimensions), self.dtype)
            there = min(start + high, self.count) - (start + low)
            if there > 0:
                part[:there] = self.read(start + low, start + low + there)
            return part

        shape = (self.size, self.dimensions)
        block = jax.make_array_from_callback(shape, self.layout, local)
        if self.size >= self.count:
            self._resident = block
        return block

    def allowed(
        self, start: int, keep: Bool[np.ndarray, "n"] | None
    ) -> Bool[Array, "block"] | None:
        """Which rows of a block may be found; None: all."""
        there = min(self.size, self.count - start)
        if keep is None and there == self.size:
            return None
        mask = np.zeros(self.size, bool)
        mask[:there] = True if keep is None else keep[start : start + there]
        return jax.make_array_from_callback(mask.shape, self.layout, mask.__getitem__)

    def check(self, start: int, rows: Num[Array, "block d"]) -> None:
        """Looks at each block once.

        Raises:
          NotFiniteError: this one holds a number that is not finite.
        """
        if start not in self._finite and not _all_finite(rows):
            self._resident = None
            raise NotFiniteError(start, min(start + self.size, self.count))
        self._finite.add(start)


def block_size(count: int, devices: int, row_bytes: int, sizes: Sizes) -> tuple[int, int]:
    """Rows of a block (of all devices) and of a tile, so that few are added to fill blocks up.

    Args:
      count: rows of the bank.
      devices: how many share a block.
      row_bytes: of one row.
      sizes: what they are at most; a block has one tile at least.
    """
    each = max(-(-count // devices), 1)
    tiles = -(-each // sizes.tile)
    blocks = -(-tiles // max(sizes.block // (row_bytes * sizes.tile), 1))
    tiles = -(-tiles // blocks)
    tile = -(-each // (blocks * tiles * LANES)) * LANES
    return tiles * tile * devices, tile


@jax.jit
def _all_finite(rows):
    return jnp.isfinite(rows).all()


def put(layout: jax.NamedSharding, size: int, rows: np.ndarray, value: float) -> jax.Array:
    """Rows on the devices, with rows of `value` added up to `size` of them."""
    filled = np.full((size, *rows.shape[1:]), value, rows.dtype)
    filled[: len(rows)] = rows
    return jax.make_array_from_callback(filled.shape, layout, filled.__getitem__)


def next_power(count: int) -> int:
    """The next power of two, so that a few programs serve all sizes."""
    return 1 << (count - 1).bit_length()
