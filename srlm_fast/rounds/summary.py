"""What a finished run says of itself: `summary.json`, made from the manifest alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from srlm_fast.config import Config
from srlm_fast.data.task import Task
from srlm_fast.rounds.manifest import Run

ORACLE_NOTE = (
    "The oracle made the seed data and this evaluation; it judged and labelled nothing in a round."
)
REFERENCES = {"fixed": "fixed", "ema": "an average of the models so far"}


def model_names(config: Config) -> dict[str, int]:
    """The models of a run in the order they are made, and the round that makes each (0: none)."""
    rounds = range(1, config.rounds + 1)
    if config.method == "srlm":
        seed = ["SFT", "M1"] if config.eft.enabled else ["SFT"]
        return dict.fromkeys(seed, 0) | {f"M{t + 1}": t for t in rounds}
    seed = ["SFT"] if config.spa.no_seed else ["SFT", "DPO"]
    return dict.fromkeys(seed, 0) | {f"SPA{t}": t for t in rounds}


def summarise(run: Run, task: Task) -> dict[str, Any]:
    """The summary of a finished run; see docs/outputs.md for its fields."""
    config = run.config
    stages = run.manifest["stages"]
    return {
        "method": config.method,
        "task": task.name,
        "data_dropped": dict(task.dropped),
        "seed": config.seed,
        "config": dataclasses.asdict(config),
        "versions": run.manifest["versions"][-1],
        "stages": [
            {"name": name, "seconds": s["seconds"], "rows": s.get("rows"), "tokens": _tokens(s)}
            for name, s in stages.items()
        ],
        "models": [_model(run, name, t) for name, t in model_names(config).items()],
        "base_model": run.info("pretrain") or {"folder": config.model},
        "notes": _notes(run, task),
    }


def _notes(run: Run, task: Task) -> list[str]:
    """What a reader of the numbers must know and would not see in them."""
    notes = [ORACLE_NOTE] if task.oracle else []
    base = run.info("pretrain")
    if base.get("capped"):
        notes.append(
            f"The base model's pre-training was cut to {base['steps']} steps by its time limit, so "
            "these numbers depend on this machine's speed."
        )
    if base and base["exact"]["all"] < run.config.sandbox.min_exact:
        notes.append(
            f"The base model copies {base['exact']['all']:.2f} of the test prompts, below the gate "
            f"of {run.config.sandbox.min_exact:g}: expect weaker rounds."
        )
    if len(run.manifest["versions"]) > 1:
        notes.append(
            "The run was resumed with other library versions or another number of processes; "
            "manifest.json lists them."
        )
    if (reference := run.config.preference.reference) != "previous":
        notes.append(
            f"The reference is {REFERENCES[reference]}, so margins do not start at 0; that check"
            " is off."
        )
    if run.config.method == "srlm" and not run.config.eft.enabled:
        notes.append("There is no evaluation data (EFT), so the SFT baseline is M1.")
    for name in model_names(run.config):
        contests = run.info(f"train/{name}").get("checkpoints")
        if contests and not any(contest["prompts"] for contest in contests):
            notes.append(
                f"No comparison of {name}'s checkpoints gave a verdict, so it is the last of them; "
                "pairwise.kind: score is for models that cannot compare."
            )
    if task.dropped:
        lost = ", ".join(f"{reason} {n}" for reason, n in task.dropped.items())
        notes.append(f"Dropped while reading the data: {lost}.")
    return notes


def _model(run: Run, name: str, round: int) -> dict[str, Any]:
    """One model: how it does, and what it was trained on: its round's pairs or positive examples;
    in round 0 the seed."""
    stages = run.manifest["stages"]
    positives = run.config.srlm.training == "positives"
    made = f"round-{round}/{'positives' if positives else 'pairs'}" if round else ""
    made = "seed/pairs" if name == "DPO" else made
    rows = stages[made]["rows"] if made else None
    training = {k: v for k, v in run.info(f"train/{name}").items() if k != "flags"}
    return {
        **run.info(f"evaluation/{name}"),
        "training": training or None,
        "pairs_kept": None if positives else rows,
        "positives_kept": rows if positives else None,
        "gold_replayed": stages.get(f"round-{round}/replay", {}).get("rows"),
        "dropped": run.info(made).get("dropped") if made else None,
        "consistency": run.info(made).get("consistency") if made else None,
        "prompts_dropped": run.info(f"round-{round}/prompts").get("dropped"),
        "eft": run.info("seed/eft") or None if name == "M1" else None,
        "round_parsed_share": run.info(f"round-{round}/judgements").get("parsed_share"),
    }


def _tokens(stage: dict[str, Any]) -> int | None:
    info = stage["info"]
    found: int | None = info.get("tokens", info.get("num_tokens"))
    return found
