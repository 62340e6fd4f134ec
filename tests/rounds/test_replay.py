"""Gold replay: a share of each round's training pairs, drawn once and counted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srlm_fast.config import Config, PairsConfig
from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Pair, user
from srlm_fast.errors import UserError
from srlm_fast.rounds.manifest import Run
from srlm_fast.rounds.replay import replayed


def pairs(*prompts: int, round: int = 0) -> list[Pair]:
    return [Pair(user(f"{p}"), (p,), "", (1,), "", (2,), None, None, round) for p in prompts]


def engine(folder: Path, gamma: float, seed: int = 0) -> Any:
    config = Config(method="spa", seed=seed, pairs=PairsConfig(gold_replay=gamma))
    return SimpleNamespace(config=config, run=Run(folder, config, {}))


@pytest.mark.parametrize(
    ("gamma", "gold", "drawn"), [(0.5, 30, 20), (0.2, 30, 5), (0.75, 200, 60), (0.1, 30, 2)]
)
def test_gold_is_the_share_that_was_asked_for(
    gamma: float, gold: int, drawn: int, tmp_path: Path
) -> None:
    own, seed = pairs(*range(100, 120), round=1), pairs(*range(gold))
    found = replayed(engine(tmp_path, gamma), seed, own, 1)
    assert len(found) == drawn == round(gamma * (len(found) + 20))
    assert len({pair.prompt_ids for pair in found}) == drawn, "without replacement"
    assert all(pair in seed for pair in found)


def test_prompts_of_the_round_are_left_out_and_what_is_missing_is_counted(tmp_path: Path) -> None:
    run = engine(tmp_path, 0.5)
    found = replayed(run, pairs(1, 2, 3), pairs(1, 3, 7, round=2), 2)
    assert found == pairs(2)
    assert run.run.info("round-2/replay") == {"missing": 2}


def test_the_draw_is_that_of_the_seed_and_the_round(tmp_path: Path) -> None:
    own, gold = pairs(*range(100, 110), round=1), pairs(*range(40))
    runs = [engine(tmp_path / str(i), 0.5, seed) for i, seed in enumerate((0, 0, 1))]
    found = [[replayed(run, gold, own, t) for t in (1, 2)] for run in runs]
    assert found[0] == found[1] != found[2] and found[0][0] != found[0][1]


def test_a_run_trains_on_both(run_loop: Any, tmp_path: Path) -> None:
    """And says of its own labels, and of the flags on them, what it said before."""
    out = tmp_path / "run"
    assert run_loop("spa", out, pairs__gold_replay="0.25") == 0
    gold = read_jsonl(out / "seed" / "pairs.jsonl", Pair)
    models = json.loads((out / "summary.json").read_text())["models"]
    for t in (1, 2):
        own, replay = (
            read_jsonl(out / f"round-{t}" / f"{name}.jsonl", Pair) for name in ("pairs", "replay")
        )
        assert len(replay) == min(round(len(own) / 3), len(gold)) >= 1
        assert all(pair in gold for pair in replay)
        model = models[t + 1]
        assert model["pairs_kept"] == len(own) and model["gold_replayed"] == len(replay)
        assert model["training"]["pairs"] == len(own) + len(replay)
    manifest = json.loads((out / "manifest.json").read_text())["stages"]
    flags = [manifest[f"train/SPA{t}"]["info"]["flags"] for t in (1, 2)]
    assert [len(f) for f in flags] == [m["training"]["pairs"] for m in models[2:]]


def test_senseless_settings_are_refused() -> None:
    for gamma in (-0.1, 1.0):
        with pytest.raises(UserError, match="gold_replay must be at least 0 and below 1"):
            PairsConfig(gold_replay=gamma)
    with pytest.raises(UserError, match="only method spa has"):
        Config(method="srlm", pairs=PairsConfig(gold_replay=0.5))
