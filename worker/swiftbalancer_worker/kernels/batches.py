"""Sources and batches of moves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit

SAME_RANK, SAME_NODE, REMOTE = 0, 1, 2


@jit
def choose_sources(
    moves: NDArray[np.int32], place: NDArray[np.int32], node: NDArray[np.int64], serves: NDArray[np.bool_]
) -> None:
    """Writes the source slot of each move (layer, expert, source, target) `[m, 4]`, moves of a layer together.

    The nearest holder in `place` `[layers, ranks, slots]` (same rank, same node, remote; ranks out of service
    last), among those the one that sends least so far in this layer, then overall.
    """
    _, ranks, slots = place.shape
    sent = np.zeros(ranks, np.int64)
    sent_in_layer = np.zeros(ranks, np.int64)
    for i in range(len(moves)):
        layer, expert, target = moves[i, 0], moves[i, 1], moves[i, 3] // slots
        if i == 0 or moves[i - 1, 0] != layer:
            sent_in_layer[:] = 0
        best = -1
        least = np.int64(0)
        for r in range(ranks):
            distance = 0 if r == target else (1 if node[r] == node[target] else 2)
            if not serves[r]:
                distance += 3
            price = (distance * 1024 + min(sent_in_layer[r], 1023)) * 1048576 + sent[r]
            if best >= 0 and price >= least:
                continue
            for s in range(slots):
                if place[layer, r, s] == expert:
                    best, least = r * slots + s, price
                    break
        moves[i, 2] = best
        if best // slots != target:
            sent[best // slots] += 1
            sent_in_layer[best // slots] += 1


@jit
def first_fit(
    receives: NDArray[np.int64], links: NDArray[np.int64], staging: int, per_link: int
) -> NDArray[np.int64]:
    """`[layers]` int64, the batch of each layer: the first where its transfers fit, in the order given.

    `receives` `[layers, ranks]`: experts each rank receives; at most `staging` per rank and batch. `links`
    `[layers, 2 * ranks]`: its sends and receives over shared links; at most `per_link` each per batch, but a
    layer that exceeds this by itself gets a batch of its own.
    """
    layers, ranks = receives.shape
    batch = np.zeros(layers, np.int64)
    received = np.zeros((layers, ranks), np.int64)
    linked = np.zeros((layers, links.shape[1]), np.int64)
    for i in range(layers):
        for b in range(layers):
            room = True
            for r in range(ranks):
                if received[b, r] + receives[i, r] > staging:
                    room = False
            for k in range(links.shape[1]):
                if linked[b, k] > 0 and linked[b, k] + links[i, k] > per_link:
                    room = False
                if links[i, k] > per_link and linked[b, k] > 0:
                    room = False
            if room:
                batch[i] = b
                received[b] += receives[i]
                linked[b] += links[i]
                break
    return batch
