"""The same command on files and an ordinary model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srlm_fast.loop import main
from srlm_fast.sandbox.world import ITEMS

SHARED = Path(__file__).parents[3] / "shared"
SMALL = [
    *("--sampling.max_new_tokens", "12", "--sampling.keep_truncated", "true", "--rounds", "1"),
    *("--prompts.source", "dataset", "--prompts.num_prompts", "6", "--evaluate.num_prompts", "4"),
    *("--preference.learning_rate", "1e-4", "--sft.learning_rate", "1e-4"),
]


@pytest.fixture
def model(run_loop: Any, tmp_path: Path) -> Path:
    """A model folder that another run made."""
    assert run_loop("spa", tmp_path / "made", rounds="1") == 0
    return tmp_path / "made" / "models" / "SFT"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_spa_on_preference_rows(model: Path, tmp_path: Path) -> None:
    prompts = [
        f"sort these words : fig {word}{more}" for word in ITEMS[:16] for more in ("", " jam")
    ]
    rows = [{"prompt": p, "chosen": p[19:], "rejected": p[19:] + " sugar"} for p in prompts]
    data = write(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / "run"
    flags = ["--data.preferences", data, "--data.num_gold", "8", "--data.num_test_pairs", "6"]
    flags += ["--preference.eval_steps", "1"]
    assert main(["--recipe", "spa", "--model", str(model), "--out", str(out), *flags, *SMALL]) == 0
    models = json.loads((out / "summary.json").read_text())["models"]
    assert [m["name"] for m in models] == ["SFT", "DPO", "SPA1"]
    assert models[0]["preference_accuracy"] == 0.5, "pi_init against itself: all ties"
    assert all(m["oracle_score"] is None and m["win_rates"] is None for m in models)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["stage"]: row["step"] for row in metrics if "eval_rewards/accuracies" in row}
    steps = {f"train/{m['name']}": m["training"]["steps"] for m in models if m["training"]}
    assert evaluated == steps == {"train/DPO": 3, "train/SPA1": 1}


def test_srlm_on_message_trees(model: Path, tmp_path: Path) -> None:
    def tree(i: int) -> dict[str, Any]:
        reply = {"role": "assistant", "lang": "en", "replies": []}
        texts = [f"fig {i % 5} tea", "tea", "fig"]
        replies = [{**reply, "text": t, "rank": r} for r, t in enumerate(texts)]
        prompt = {
            "role": "prompter",
            "lang": "en",
            "text": f"sort these words : {i}",
            "replies": replies,
        }
        return {"message_tree_id": str(i), "prompt": prompt}

    trees = write(tmp_path / "trees.jsonl", [tree(i) for i in range(20)])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"reverse these words : {i}\n" for i in range(30)))
    out = tmp_path / "run"
    flags = ["--data.trees", trees, "--data.prompts", str(prompts), "--judge.kind", "expected"]
    flags += ["--judge.prompt", "sandbox", "--eft.target", "rank"]
    assert main(["--recipe", "srlm", "--model", str(model), "--out", str(out), *flags, *SMALL]) == 0
    models = json.loads((out / "summary.json").read_text())["models"]
    assert [m["name"] for m in models] == ["SFT", "M1", "M2"]
    assert models[1]["eft"]["rows"] > 0
    assert models[-1]["judge"]["parsed_share"] is not None


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="needs ../shared, which is not there")
def test_tiny_english(tmp_path: Path) -> None:
    """A BPE tokenizer, a ChatML template and real conversations."""
    out = tmp_path / "run"
    flags = ["--model", str(SHARED / "models" / "tiny-english"), "--out", str(out), *SMALL]
    flags += ["--data.preferences", str(SHARED / "data" / "preferences.jsonl")]
    flags += [
        "--data.num_gold",
        "16",
        "--data.num_test_pairs",
        "8",
        "--preference.max_length",
        "256",
    ]
    assert main(["--recipe", "spa", *flags]) == 0
    assert (out / "report.html").is_file()
