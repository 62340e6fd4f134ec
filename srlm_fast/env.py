"""What is installed, what this machine can do, and which implementation each op takes here.

`python -m srlm_fast.env` prints it; with `--model MODEL` also what a run would need in memory.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

import srlm_kernels
from srlm_fast.errors import UserError
from srlm_fast.installed import OPS, OPTIONAL, SAMPLER_OPS, probe, sampler_backend, versions
from srlm_fast.recipes import load_config
from srlm_kernels import native


def collect() -> dict[str, Any]:
    """Everything `python -m srlm_fast.env` prints, as one JSON object.

    Keys: `versions`, `device` (one line per fact), `optional` (extra -> version, or why it is not
    usable; each installed one is imported), `extensions` (the C++ ops: their file, or why they are
    not in use) and `ops` (op -> implementation that `auto` takes).
    """
    return {
        "versions": versions(),
        "device": _device(),
        "optional": {extra: probe(extra, *names) for extra, names in OPTIONAL.items()},
        "extensions": {"C++ kernels": native.why()},
        "ops": _ops(),
    }


def _device() -> dict[str, str]:
    cpu = torch.cpu.get_capabilities()
    fast = [name for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16") if cpu.get(name)]
    facts = {
        "cpu": f"{cpu.get('cpu_name') or platform.machine()}, {torch.get_num_threads()} threads",
        "cpu bf16": ", ".join(fast) or "no instructions for it: slower than float32",
    }
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch sees no device or no driver" if built else "this torch is a CPU build"
        return facts | {"gpu": f"none: {why}"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        facts[f"gpu {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}"
    return facts


def _ops() -> dict[str, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, query = torch.zeros(4, 8, device=device), torch.zeros(4, 1, 64, device=device)
    found = {}
    for op in OPS:
        given = {"query": query} if op == "prefix_attention" else {"hidden": hidden}
        found[op] = srlm_kernels.explain(op, **given).removeprefix(f"{op}: ")
    return found | {SAMPLER_OPS: sampler_backend()}


def memory(model: str, recipe: str, gigabytes: float | None = None) -> list[str]:
    """What each phase of `recipe` with `model` (HF folder or hub id, weights or not) needs, in
    lines: on this machine, or on a GPU of so many `gigabytes`. Raises UserError as a run would."""
    from srlm_fast.model.load import check_folder
    from srlm_fast.rounds.machine import planned_machine
    from srlm_fast.rounds.memory import RunMemory

    config = load_config(recipe, {"model": model})
    machine = planned_machine("auto" if gigabytes is None else "cuda", gigabytes)
    found = RunMemory.of(config, check_folder(model, weights=False), machine)
    try:
        found.check()
    except UserError as refusal:
        return [*found.lines(), f"too much: {refusal}"]
    return found.lines()


def main(argv: Sequence[str] | None = None) -> int:
    """Print `collect()` as short tables, and `memory` if that is asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m srlm_fast.env", description=__doc__)
    parser.add_argument("--model", help="say what this HF folder or hub id needs in memory, too")
    parser.add_argument("--recipe", default="srlm", help="in a run of that recipe (default: srlm)")
    parser.add_argument("--memory", type=float, help="on a GPU of so many GB, not on this machine")
    args = parser.parse_args(argv)
    for title, rows in collect().items():
        print(title)
        width = max(map(len, rows))
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}")
    if args.model:
        try:
            lines = memory(args.model, args.recipe, args.memory)
        except UserError as error:
            print(f"srlm_fast: {error}", file=sys.stderr)
            return 2
        print(f"memory of {args.model}, recipe {args.recipe}", *lines, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
