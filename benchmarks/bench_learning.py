"""Does the sandbox's model really improve, and is the improvement its judge's own?

    python -m benchmarks.bench_learning --seeds 0 1 2 3 4            # run, append rows
    python -m benchmarks.bench_learning --table                       # rows as Markdown

Every seed is an independent pre-training. For each seed and method, the run is repeated with the
controls `random` and `longest` in the judge's place; everything else is equal. A row holds the true
(oracle) score of every model with its standard error over test prompts. Rows that are there already
are not run again, so a budgeted run can be continued.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.rows import append_row, commit, read_rows

RESULTS = Path(__file__).parent / "results" / "learning.jsonl"
OWN = {"srlm": "prompted", "spa": "implicit"}
START = {"srlm": "M1", "spa": "DPO"}  # what the last model must beat


def run(method: str, judge: str, seed: int, extra: list[str]) -> dict[str, Any]:
    """One whole loop in a process of its own, on one thread; returns its row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            "python", "-m", "srlm_fast.loop", "--recipe", f"sandbox-{method}", "--seed", str(seed),
            "--judge.kind", judge, *extra,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command[1:], "--out", str(out)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr[-2000:]}")
        summary = json.loads((out / "summary.json").read_text())
    keys = ("name", "oracle_score", "oracle_se", "criteria", "greedy_oracle_score", "mean_length")
    models = [
        {k: m.get(k) for k in (*keys, "pairs_kept", "label_accuracy", "flags")}
        | {"judge": {k: (m.get("judge") or {}).get(k) for k in ("pairwise_accuracy", "spearman")}}
        for m in summary["models"]
    ]
    return {
        "method": method, "judge": judge, "seed": seed, "models": models,
        "command": shlex.join(command), "versions": summary["versions"], "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "seconds": sum(s["seconds"] for s in summary["stages"]),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Mean true score over seeds (standard error over seeds), and how many seeds improved."""
    lines = []
    for method in OWN:
        some = [r for r in rows if r["method"] == method]
        if not some:
            continue
        names = [m["name"] for m in some[0]["models"]]
        lines += ["", f"| {method}, judge | seeds | " + " | ".join(names) + " | improved |"]
        lines += ["|---" * (len(names) + 3) + "|"]
        for judge in (OWN[method], "random", "longest"):
            group = [r for r in some if r["judge"] == judge]
            if group:
                lines.append(
                    f"| {judge} | {len(group)} | " + " | ".join(_cells(group, method)) + " |"
                )
    return "\n".join(lines[1:])


def _cells(group: list[dict[str, Any]], method: str) -> Iterator[str]:
    scores = [{m["name"]: m["oracle_score"] for m in r["models"]} for r in group]
    for name in scores[0]:
        values = [s[name] for s in scores]
        error = f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
        yield f"{mean(values):.2f}{error}"
    last = list(scores[0])[-1]
    yield f"{sum(s[last] > s[START[method]] for s in scores)} of {len(scores)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=list(OWN), default=list(OWN))
    parser.add_argument("--judges", nargs="+", default=["own", "random", "longest"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows and stop")
    args, extra = parser.parse_known_args()
    rows = read_rows(args.results)
    if args.table:
        print(table(rows))
        return
    done = {(r["method"], r["judge"], r["seed"]) for r in rows}
    wanted = [
        (method, OWN[method] if judge == "own" else judge, seed)
        for seed in args.seeds
        for method in args.methods
        for judge in args.judges
    ]

    def measure(key: tuple[str, str, int]) -> None:
        row = run(*key, extra)
        append_row(args.results, row)
        print(*key, *(f"{m['name']} {m['oracle_score']:.2f}" for m in row["models"]), flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(measure, [key for key in wanted if key not in done]))
    print(table(read_rows(args.results)))


if __name__ == "__main__":
    main()
