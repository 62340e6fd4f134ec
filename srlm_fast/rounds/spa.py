"""Spread Preference Annotation (arXiv 2406.04412, Algorithm 1)."""

from __future__ import annotations

from srlm_fast.config import Config
from srlm_fast.data.task import Task
from srlm_fast.rounds.engine import Engine
from srlm_fast.rounds.evaluation import evaluate
from srlm_fast.rounds.online import online_round
from srlm_fast.rounds.replay import replayed
from srlm_fast.rounds.stages import (
    best_and_worst,
    candidates,
    judgements,
    round_prompts,
    seed_pairs,
)
from srlm_fast.train.noise import Refinement


def spread_preference_annotation(engine: Engine, task: Task) -> None:
    """pi_init -> pi_0 = DPO(gold seed) -> pi_1 -> ... -> pi_rounds, each pi judging for the next.

    The judging reference is pi_init in every round (eq. 7), or what `judge.reference` says; the
    training reference, which is also h_ref of the extrapolated logits (eq. 12), is the model that
    the round starts from. With `spa.no_seed` pi_0 is pi_init itself (figure 4).
    """
    config, initial = engine.config, engine.base
    if task.ift:
        engine.sft("SFT", task.ift)
        initial = engine.folder("SFT")
    evaluate(engine, task, "SFT", initial=initial)

    previous, resident, before = "SFT", initial, initial  # before: what `resident` grew from
    gold = [] if config.spa.no_seed else seed_pairs(engine, task)
    if gold:
        engine.dpo(
            "DPO",
            gold,
            fixed=initial,
            eval_pairs=task.test_pairs,
            num_train_epochs=config.spa.seed_epochs,
            learning_rate=config.spa.seed_learning_rate or config.preference.learning_rate,
        )
        evaluate(engine, task, "DPO", previous="SFT", initial=initial, pairs=gold)
        previous, resident = "DPO", engine.folder("DPO")

    for i in range(1, config.rounds + 1):
        name = f"SPA{i}"
        prompts, refine = round_prompts(engine, task, i), refinement(config, i)
        if config.online:
            pairs = online_round(
                engine, prompts, i, name, initial=initial, before=before, fixed=initial,
                refine=refine,
            )  # fmt: skip
        else:
            samples = candidates(engine, prompts, i)
            verdicts = judgements(engine, samples, i, initial=initial, before=before)
            pairs = best_and_worst(engine, samples, verdicts, i)
            data = [*pairs, *replayed(engine, gold, pairs, i)]
            engine.dpo(name, data, fixed=initial, refine=refine, eval_pairs=task.test_pairs)
        before, resident = resident, engine.folder(name)
        evaluate(
            engine, task, name, round=i, previous=previous, initial=initial, before=before,
            pairs=pairs,
        )  # fmt: skip
        previous = name


def refinement(config: Config, i: int) -> Refinement | None:
    """Label refinement of round i (from 1): lambda decays over the rounds, its last value stays.

    None where labels are taken as they are. Without decoupled detection lambda is 0: equation 9.
    """
    if not config.refines_labels:
        return None
    spa = config.spa
    return Refinement(
        alpha=spa.alpha,
        lam=spa.lambdas[min(i, len(spa.lambdas)) - 1] if spa.decoupled else 0.0,
        k_percent=spa.k_percent,
        tau=spa.tau,
        window=spa.tau_window,
        interval=spa.tau_interval,
        warmup_fraction=spa.warmup_fraction,
    )
