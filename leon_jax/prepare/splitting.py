"""Assigns documents to train or to the held-out split, so that nothing held out is trained on.

Documents that share a group or an image belong together. A hash decides which of these sets are
held out, so the decision does not depend on the order or the number of the documents.
"""

import hashlib

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Int, UInt8

Digests = UInt8[np.ndarray, "n 16"]


def connected_sets(groups: Digests, pictures: Digests) -> Int[np.ndarray, "n"]:
    """Numbers the sets of documents that share a group or an image, directly or through others.

    Args:
      groups: a digest of each document's group.
      pictures: a digest of each document's images.

    Returns:
      int[n], the number of each document's set.
    """
    count = len(groups)
    _, group_ids = np.unique(_as_elements(groups), return_inverse=True)
    _, picture_ids = np.unique(_as_elements(pictures), return_inverse=True)
    # A graph with one node for each document, group and image.
    documents = np.arange(count)
    nodes = np.concatenate([count + group_ids, 2 * count + picture_ids])
    edges = scipy.sparse.coo_array(
        (np.ones(2 * count, bool), (np.tile(documents, 2), nodes)), shape=(3 * count, 3 * count)
    )
    _, labels = scipy.sparse.csgraph.connected_components(edges, directed=False)
    _, sets = np.unique(labels[:count], return_inverse=True)
    return sets


def held_out(groups: Digests, pictures: Digests, share: float) -> Bool[np.ndarray, "n"]:
    """Returns a mask of the documents to hold out: about `share` of all sets.

    At least one set is held out if `share` of all sets is half a set or more. At least one set is
    not held out.

    Args:
      groups, pictures: see `connected_sets`.
      share: share of the sets, above 0 and below 1.
    """
    if not len(groups):
        return np.zeros(0, bool)
    sets = connected_sets(groups, pictures)
    # The smallest group digest identifies a set.
    order = np.lexsort((_as_elements(groups), sets))
    _, starts = np.unique(sets[order], return_index=True)
    positions = np.array([_position(groups[row].tobytes()) for row in order[starts]])
    chosen = positions < share
    if len(positions) * share >= 0.5 and not chosen.any():
        chosen[np.argmin(positions)] = True
    if chosen.all():
        chosen[np.argmax(positions)] = False
    return chosen[sets]


def _position(group: bytes) -> float:
    """Returns a number in [0, 1) that depends on a group's digest only."""
    digest = hashlib.blake2b(group, digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "little") / 2**64


def _as_elements(digests: Digests) -> np.ndarray:
    """Returns V16[n], with one element per digest, which NumPy can sort."""
    return np.ascontiguousarray(digests).view("V16").ravel()
