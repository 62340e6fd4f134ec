"""A small finished run folder, as the rounds write it."""

import json
import random
from dataclasses import asdict, replace

import pytest

from srlm_fast.config import Config
from srlm_fast.data.records import Judgement, Pair, Sample, Vote, user

CRITERIA = ("relevant", "substantial", "answers", "well formed", "exactly right")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def make_sample():
    """make_sample("text", prompt="...", ...): a finished sample whose ids are its characters."""

    def make(response, prompt="sort these words : nut fig", **changes):
        ids = tuple(map(ord, response))
        sample = Sample(
            prompt=user(prompt), prompt_ids=(1, 2), response=response, response_ids=ids,
            logprobs=(-0.5,) * len(ids), finish_reason="stop", index=0, seed=0, round=1,
        )  # fmt: skip
        return replace(sample, **changes)

    return make


def model_row(name, number, score):
    """One entry of summary.json's models, as evaluate_model and the rounds make it."""
    return {
        "name": name,
        "round": max(0, number - 1),
        "test_prompts": 200,
        "test_prompts_dropped": {},
        "oracle_score": score,
        "oracle_se": 0.04,
        "criteria": {c: min(1.0, score / 5 + 0.05 * i) for i, c in enumerate(CRITERIA)},
        "judge_score": None,
        "judge_se": None,
        "judged_by": "oracle",
        "greedy_oracle_score": score + 0.2,
        "win_rates": None,
        "judge": {
            "pairwise_accuracy": {"wrong": 0.73, "half": 0.81, "drop": 0.9, "right": 0.95},
            "exact_match": 0.4, "five_best": 0.6, "spearman": 0.65, "kendall_tau": 0.6,
            "parsed_share": 0.994, "invalid": {"no score line": 3},
        },
        "mean_length": 19.5 + number,
        "mean_length_chars": 80.0,
        "finished_share": 0.99,
        "distinct_share": 0.8,
        "preference_accuracy": None,
        "labels": {"accuracy": 0.9, "true_gap": 1.5} if number > 1 else None,
        "pairs": {"score_gap": 2.5 / number, "chosen_length": 21.0,
                  "rejected_length": 18.5} if number > 1 else None,
        "label_accuracy": 0.9 if number > 1 else None,
        "pairs_kept": 188 if number > 1 else None,
        "dropped": {"tie": 9, "duplicate": 311} if number > 1 else None,
        "eft": {"groups": 300, "groups_kept": 51, "rows": 140,
                "scores_judged": {"2": 20, "3.5": 1, "4": 300},
                "scores_before": {"2": 18, "4": 160}, "scores_after": {"2": 18, "4": 122},
                "groups_dropped": {"order disagrees": 69}} if number == 1 else None,
        "training": {"chosen_logp_change": 0.3, "rejected_logp_change": -0.7,
                     "displaced": 0.25, "dropped": {}},
    }  # fmt: skip


@pytest.fixture
def summary():
    """The summary of an srlm run on the sandbox with two rounds."""
    scores = {"SFT": 3.91, "M1": 4.0, "M2": 4.5, "M3": 4.77}
    models = [model_row(name, i, score) for i, (name, score) in enumerate(scores.items())]
    for number, model in enumerate(models):
        model["win_rates"] = {
            earlier["name"]: {
                "win": 0.54, "tie": 0.29, "lose": 0.17, "prompts": 200, "unscored": 0,
                "judged_by": "oracle",
            } for earlier in models[:number]
        } or None  # fmt: skip
    return {
        "method": "srlm",
        "task": "sandbox W4",
        "seed": 0,
        "config": asdict(Config()),
        "versions": {"python": "3.11", "torch": "2.13"},
        "stages": [
            {"name": "train/SFT", "seconds": 2.5, "rows": None, "tokens": None},
            {"name": "round-1/samples", "seconds": 4.0, "rows": 800, "tokens": 16000},
            {"name": "round-1/judgements", "seconds": 6.5, "rows": 489, "tokens": 130000},
            {"name": "train/M2", "seconds": 1.2, "rows": None, "tokens": 9000},
            {"name": "round-2/samples", "seconds": 4.1, "rows": 800, "tokens": 17000},
        ],
        "models": models,
        "notes": ["The oracle made the seed data; it judged nothing in a round."],
    }


@pytest.fixture
def run_dir(tmp_path, summary, make_sample):
    """A run folder with two rounds, of two prompts with three candidates each."""
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    rng = random.Random(0)
    rows = [
        {"stage": f"train/M{t}", "step": step, "loss": 0.69 - 0.01 * step,
         "rewards/margins": 0.01 * step * rng.random()}
        for t in (2, 3)
        for step in range(1, 14)
    ]  # fmt: skip
    write_rows(tmp_path / "metrics.jsonl", rows)
    for t in (1, 2):
        write_round(tmp_path / f"round-{t}", make_sample)
    for name in ("SFT", "M1", "M2", "M3"):
        rows = [make_sample(f"answer of {name}", index=i).to_json() for i in range(2)]
        write_rows(tmp_path / f"evaluation/{name}.jsonl", rows)
    return tmp_path


def write_round(folder, make_sample):
    """First prompt: a pair, and a third candidate that was cut off. Second prompt: a tie."""
    samples = [
        make_sample("sorted : fig nut . hope this helps !", "sort these words : nut fig"),
        make_sample("well , it is a nice day today !", "sort these words : nut fig"),
        make_sample("sorted : fig", "sort these words : nut fig", finish_reason="length"),
        make_sample("repeated : kiwi", "repeat these words : kiwi"),
        make_sample("swapped : kiwi", "repeat these words : kiwi"),
        make_sample("rotated : kiwi", "repeat these words : kiwi"),
    ]
    votes = (Vote("relevant yes exact yes Score: 5", 5.0), Vote("hm", None, "no score line"))
    judgements = [
        Judgement(5.0, votes, sample=0),
        Judgement(1.0, (Vote("Score: 1", 1.0),), sample=1),
        *[Judgement(2.0, (Vote("Score: 2", 2.0),), sample=i) for i in (3, 4)],
        Judgement(None, (Vote("?", None, "no score line"),), "no score line", sample=5),
    ]
    pair = Pair(
        samples[0].prompt, (1, 2), samples[0].response, samples[0].response_ids,
        samples[1].response, samples[1].response_ids, 5.0, 1.0, 1,
    )  # fmt: skip
    write_rows(folder / "samples.jsonl", [s.to_json() for s in samples])
    write_rows(folder / "judgements.jsonl", [j.to_json() for j in judgements])
    write_rows(folder / "pairs.jsonl", [pair.to_json()])
