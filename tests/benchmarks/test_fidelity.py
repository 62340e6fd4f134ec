"""The fidelity report: its claims, its page, and a study that can be continued."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fidelity import __main__ as command
from benchmarks.fidelity import paper, study
from benchmarks.fidelity.claims import T_975, Claim, Finding, claims, findings
from benchmarks.fidelity.page import render
from benchmarks.fidelity.variants import VARIANTS, Variant
from benchmarks.rows import Row, read_rows
from srlm_fast.recipes import load_config

CHAINS = {chain.path: dict(chain.values) for chain in paper.CHAINS}
SCORES = {
    "spa/expansion": 14.41, "spa/refinement": 14.70, "spa": 15.39, "spa/previous": 13.73,
    "spa/none": 12.83, "spa/words": 9.28, "spa/0.8%": 14.0, "spa/1.7%": 14.5, "spa/10%": 16.0,
    "spa/no-seed": 11.59,
}  # fmt: skip


def srlm_entry(name: str) -> dict[str, Any]:
    """What the paper says of a model of SRLM, as a run would say it."""
    entry: dict[str, Any] = {"name": name, "greedy_oracle_score": None, "win_rates": {}}
    entry |= {"pairs_kept": paper.PAIRS.get(name), "judge": {"pairwise_accuracy": {}}}
    for path, values in CHAINS.items():
        *parents, last = path.split(".")
        place = entry
        for parent in parents:
            place = place[parent]
        place[last] = values.get(name)
    for (model, opponent), (win, tie, lose) in paper.DUELS.items():
        if model == name:
            shares = {"win": win / 100, "lose": lose / 100, "tie": tie / 100}
            entry["win_rates"][opponent] = shares
    return entry


def spa_entry(name: str, score: float) -> dict[str, Any]:
    labels = {"better": 0.6, "worse": 0.2, "equal": 0.2} if name.startswith("SPA") else None
    return {"name": name, "oracle_score": score, "labels": labels, "pairs_kept": 100,
            "mean_length": 20.0, "greedy_oracle_score": score + 1}  # fmt: skip


def paper_row(variant: Variant, seed: int, noise: float = 0.0) -> Row:
    """A run whose models are exactly as good as the paper's, give or take `noise`."""
    if variant.method == "srlm":
        models = [srlm_entry(name) for name in ("SFT", "M1", "M2", "M3")]
        if variant.key == "srlm/no-eft":
            for model in models:
                model["pairs_kept"] = paper.PAIRS_WITHOUT_EFT.get(model["name"])
        if variant.key == "srlm/positives":
            models = [m | {"oracle_score": 9.0} for m in models]
    else:
        start = 10.14 if variant.key == "spa/no-seed" else 7.58
        models = [spa_entry("SFT", start), spa_entry("DPO", 9.03)]
        if variant.key == "spa/no-seed":
            models.pop()
        last = SCORES.get(variant.key, 8.0)
        models += [spa_entry("SPA1", last - 1), spa_entry("SPA2", last + noise)]
    return {
        "variant": variant.key, "seed": seed, "settings": variant.settings({}), "models": models,
        "seconds": 30.0, "pretrain_seconds": 0.1, "versions": {"torch": "2"}, "commit": "abc",
        "date": "2026-01-01", "command": "python",
    }  # fmt: skip


@pytest.fixture
def rows() -> list[Row]:
    """Every variant on three seeds."""
    return [paper_row(v, seed, 1e-3 * seed) for v in VARIANTS for seed in range(3)]


def by_seed(rows: list[Row]) -> list[dict[str, Row]]:
    return [{r["variant"]: r for r in rows if r["seed"] == s} for s in range(3)]


def test_the_papers_own_numbers_have_every_ordering_of_the_papers(rows: list[Row]) -> None:
    found = findings(by_seed(rows))
    assert len(found) == len(list(claims())) > 30
    assert {f.claim.text: f.verdict for f in found if f.verdict != "as reported"} == {}
    assert all(len(f.differences) == 3 for f in found)


def test_swapped_models_reverse_their_orderings(rows: list[Row]) -> None:
    for row in rows:
        row["models"].reverse()
        names = [m["name"] for m in reversed(row["models"])]
        for model, name in zip(row["models"], names, strict=True):
            model["name"] = name
    verdicts = {f.claim.text: f.verdict for f in findings(by_seed(rows))}
    assert verdicts["oracle score: M2 above M1"] == "reversed"
    assert verdicts["Spearman: M1 above SFT"] == "reversed"
    assert verdicts["SPA is better than DPO on the seed"] == "reversed"


def test_what_was_not_run_is_not_claimed(rows: list[Row]) -> None:
    rows = [row for row in rows if row["variant"] != "spa/none" and row["seed"] < 2]
    verdicts = {f.claim.text: f.verdict for f in findings(by_seed(rows))}
    assert verdicts["the previous model is a better judging reference than none"] == "not run"
    assert verdicts["SPA is better than DPO on the seed"] == "as reported"
    one = [row for row in rows if row["seed"] == 0]
    assert {f.verdict for f in findings(by_seed(one))} == {"not run"}


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.3, 0.1, 0.2, 0.25, 0.15], "as reported"),
        ([-0.3, -0.1, -0.2, -0.25, -0.15], "reversed"),
        ([0.3, -0.1, 0.2, -0.25, 0.15], "undecided"),
        ([0.0] * 5, "undecided"),
        ([0.1], "not run"),
        ([], "not run"),
    ],
)
def test_a_verdict_is_a_t_interval(differences: list[float], verdict: str) -> None:
    claim = Claim("SPA", "", "", lambda seed: None)
    assert Finding(claim, differences).verdict == verdict
    if len(differences) == 5:  # the same interval, by its textbook formula
        half = 2.776 * statistics.stdev(differences) / math.sqrt(5)
        inside = abs(statistics.fmean(differences)) <= half
        assert inside == (verdict == "undecided")


@pytest.mark.parametrize(("freedom", "quantile"), list(enumerate(T_975, 1)))
def test_quantiles_of_t(freedom: int, quantile: float) -> None:
    """The density between -quantile and quantile holds 95 %, by Simpson's rule."""
    norm = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    n = 4000
    step = 2 * quantile / n
    weights = [1, *([4, 2] * (n // 2))[: n - 1], 1]
    total = sum(
        w * (1 + (-quantile + i * step) ** 2 / freedom) ** (-(freedom + 1) / 2)
        for i, w in enumerate(weights)
    )
    assert norm * total * step / 3 == pytest.approx(0.95, abs=5e-5)


def test_the_page_says_where_the_sandbox_agrees(rows: list[Row]) -> None:
    text = render(rows, {})
    total = len(list(claims()))
    assert f"Of the {total} orderings" in text and f", {total} hold here" in text.replace("\n", " ")
    assert "It disagrees" not in text and "It does not decide" not in text
    line = next(x for x in text.splitlines() if x.startswith("| + decoupled detection (SPA) |"))
    assert line.split(" | ")[1:7] == [
        "3", "15.39 ± 0.00", "16.39 ± 0.00", "+6.36 ± 0.00", "0.75 ± 0.00", "20.0 ± 0.0",
    ]  # fmt: skip
    assert "| *paper* | - | - | 3964 | 6942 |" in text
    assert "abc" in text and "torch 2" in text


def test_the_page_says_where_extrapolation_changed_no_flag(rows: list[Row]) -> None:
    assert "With extrapolated logits" not in render(rows, {})
    for row in rows:
        if row["variant"] in ("spa", "spa/refinement"):
            wrong = row["variant"] == "spa" and row["seed"] == 1
            row["models"][-1]["flags"] = {"flagged": 8.0, "precision": 0.25 if wrong else 0.5}
    assert "With extrapolated logits" in render(rows, {})
    assert "with the policy's own on 2 of 3 seeds" in render(rows, {})


def test_every_table_of_the_page_is_whole(rows: list[Row]) -> None:
    for block in render(rows, {}).split("\n\n"):
        if block.startswith("|"):
            assert len({line.count(" | ") for line in block.splitlines()}) == 1


def test_rows_of_other_settings_are_passed_over(rows: list[Row]) -> None:
    stale = [row | {"settings": row["settings"] | {"rounds": "3"}} for row in rows]
    assert "Nothing has been run" in render(stale, {})
    assert "Nothing has been run" not in render(stale, {"rounds": "3"})
    repeated = study.of_variant([*rows, rows[0] | {"commit": "later"}], VARIANTS[0], {})
    assert [row["commit"] for row in repeated] == ["later", "abc", "abc"]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.key)
def test_every_variant_is_a_configuration(variant: Variant) -> None:
    config = load_config(f"sandbox-{variant.method}", variant.settings({}))
    assert config.method == variant.method and config.evaluate.num_prompts == 200


Runs = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Runs, list[tuple[str, int]]]:
    """The command line with runs that take no time; and those that were asked for."""
    asked: list[tuple[str, int]] = []

    def fake(variant: Variant, seed: int, extra: dict[str, str]) -> Row:
        asked.append((variant.key, seed))
        if (variant.key, seed) == ("spa/none", 1):
            raise RuntimeError("unknown setting judge.reference")
        return paper_row(variant, seed) | {"settings": variant.settings(extra)}

    monkeypatch.setattr(command, "run", fake)

    def main(*words: str) -> int:
        files = ["--results", str(tmp_path / "rows.jsonl"), "--page", str(tmp_path / "page.md")]
        return command.main([*files, *words])

    return main, asked


def test_a_study_is_continued_and_failed_runs_are_tried_again(
    run: tuple[Runs, list[tuple[str, int]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, asked = run
    words = ["--jobs", "1", "--only", "spa", "spa/none"]
    assert main("--seeds", "0", *words) == 0
    assert main("--seeds", "0", "1", *words) == 1
    assert asked == [("spa", 0), ("spa/none", 0), ("spa", 1), ("spa/none", 1)]
    assert "failed: spa/none seed 1" in capsys.readouterr().out
    assert main("--seeds", "0", "1", *words) == 1
    assert asked[4:] == [("spa/none", 1)]
    assert len(read_rows(tmp_path / "rows.jsonl")) == 3
    assert "| DPO on the seed | 2 | 9.03 ± 0.00 |" in (tmp_path / "page.md").read_text()


def test_without_time_nothing_starts(
    run: tuple[Runs, list[tuple[str, int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    main, asked = run
    assert main("--seeds", "0", "--only", "spa", "srlm", "--budget", "0") == 0
    assert main("--render") == 0
    assert asked == []
    assert "left for the same command again: srlm seed 0, spa seed 0" in capsys.readouterr().out


def test_settings_of_the_command_line_reach_every_run_and_its_row(
    run: tuple[Runs, list[tuple[str, int]]], tmp_path: Path
) -> None:
    main, _ = run
    assert main("--seeds", "0", "--only", "spa", "--rounds", "1") == 0
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row["settings"]["rounds"] == "1"
    assert "--rounds 1" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_a_real_run_makes_a_row(tmp_path: Path) -> None:
    extra = {
        "sandbox.scale": "smoke", "sandbox.pretrain_steps": "40", "sandbox.min_exact": "0",
        "sandbox.cache_dir": str(tmp_path), "evaluate.num_prompts": "4",
        "evaluate.num_judge_groups": "3", "sampling.keep_truncated": "true",
        "sampling.max_new_tokens": "6", "prompts.num_prompts": "8", "spa.num_seed_pairs": "6",
    }  # fmt: skip
    row = study.run(Variant("spa"), 3, extra)
    assert [m["name"] for m in row["models"]] == ["SFT", "DPO", "SPA1", "SPA2"]
    assert row["settings"]["sandbox.max_seconds"] == "6000"
    assert set(row["models"][3]["win_rates"]) == {"SFT", "DPO", "SPA1"}
    assert row["seconds"] > 0 and row["versions"]["torch"] and "--seed 3" in row["command"]
    assert len(json.dumps(row)) < 12_000
    text = render([row], extra)
    assert "| DPO on the seed | 1 |" in text


def test_a_run_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"unknown setting spa\.alpah"):
        study.run(Variant("spa", {"spa.alpah": "0"}), 0, {})
