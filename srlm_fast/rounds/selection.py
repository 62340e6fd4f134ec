"""The best checkpoint of a training, by a pairwise judge.

SRLM stops a training when its generations no longer win against those of the checkpoint before
(arXiv 2401.10020, section 3.1.3, with Claude 2 as judge and 253 validation prompts). Here the
training is over: each checkpoint in turn challenges the best one so far, and the judge is the model
that the training started from, which has judged its pairs too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srlm_fast.config import Config
from srlm_fast.data.records import Prompt
from srlm_fast.data.task import Task
from srlm_fast.errors import UserError
from srlm_fast.evaluate.head_to_head import Comparer, head_to_head
from srlm_fast.judge.pairwise import PromptedPairwiseJudge, ScoreComparison
from srlm_fast.rounds.engine import Engine
from srlm_fast.train.checkpoint import load_saved_weights, saved_weights

Contest = Callable[[int, int], Mapping[str, Any]]


def pairwise_judge(engine: Engine, stage: str) -> Comparer:
    """The resident model as a judge of two responses, as `pairwise` says."""
    cfg, seed = engine.config.pairwise, engine.run.seed(stage)
    if cfg.kind == "score":
        return ScoreComparison(engine.judge(stage, engine.base))
    return PromptedPairwiseJudge(
        engine.sampler, engine.template, cfg, seed=seed, context=engine.context
    )


def validation_prompts(config: Config, task: Task) -> Sequence[Prompt]:
    """The prompts to choose on: test prompts that no evaluation uses; none where nothing is chosen.

    Raises UserError when there are too few.
    """
    if not config.preference.load_best_model_at_end:
        return ()
    left = task.test_prompts[config.evaluate.num_prompts :]
    wanted = config.pairwise.num_prompts
    if len(left) < wanted:
        raise UserError(
            f"load_best_model_at_end needs {wanted} prompts to choose on, and evaluation leaves "
            f"{len(left)} of {len(task.test_prompts)} test prompts; raise data.num_test_prompts, "
            "or lower evaluate.num_prompts or pairwise.num_prompts"
        )
    return left[:wanted]


def checkpoint_choice(
    engine: Engine, task: Task, name: str
) -> Callable[[int], dict[str, Any]] | None:
    """`load_best_checkpoint` of the training of `name`; None where the last step is the model."""
    prompts = validation_prompts(engine.config, task)
    return partial(load_best_checkpoint, engine, name, prompts) if prompts else None


def load_best_checkpoint(
    engine: Engine, name: str, prompts: Sequence[Prompt], last_step: int
) -> dict[str, Any]:
    """Makes the resident model the best of the checkpoints of `name`, a training that has just
    ended; returns the `best_step`, each contest under `checkpoints`, and the prompts dropped.

    The last step is a candidate whether it was saved or not. All ranks come to the same choice.
    """
    start, ranks = engine.resident, engine.run.ranks
    ranks.barrier()  # the main one has written the last checkpoint
    limit = engine.config.preference.save_total_limit
    files = ranks.from_main(saved_weights(engine.state(name), limit))
    last = _trained(engine.model)
    answers = {}
    steps = [step for step in files if step < last_step]
    for step in [*steps, last_step]:
        _load(engine.model, files[step] if step < last_step else last)
        answers[step], dropped = engine.candidates(prompts, stage=f"select/{name}", round=0, n=1)
    engine.use(start)
    judge = pairwise_judge(engine, f"select/{name}")

    def contest(one: int, other: int) -> dict[str, Any]:
        return head_to_head(judge, answers[one], answers[other])

    best, contests = strongest([*steps, last_step], contest)
    _load(engine.model, files[best] if best < last_step else last)
    return {"best_step": best, "checkpoints": contests, "held_out_dropped": dict(+dropped)}


def strongest(steps: Sequence[int], contest: Contest) -> tuple[int, list[dict[str, Any]]]:
    """The step that stands when each has challenged the best before it, and the contests, of which
    `contest` gives `head_to_head`'s shares.

    A challenger must win more prompts than it loses: of equals the earlier stays. Where no contest
    has a verdict nothing speaks for any of them, and the last is taken.
    """
    best, contests = steps[0], []
    for step in steps[1:]:
        rates = contest(step, best)
        contests.append({"step": step, "against": best, **rates})
        if (rates["win"] or 0.0) > (rates["lose"] or 0.0):
            best = step
    decided = any(contest["prompts"] for contest in contests)
    return best if decided else steps[-1], contests


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what trains, in the host's memory."""
    named = model.named_parameters()
    return {name: p.detach().to("cpu", copy=True) for name, p in named if p.requires_grad}


@torch.no_grad()
def _load(model: nn.Module, weights: Path | dict[str, Tensor]) -> None:
    if isinstance(weights, Path):
        load_saved_weights(model, weights)
        return
    for name, tensor in weights.items():
        model.get_parameter(name).copy_(tensor)
