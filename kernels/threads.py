"""Coarse-grained parallelism for the plain-torch CPU paths.

A blocked operator is thousands of small torch calls. Letting each of them fork and join torch's OpenMP threads costs a
barrier per call, and a barrier waits for the slowest core: on a busy machine the two-thread run was measured *slower*
than the single-threaded one. Here every thread works through whole pieces of the problem with single-threaded torch
calls (which release the GIL), and the only barrier is at the end, as in torch's own dense kernel.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}
_local = threading.local()


def width(device: torch.device, items: int) -> int:
    """Number of threads that will share ``items`` pieces of work on ``device``."""
    if device.type != "cpu" or getattr(_local, "worker", False):
        return 1
    return max(1, min(torch.get_num_threads(), items))


def for_each(items: Sequence[Item], make_worker: Callable[[], Callable[[Item], None]], device: torch.device) -> None:
    """Call a worker on every item, each exactly once.

    Args:
        items: independent pieces; they must write to disjoint memory, so that the result does not depend on the order.
        make_worker: called once per thread; returns the function to call on items (it may own buffers).
        device: pieces on an accelerator run in this thread.
    """
    n = width(device, len(items))
    if n == 1:
        work = make_worker()
        for item in items:
            work(item)
        return
    queue = iter(items)
    inference = torch.is_inference_mode_enabled()

    def drain() -> None:
        # Modes of torch are per thread: outputs made in inference mode may only be written in inference mode.
        with torch.inference_mode(inference), torch.no_grad():
            work = make_worker()
            while True:
                with _lock:
                    item = next(queue, None)
                if item is None:
                    return
                work(item)

    futures = [_pool(n).submit(drain) for _ in range(n)]
    for future in futures:
        future.result()


def _pool(n: int) -> ThreadPoolExecutor:
    """The pool of ``n`` threads, each of them limited to one torch thread."""
    with _lock:
        if n not in _pools:
            total = torch.get_num_threads()
            started = threading.Barrier(n + 1)

            def limit() -> None:
                # The first read settles this thread's lazy initialisation, which would undo an earlier setting.
                torch.get_num_threads()
                torch.set_num_threads(1)
                _local.worker = True
                started.wait()

            pool = ThreadPoolExecutor(n, thread_name_prefix="patchkit-kernels")
            for _ in range(n):
                pool.submit(limit)
            started.wait()
            # The setting is per thread, except for the default of threads yet to come: give that back.
            torch.set_num_threads(total)
            _pools[n] = pool
        return _pools[n]


def _after_fork() -> None:
    """Threads do not survive a fork; neither may a lock that one of them held."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
