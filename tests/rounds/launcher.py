"""Whole runs over several processes, as torchrun starts them, in a fraction of its time.

A test file that starts itself as a script imports torch once and forks the ranks of each run.
Unlike torchrun, nobody ends the others when one fails: they must do that themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from srlm_fast import job  # noqa: F401  what a run imports late is there before the ranks fork
from srlm_fast.loop import main
from srlm_fast.rounds.manifest import Run

SECONDS = 60  # of one run; it hangs when they are over

Log = Callable[[dict[str, float]], None]


def start(world: int, name: str, words: Sequence[str], change: Callable[[int], None]) -> list[int]:
    """The exit codes of the ranks. What they print is in `<name>-<rank>.out` and `.err`; each calls
    `change(rank)` first."""
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if sys.platform != "linux":
        del environment["GLOO_SOCKET_IFNAME"]

    def run(rank: int) -> None:
        for stream, suffix in ((1, "out"), (2, "err")):
            file = os.open(f"{name}-{rank}.{suffix}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(file, stream)
        # A shell has what it starts in the background ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        change(rank)
        sys.exit(main(words))

    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(rank,)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
        process.kill()
    for process in ranks:
        process.join()
    return [int(process.exitcode or 0) for process in ranks]


def at_first_row(stage: str, act: Callable[[], None]) -> None:
    """From now on, `act` follows the first metrics of `stage`, which every rank is given."""
    plain = Run.logger

    def logger(run: Run, name: str) -> Log:
        log = plain(run, name)

        def log_and_act(row: dict[str, float]) -> None:
            log(row)
            if name == stage:
                act()

        return log_and_act

    Run.logger = logger  # type: ignore[method-assign]
