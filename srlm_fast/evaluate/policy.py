"""The evaluation of one model: as a policy by its responses, and as a judge by its scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from srlm_fast.config import Config
from srlm_fast.data.records import Judgement, Pair, Prompt, RankedGroup, Sample
from srlm_fast.data.task import Task
from srlm_fast.evaluate.correlation import mean, standard_error
from srlm_fast.evaluate.head_to_head import Comparer, head_to_head
from srlm_fast.evaluate.labels import label_accuracy
from srlm_fast.evaluate.pairs import pair_metrics
from srlm_fast.evaluate.responses import length_metrics, mean_scores, oracle_metrics, win_rate
from srlm_fast.evaluate.reward_model import PERFECT_SCORE, length_bias, reward_model_metrics

Groups = Sequence[Sequence[Sample]]
AsSamples = Callable[[Prompt, Sequence[str]], list[Sample]]

UNBOUNDED = ("implicit", "scorer", "longest")  # judges that do not score 0 to 5


class Scorer(Protocol):
    """A judge, as far as evaluation needs one."""

    @property
    def name(self) -> str:
        """Who judges, for the report."""

    def score(self, prompts: Sequence[Prompt], candidates: Groups) -> list[list[Judgement]]:
        """A judgement of every candidate."""


class Draw(Protocol):
    """Samples the model under evaluation, with a seed that is the same for every model."""

    def __call__(
        self, prompts: Sequence[Prompt], *, n: int, temperature: float, top_p: float
    ) -> tuple[list[Sample], Counter[str]]:
        """n consecutive samples of each prompt that fits, and counts of what was dropped."""


def evaluate_model(
    name: str,
    *,
    round: int,
    draw: Draw,
    as_samples: AsSamples,
    task: Task,
    config: Config,
    judge: Scorer | None = None,
    implicit: Scorer | None = None,
    pairwise: Comparer | None = None,
    opponents: Mapping[str, Sequence[Sample]] | None = None,
    pairs: Sequence[Pair] = (),
) -> tuple[dict[str, Any], list[Sample]]:
    """What `summary.json` says of a model's quality, and the model's samples of the test prompts.

    as_samples: turns given texts into candidates that a judge can score.
    judge: the model's own judge; it is measured on `task.judge_test`, or where there is none on
        `task.test_pairs`, and it measures the responses where the task has no oracle.
    implicit: the reward whose accuracy on `task.test_pairs` is measured.
    pairwise: compares the model's first sample of each prompt with that of each opponent.
    opponents: the models to win against, each with its samples as this function returned them.
        Where a judge decides, this model's judge scores both sides: two judges' scales do not
        compare.
    pairs: what the model was trained on; an oracle says how many of their labels are right.

    Every key is always there; what cannot be measured is None.
    """
    cfg = config.evaluate
    prompts = task.test_prompts[: cfg.num_prompts]
    samples, dropped = draw(
        prompts, n=cfg.num_samples, temperature=cfg.temperature, top_p=cfg.top_p
    )
    groups = _groups(samples, cfg.num_samples)
    quality, scores = _quality(groups, task, judge)
    wins, duels = {}, {}
    for opponent, others in (opponents or {}).items():
        if scores:
            _, other_scores = _quality(_groups(others, cfg.num_samples), task, judge)
            wins[opponent] = win_rate(scores, other_scores) | {"judged_by": quality["judged_by"]}
        if pairwise:
            first = slice(None, None, cfg.num_samples)
            duels[opponent] = head_to_head(pairwise, samples[first], others[first])
    labels = label_accuracy(task.oracle, pairs) if task.oracle and pairs else None
    metrics = {
        "name": name,
        "round": round,
        "test_prompts": len(groups),
        "test_prompts_dropped": dict(+dropped),
        **quality,
        "greedy_oracle_score": _greedy_score(draw, prompts, task) if cfg.greedy else None,
        "win_rates": wins or None,
        "head_to_head": duels or None,
        **length_metrics(groups),
        "judge": _judge_agreement(judge, as_samples, task, cfg.num_judge_groups),
        "preference_accuracy": _preference_accuracy(implicit, as_samples, task),
        "labels": labels,
        "label_accuracy": labels and labels["accuracy"],
        "pairs": pair_metrics(pairs) if pairs else None,
    }
    return metrics, samples


def _groups(samples: Sequence[Sample], n: int) -> list[Sequence[Sample]]:
    return [samples[i : i + n] for i in range(0, len(samples), n)]


def _quality(
    groups: Groups, task: Task, judge: Scorer | None
) -> tuple[dict[str, Any], Sequence[float | None]]:
    """Mean scores by the oracle, else by the judge, and each prompt's score (empty: by nobody)."""
    by_oracle: dict[str, Any] = {"oracle_score": None, "oracle_se": None, "criteria": None}
    by_judge: dict[str, Any] = {"judge_score": None, "judge_se": None, "judged_by": None}
    per_prompt: Sequence[float | None] = []
    if task.oracle:
        by_oracle, per_prompt = oracle_metrics(task.oracle, groups)
        by_judge["judged_by"] = "oracle"
    elif judge and judge.name != "implicit":
        # Not the implicit reward: on the model's own samples its mean is the KL divergence from
        # pi_init, so a model that only drifts would win.
        verdicts = judge.score([group[0].prompt for group in groups], groups)
        per_prompt = mean_scores(_scores(verdicts))
        known = [score for score in per_prompt if score is not None]
        by_judge = {
            "judge_score": mean(known),
            "judge_se": standard_error(known),
            "judged_by": judge.name,
        }
    return by_oracle | by_judge, per_prompt


def _greedy_score(draw: Draw, prompts: Sequence[Prompt], task: Task) -> float | None:
    if task.oracle is None:
        return None
    samples, _ = draw(prompts, n=1, temperature=0.0, top_p=1.0)
    metrics, _ = oracle_metrics(task.oracle, _groups(samples, 1))
    score: float | None = metrics["oracle_score"]
    return score


def _judge_agreement(
    judge: Scorer | None, as_samples: AsSamples, task: Task, limit: int
) -> dict[str, Any] | None:
    """Agreement of the judge with known ranks, and the share of its judgements that parsed."""
    pairs = [RankedGroup(p.prompt, (p.chosen, p.rejected), (0.0, 1.0)) for p in task.test_pairs]
    ranked = (task.judge_test or pairs)[:limit]
    if judge is None or not ranked:
        return None
    candidates = [as_samples(group.prompt, group.responses) for group in ranked]
    verdicts = judge.score([group.prompt for group in ranked], candidates)
    flat = [verdict for row in verdicts for verdict in row]
    lengths = [[len(sample.response_ids) for sample in row] for row in candidates]
    opinions = [opinion for verdict in flat for opinion in (verdict.votes or (verdict,))]
    return {
        "judge": judge.name,
        **reward_model_metrics(
            _scores(verdicts),
            [group.ranks for group in ranked],
            perfect=None if judge.name in UNBOUNDED else PERFECT_SCORE,
        ),
        "length_bias": length_bias(_scores(verdicts), lengths),
        "length_bias_of_ranks": length_bias([[-r for r in g.ranks] for g in ranked], lengths),
        "parsed_share": mean([o.score is not None for o in opinions]),
        "invalid": dict(Counter(o.invalid or "no score" for o in opinions if o.score is None)),
    }


def _preference_accuracy(
    implicit: Scorer | None, as_samples: AsSamples, task: Task
) -> float | None:
    """Share of held-out pairs whose chosen side has the higher reward; a tie is half a success."""
    pairs = task.test_pairs
    if implicit is None or not pairs:
        return None
    candidates = [as_samples(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
    verdicts = implicit.score([pair.prompt for pair in pairs], candidates)
    metrics = reward_model_metrics(_scores(verdicts), [(0, 1)] * len(pairs))
    accuracy: float | None = metrics["pairwise_accuracy"]["half"]
    return accuracy


def _scores(verdicts: Sequence[Sequence[Judgement]]) -> list[list[float | None]]:
    return [[verdict.score for verdict in row] for row in verdicts]
