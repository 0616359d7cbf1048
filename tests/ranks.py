"""Functions run by two processes that know each other."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
PATIENCE = 300  # seconds; they take a few

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


def on_two(worker: Callable[..., None], *arguments: Any) -> None:
    """Calls ``worker(rank, port, *arguments)`` in two processes; what one of them raises is raised.

    They are forked from a server that has imported everything, but has run nothing: imports take longer than most
    workers. Forked processes also leave without Python's own end, at which a thread of gloo that still holds a tensor
    aborts the process; DTensor's caches keep such threads beyond destroy_process_group (torch 2.14).
    """
    multiprocessing.set_forkserver_preload([worker.__module__, "granvit.train.trainer"])
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = int(s.getsockname()[1])
    context = mp.start_processes(worker, args=(port, *arguments), nprocs=WORLD, join=False, start_method="forkserver")
    deadline = time.monotonic() + PATIENCE
    while not context.join(timeout=5):
        if time.monotonic() > deadline:  # ranks that wait for each other would wait for ever
            for process in context.processes:
                process.kill()
            pytest.fail(f"two processes were not done after {PATIENCE} seconds")
