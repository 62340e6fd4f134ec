"""The command line: `python -m srlm_fast.loop [--recipe R] [--model M] [--out DIR] ...`."""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from srlm_fast.config import Config
from srlm_fast.errors import UserError
from srlm_fast.parallel import ALONE, Ranks, start
from srlm_fast.recipes import load_config, recipe_names, to_yaml

RUNS = Path("runs")
_INSTEAD = {
    "weights": "parameters are counted from its config.json",
    "tokenizer files": "a run needs them",
}


@dataclass
class _Attempt:
    """How far it came."""

    ranks: Ranks = ALONE
    folder: Path | None = None  # of the run, once it has started


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe. Exit code 0, 2 for a mistake before the run starts, 1 inside it, 130 Ctrl-C.

    Each of several processes calls it, as `torchrun -m srlm_fast.loop` does; one of them speaks.
    """
    words, attempt = sys.argv[1:] if argv is None else list(argv), _Attempt()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack the table's signs
            stream.reconfigure(errors="replace")
    try:
        attempt.ranks = start()
        with _one_voice(attempt.ranks):
            _run(words, attempt)
        attempt.ranks.close()
    except (Exception, KeyboardInterrupt) as error:
        return _explain(error, attempt, debug="--debug" in words)
    return 0


def _run(words: list[str], attempt: _Attempt) -> None:
    ranks = attempt.ranks
    args, overrides = _parse(words)
    # What is found on the disk, and the time in a folder's name, differ from process to process.
    folder, config = ranks.from_main(_open(args, overrides) if ranks.main else (Path(), Config()))
    if args.print_config:
        print(to_yaml(config), end="")
        return
    # Heavy imports come late, so that a wrong word on the command line answers at once.
    from srlm_fast.installed import versions
    from srlm_fast.job import execute, inputs, prepare
    from srlm_fast.rounds.manifest import Run

    if args.dry_run:
        _plan(config, args.memory, ranks)
        return
    job = prepare(config, ranks)
    made_with = {**versions(), "processes": str(ranks.world)}
    found = inputs(job) if ranks.main else {}
    with closing(Run(folder, config, made_with, found, ranks)) as run:
        attempt.folder = folder
        print(execute(job, run))
    print(f"report: {folder / 'report.html'}")


def _plan(config: Config, gigabytes: float | None, ranks: Ranks) -> None:
    """Prints the plan of a run, then raises UserError where it could not begin for want of memory:
    of a device with so many `gigabytes`, or of this one, unless the model's weights are not here
    anyway."""
    from srlm_fast.job import prepare
    from srlm_fast.rounds.machine import planned_machine
    from srlm_fast.rounds.plan import plan

    job = prepare(config, ranks, planned_machine(config.device, gigabytes, ranks))
    print(plan(job.config, job.task, job.memory))
    for what, instead in _INSTEAD.items():
        if what in job.missing:
            print(f"  there are no {what} in {job.folder}: {instead}")
    if gigabytes or "weights" not in job.missing:
        job.memory.check()


@contextmanager
def _one_voice(ranks: Ranks) -> Iterator[None]:
    """Inside, only the main rank prints, warns and logs: the others would say the same."""
    if ranks.main:
        yield
        return
    with redirect_stdout(None), warnings.catch_warnings(action="ignore"):
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _explain(error: BaseException, attempt: _Attempt, *, debug: bool) -> int:
    """Says in one line, once for all processes, why it ends; the exit code."""
    code = 1 if attempt.folder else 2
    hint = f"; go on with --resume --out {attempt.folder}" if attempt.folder else ""
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        if attempt.ranks.world > 1:  # Ctrl-C comes from the terminal, and once more from torchrun
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        text, code, debug = f"stopped{hint}", 130, False
    elif attempt.ranks.world > 1 and "gloo" in str(error):
        # If it had said why, this would not be said.
        text = f"another process ended without a word: was it killed, or out of memory?{hint}"
    else:
        # A defect of ours or of the machine (out of memory): one line all the same.
        what = (str(error).strip() or "no message").splitlines()[0]
        text = f"{type(error).__name__}: {what} (--debug shows where)"
    with attempt.ranks.speaker() as first:
        if first and debug:
            traceback.print_exception(error)
        if first:
            line = "\n" if code == 130 else ""  # behind the terminal's ^C
            print(f"{line}srlm_fast: {text}", file=sys.stderr, flush=True)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def _gigabytes(text: str) -> float:
    size = float(text)
    if not 0 < size < math.inf:
        raise ValueError
    return size


def _parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = _Parser(
        prog="python -m srlm_fast.loop",
        description="Self-improving preference training of a causal LM: SRLM or SPA.",
        epilog="Any setting can be given as --dotted.key value; --print-config shows them all.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", default="", help=f"{', '.join(recipe_names())}, or a YAML file")
    parser.add_argument("--model", help="HF folder or hub id (sandbox recipes: their own)")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<recipe>-<time>)")
    parser.add_argument("--resume", action="store_true", help="go on with --out, or the latest run")
    parser.add_argument("--print-config", action="store_true", help="print the settings and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--memory", type=_gigabytes, help="plan for a device of so many GB")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, rest = parser.parse_known_args(argv)
    if args.memory and not args.dry_run:
        parser.error("--memory is for --dry-run: a run takes the memory that it finds")
    overrides: dict[str, str] = {} if args.model is None else {"model": args.model}
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--"):
            parser.error(f"{key!r} is not an option; settings are given as --key value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                parser.error(f"{key} needs a value")
            value = rest.pop(0)
        overrides[key[2:]] = value
    return args, overrides


def _open(args: argparse.Namespace, overrides: dict[str, str]) -> tuple[Path, Config]:
    """The run folder and its configuration, new or stored."""
    if args.resume:
        folder = args.out or _latest()
        stored = folder / "config.yaml"
        if not stored.is_file():
            raise UserError(f"{folder} holds no run to resume; check --out, or drop --resume")
        config = load_config(str(stored))
        given = load_config(args.recipe or str(stored), overrides).with_absolute_paths()
        if (args.recipe or overrides) and given != config:
            raise UserError(
                f"these settings differ from those of {folder}; drop them, or drop --resume"
            )
        return folder, config
    recipe = args.recipe or "sandbox-srlm"
    config = load_config(recipe, overrides).with_absolute_paths()
    if not config.model and not args.print_config:
        raise UserError(f"recipe {recipe} needs --model: a HuggingFace model folder or hub id")
    name = f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = args.out or RUNS / name
    try:
        taken = folder.exists() and (
            not folder.is_dir() or any(p.name != ".lock" for p in folder.iterdir())
        )
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; choose another folder") from error
    if taken:
        raise UserError(
            f"{folder} already exists; add --resume to go on with it, or choose another --out"
        )
    return folder, config


def _latest() -> Path:
    runs = list(RUNS.glob("*/config.yaml")) if RUNS.is_dir() else []
    if not runs:
        raise UserError(f"there is no run in {RUNS}/ to resume; give --out")
    return max(runs, key=os.path.getmtime).parent


if __name__ == "__main__":
    sys.exit(main())
