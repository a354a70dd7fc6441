"""Ranks as threads of one process, each with its own connection to one store: real gloo, quick to start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore

JOIN_S = 60.0


def run_ranks(size: int, body: Callable[[int, TCPStore], Any]) -> list[Any]:
    """`body(rank, store)` on `size` threads; gives the results by rank, or raises the first rank's error."""
    server = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def one(rank: int) -> None:
        try:
            store = TCPStore("127.0.0.1", server.port, None, is_master=False, timeout=timedelta(seconds=30))
            results[rank] = body(rank, store)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    for error in errors:
        if error is not None:
            raise error
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results
