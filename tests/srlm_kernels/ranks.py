"""Checks that ranks of a process group make together, each rank a process, on gloo.

A test file lists its checks, functions that every rank calls, and runs them by starting itself as a
script. That script imports torch once and forks the ranks.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import srlm_kernels

Checks = dict[int, list[Callable[[], None]]]  # by the size of the group
SECONDS = 120  # for all checks of a file together; one of them hangs when it is over


def start(script: str, folder: Path) -> dict[int, list[str]]:
    """What the ranks of `script` wrote: per size of the group, per rank."""
    here, package = Path(__file__).parents[2], Path(srlm_kernels.__file__).parents[1]
    path = [str(here), str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # no look-up of the machine's own name
    # -P: the script's folder is no place to import from.
    command = [sys.executable, "-P", script, str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=2 * SECONDS)
    found: dict[int, list[str]] = {}
    for file in sorted(folder.glob("*-*.txt")):
        found.setdefault(int(file.stem.split("-")[0]), []).append(file.read_text())
    return found


def assert_passed(check: Callable[[], None], outputs: Collection[str]) -> None:
    for rank, output in enumerate(outputs):
        name = check.__name__
        assert f"passed {name}\n" in output, f"rank {rank} of {len(outputs)}:\n{output}"


def each(checks: Checks) -> pytest.MarkDecorator:
    """A test for every `world` and `check`."""
    return pytest.mark.parametrize(
        ("world", "check"),
        [(world, check) for world, todo in checks.items() for check in todo],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )


def main(checks: Checks) -> None:
    """The script: forks as many ranks as the keys say, one size after the other."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    deadline = time.monotonic() + SECONDS
    for size, todo in checks.items():
        ranks = [
            multiprocessing.get_context("fork").Process(
                target=_run, args=(folder, rank, size, todo)
            )
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(max(deadline - time.monotonic(), 0))
            process.kill()


def _run(folder: Path, rank: int, size: int, checks: list[Callable[[], None]]) -> None:
    out = os.open(folder / f"{size}-{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'store-of-{size}'}",  # a file: no port to be taken
        world_size=size,
        rank=rank,
        timeout=timedelta(seconds=SECONDS / 3),
    )
    for check in checks:
        check()
        dist.barrier()
        print("passed", check.__name__, flush=True)
    dist.destroy_process_group()
