"""python -m benchmarks: measure the ops, append one row per measurement, continue later.

Cases run safest first. A budgeted run starts nothing that it predicts not to finish, ends inside
the budget with exit status 0 and says what is left; the same command with --resume continues.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import rows, table
from benchmarks.budget import Budget, OutOfTime
from benchmarks.case import SUITES, Case, discover, load_cases
from benchmarks.comparison import Comparison, cache_state
from benchmarks.rows import Row


def main(arguments: list[str] | None = None, folder: Path = Path(__file__).parent) -> int:
    """`folder` holds the bench files. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parse(arguments)
    if args.table:
        table.main([str(args.json)] if args.json else [])
        return 0
    if args.suite == "gpu" and not torch.cuda.is_available():
        print("the gpu suite needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    found = discover(folder)
    if args.only is not None and args.only not in found:
        print(f"no benchmark {args.only!r}; there are: {', '.join(found)}", file=sys.stderr)
        return 2
    modules = found if args.only is None else {args.only: found[args.only]}
    smoke = args.suite == "smoke"
    with _empty_compile_caches(), torch.compiler.set_stance("force_eager" if smoke else "default"):
        run = Run(args, rows.circumstances(arguments, compiling=not smoke))
        return run.all(list(modules.values()))


class Run:
    """One call of the command line: its budget, the rows there are, and where new ones go."""

    def __init__(self, args: argparse.Namespace, circumstances: Row) -> None:
        self.args, self.circumstances = args, circumstances
        self.budget = Budget(args.budget)
        self.known = rows.read_rows(args.resume) if args.resume else []
        commit = circumstances["commit"]
        self.done = {rows.key(row) for row in self.known if rows.is_final(row, commit)}

    def all(self, modules: list[str]) -> int:
        """Every case of every module; returns the exit status."""
        work = [
            (name, case)
            for name in modules
            for case in load_cases(name, self.args.suite)
            if self.args.case in case.name
        ]
        try:
            with self.budget.alarm():
                for module, case in work:
                    self.compare(module, case)
                    if self.missing(case):
                        break
        except KeyboardInterrupt:
            print("interrupted; the rows so far are kept", file=sys.stderr)
            return 130
        except (OutOfTime, subprocess.TimeoutExpired):
            pass
        if left := [f"  {c.op} {c.name}: {name}" for _, c in work for name in self.missing(c)]:
            print("left for another run, --resume continues:", *left, sep="\n")
        return 0

    def compare(self, module: str, case: Case) -> None:
        """What is missing of one case, as far as the budget goes."""
        if wanted := self.missing(case):
            print(f"{case.op}, {case.name}", flush=True)
            Comparison(
                case, module, self.args.suite, wanted, self.budget, self.record,
                flush_l2=self.args.flush_l2, with_memory=self.args.suite != "smoke",
            ).run()  # fmt: skip

    def missing(self, case: Case) -> list[str]:
        """The variants of a case that have no row yet."""
        cache = cache_state(case, self.args.flush_l2)
        base = {**self.circumstances, "op": case.op, "params": case.params, "cache": cache}
        return [v for v in case.variants if rows.key({**base, "variant": v}) not in self.done]

    def record(self, measured: Row) -> None:
        """Appends a row to its file, unless it repeats a reason that stands there; prints it."""
        row = {**measured, **self.circumstances}
        path = self.args.json or self.args.resume
        if path is None and self.args.suite != "smoke":
            path = rows.RESULTS / f"{row['op']}.jsonl"
        said = {(rows.key(old), old["skipped"]) for old in self.known if old["skipped"]}
        if path is not None and (rows.key(row), row["skipped"]) not in said:
            rows.append_row(path, row)
        self.done.add(rows.key(row))
        print(table.one_line(row), flush=True)


@contextmanager
def _empty_compile_caches() -> Iterator[None]:
    """So that a first call shows what compiling costs; the child processes share these caches."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ[name] for name in names if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="benchmarks-", ignore_cleanup_errors=True) as folder:
        os.environ.update({name: str(Path(folder, name)) for name in names})
        try:
            yield
        finally:
            for name in names:
                del os.environ[name]
            os.environ.update(before)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--suite", choices=SUITES, default="smoke", help="smoke: tiny "
        "shapes, torch.compile off, no file, memory not measured")  # fmt: skip
    add("--only", metavar="OP", help="one op instead of all")
    add("--case", metavar="TEXT", default="", help="only cases with TEXT in their name")
    add("--budget", type=float, metavar="SECONDS", help="stop inside this time, from start-up on")
    add("--resume", type=Path, metavar="FILE", help="rows in FILE are not measured again; new ones "
        "go there too")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write rows here, not to results/<op>.jsonl")
    add("--threads", type=int, default=os.cpu_count(), help="of PyTorch; default: all cores")
    add("--flush-l2", action="store_true", help="GPU: overwrite the L2 cache before every call")
    add("--table", action="store_true", help="print the rows as Markdown and measure nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
