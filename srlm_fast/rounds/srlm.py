"""Self-Rewarding Language Models (arXiv 2401.10020)."""

from __future__ import annotations

from srlm_fast.data.records import Example, Pair, Sample
from srlm_fast.data.task import Task
from srlm_fast.rounds.engine import Engine
from srlm_fast.rounds.evaluation import evaluate
from srlm_fast.rounds.online import online_round
from srlm_fast.rounds.selection import checkpoint_choice
from srlm_fast.rounds.spa import refinement
from srlm_fast.rounds.stages import (
    best_and_worst,
    candidates,
    evaluation_data,
    judgements,
    positive_examples,
    round_prompts,
)


def self_rewarding(engine: Engine, task: Task) -> None:
    """M0 -> SFT baseline; M0 -> M1 -> M2 -> ... -> M(rounds + 1), each M judging for the next.

    SFT baseline = SFT(M0; IFT), M1 = SFT(M0; IFT + EFT), M(t+1) = DPO(M(t); AIFT(M(t))).

    The paper's ablations: without EFT the baseline is M1. With positive examples only,
    M(t+1) = SFT(M0; IFT + EFT + the perfectly scored responses of M1, ..., M(t)).
    """
    config, initial = engine.config, engine.folder("SFT")
    start, rows = "SFT", list[Example | Sample](task.ift)
    engine.sft("SFT", rows)
    evaluate(engine, task, "SFT", initial=initial)

    if config.eft.enabled:
        # The baseline judges human-ranked responses; where it agrees with the ranks, its
        # judgements teach the next model to judge (evaluation fine-tuning data).
        start = "M1"
        rows += evaluation_data(engine, task)
        engine.use(engine.base)
        engine.sft("M1", rows)
        evaluate(engine, task, "M1", previous="SFT", initial=initial)

    previous, before = start, initial
    for t in range(1, config.rounds + 1):
        name, pairs = f"M{t + 1}", list[Pair]()
        prompts, refine = round_prompts(engine, task, t), refinement(config, t)
        if config.online:
            pairs = online_round(
                engine, prompts, t, name, initial=initial, before=before,
                fixed=engine.folder(start), refine=refine,
            )  # fmt: skip
        else:
            samples = candidates(engine, prompts, t)
            verdicts = judgements(engine, samples, t, initial=initial, before=before)
            if config.srlm.training == "positives":
                rows += positive_examples(engine, samples, verdicts, t)
                engine.use(engine.base)
                engine.sft(name, rows)
            else:
                pairs = best_and_worst(engine, samples, verdicts, t)
                engine.dpo(
                    name, pairs, fixed=engine.folder(start), refine=refine,
                    choose=checkpoint_choice(engine, task, name),
                )  # fmt: skip
        now = engine.folder(previous)
        evaluate(
            engine, task, name, round=t, previous=previous, initial=initial, before=now, pairs=pairs
        )
        previous, before = name, now
