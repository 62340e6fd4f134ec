"""Self-Rewarding Language Models (arXiv 2401.10020)."""

from __future__ import annotations

from srlm_fast.data.task import Task
from srlm_fast.rounds.engine import Engine
from srlm_fast.rounds.evaluation import evaluate
from srlm_fast.rounds.spa import refinement
from srlm_fast.rounds.stages import (
    best_and_worst,
    candidates,
    evaluation_data,
    judgements,
    round_prompts,
)


def self_rewarding(engine: Engine, task: Task) -> None:
    """M0 -> SFT baseline; M0 -> M1 -> M2 -> ... -> M(rounds + 1), each M judging for the next.

    SFT baseline = SFT(M0; IFT), M1 = SFT(M0; IFT + EFT), M(t+1) = DPO(M(t); AIFT(M(t))).
    """
    initial = engine.folder("SFT")
    engine.sft("SFT", task.ift)
    evaluate(engine, task, "SFT", initial=initial)

    # The baseline judges human-ranked responses; where it agrees with the ranks, its judgements
    # teach the next model to judge (evaluation fine-tuning data).
    eft = evaluation_data(engine, task)

    engine.use(engine.base)
    engine.sft("M1", [*task.ift, *eft])
    evaluate(engine, task, "M1", previous="SFT", initial=initial)

    for t in range(1, engine.config.rounds + 1):
        name = f"M{t + 1}"
        prompts = round_prompts(engine, task, t)
        samples = candidates(engine, prompts, t)
        before = engine.folder(f"M{t - 1}") if t > 1 else initial
        verdicts = judgements(engine, samples, t, initial=initial, before=before)
        pairs = best_and_worst(engine, samples, verdicts, t)
        engine.dpo(name, pairs, fixed=engine.folder("M1"), refine=refinement(engine.config, t))
        evaluate(
            engine, task, name, round=t, previous=f"M{t}", initial=initial,
            before=engine.folder(f"M{t}"), pairs=pairs,
        )  # fmt: skip
