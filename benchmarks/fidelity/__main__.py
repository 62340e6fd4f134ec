"""python -m benchmarks.fidelity: do the methods do on the sandbox what their papers report?

Runs every variant on every seed (each an independent pre-training), appends one row a run, and
writes the report after each. Runs that have a row are passed over, so the same command continues
a study that was stopped anywhere. Runs are of the code as it is when they start: leave a checkout
alone while one is under way. Further settings (`--evaluate.num_prompts 50`) go to every run,
and its rows count only where the report is made with the same ones.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from benchmarks.budget import Budget
from benchmarks.fidelity.page import render
from benchmarks.fidelity.study import is_done, run
from benchmarks.fidelity.variants import VARIANTS, Variant
from benchmarks.rows import RESULTS, ROOT, append_row, read_rows
from srlm_fast.data.jsonl import write_text

Key = tuple[Variant, int]  # and a seed


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if a run failed (the next call tries it again), 130 if stopped."""
    args, extra = _parse(sys.argv[1:] if arguments is None else arguments)
    study = Study(args, extra)
    if not args.render:
        # Being told to stop is like Ctrl-C: what is under way ends, or is run again next time.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        pool = ThreadPoolExecutor(args.jobs)
        try:
            list(pool.map(study.measure, study.wanted()))
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
        finally:
            pool.shutdown(cancel_futures=True)
    study.write_page()
    for what, names in (
        ("failed", study.failed),
        ("left for the same command again", study.left),
    ):
        if names:
            print(f"{what}: {', '.join(names)}")
    return bool(study.failed)


class Study:
    """One call of the command line: what it wants, and where the rows and the report go."""

    def __init__(self, args: argparse.Namespace, extra: Mapping[str, str]) -> None:
        self.args, self.extra = args, extra
        self.budget, self.lock = Budget(args.budget), Lock()
        self.of_seed = {seed: Lock() for seed in args.seeds}
        self.failed: list[str] = []
        self.left: list[str] = []

    def wanted(self) -> list[Key]:
        """The runs without a row, seed after seed."""
        rows, only = read_rows(self.args.results), self.args.only
        return [
            (variant, seed)
            for variant in VARIANTS
            for seed in self.args.seeds
            if not (only and variant.key not in only)
            and not is_done(rows, variant, seed, self.extra)
        ]

    def measure(self, key: Key) -> None:
        """One run, to its row and the report."""
        variant, seed = key
        name = f"{variant.key} seed {seed}"
        if not self.budget.left():
            self.left.append(name)
            return
        try:
            with self.of_seed[seed]:  # or two would make the same base model
                row = run(variant, seed, self.extra)
        except RuntimeError as error:
            self.failed.append(name)
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
            return
        with self.lock:
            append_row(self.args.results, row)
            self.write_page()
        scores = " ".join(f"{m['name']} {m['oracle_score']:.2f}" for m in row["models"])
        print(f"{name}: {scores} ({row['seconds']:.0f} s)", flush=True)

    def write_page(self) -> None:
        """The report of all rows there are."""
        write_text(self.args.page, render(read_rows(self.args.results), self.extra))


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    add, keys = parser.add_argument, [v.key for v in VARIANTS]
    names = ", ".join(keys).replace("%", "%%")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--only", nargs="+", choices=keys, metavar="VARIANT", help=names)
    add("--jobs", type=int, default=2, help="runs at once, of one thread each")
    add("--budget", type=float, metavar="SECONDS", help="start no run later than this")
    add("--results", type=Path, default=RESULTS / "fidelity.jsonl", help="where the rows are")
    add("--page", type=Path, default=ROOT / "docs" / "fidelity.md", help="where the report goes")
    add("--render", action="store_true", help="write the report of the rows and run nothing")
    args, words = parser.parse_known_args(arguments)
    if len(words) % 2 or not all(name.startswith("--") for name in words[::2]):
        parser.error(f"settings are given as --key value, not {' '.join(words)}")
    return args, {name[2:]: v for name, v in zip(words[::2], words[1::2], strict=True)}


if __name__ == "__main__":
    sys.exit(main())
