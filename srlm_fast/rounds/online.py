"""Online rounds: the model that learns from a step has sampled and judged it (OAIF, 2402.04792).

An offline round samples all its prompts from M_t, judges and pairs all candidates, and then trains.
Here each optimiser step does so with its own prompts, `preference.per_device_train_batch_size` of
them: the sampler and the judge are the policy as the step before has left it. Reference, loss and
SPA's refinement are those of an offline round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srlm_fast.data.records import Pair, Prompt
from srlm_fast.errors import UserError
from srlm_fast.judge.base import Judge
from srlm_fast.judge.implicit import ImplicitJudge
from srlm_fast.judge.pairs import drop_unusable, select_pairs
from srlm_fast.rounds.engine import Engine
from srlm_fast.rounds.stages import by_prompt, ended
from srlm_fast.sampler import Sampler
from srlm_fast.train.noise import Refinement
from srlm_fast.train.plan import plan_steps


def online_round(
    engine: Engine,
    prompts: Sequence[Prompt],
    t: int,
    name: str,
    *,
    initial: Path,
    before: Path,
    fixed: Path,
    refine: Refinement | None = None,
) -> list[Pair]:
    """Trains the resident model into `name` on `prompts`; returns the pairs that came up.

    The pairs are a stage, which the training is part of: a round that was stopped begins anew.
    initial, before: see `Engine.judge`; fixed, refine: see `Engine.dpo`.
    """

    def make() -> tuple[list[Pair], dict[str, Any]]:
        fitting = [prompt for prompt, _ in engine.with_room(prompts)]
        config, seed = engine.config.preference, engine.run.seed(name)
        plan = plan_steps(range(len(fitting)), config, seed)
        judge = engine.judge(f"judge-{t}", initial, before, own_round=t)
        source = _Source(engine, fitting, plan, t, judge)
        source.dropped["prompt too long"] = len(prompts) - len(fitting)
        pairs, training = engine.train_online(
            name, source.pairs, len(plan), num_pairs=len(fitting), fixed=fixed, refine=refine
        )
        return pairs, {"dropped": dict(+source.dropped), "training": training}

    pairs = engine.run.records(f"round-{t}/pairs", Pair, make)
    made = engine.run.info(f"round-{t}/pairs")
    if not made["training"]["pairs"]:
        raise UserError(
            f"round {t} made no preference pair (dropped: {made['dropped']}); start a new run that"
            " samples more candidates, at a higher temperature"
        )
    engine.adopt(name, made["training"])
    return pairs


@dataclass(frozen=True)
class _Source:
    """Where the pairs of a round's steps come from."""

    engine: Engine
    prompts: Sequence[Prompt]
    plan: Sequence[Sequence[int]]
    t: int
    judge: Judge
    dropped: Counter[str] = field(default_factory=Counter)

    def pairs(self, step: int) -> list[Pair]:
        """Of that step's prompts, by the resident model as it is now."""
        engine, t = self.engine, self.t
        # A round of one step draws and chooses what an offline round does.
        stage = f"candidates-{t}" + (f"/{step}" if step else "")
        mine = [self.prompts[index] for index in self.plan[step]]
        samples, _ = engine.candidates(mine, stage=stage, round=t)
        groups, unusable = drop_unusable(
            by_prompt(ended(engine, samples)), engine.config.sampling.keep_truncated
        )
        judged = [group for group in groups if group]
        verdicts = iter(self.judge.score([group[0].prompt for group in judged], judged))
        pairs, without = select_pairs(
            groups, [next(verdicts) if group else [] for group in groups], t, engine.config.pairs,
            seed=engine.run.seed(f"pairs-{t}"),
        )  # fmt: skip
        self.dropped.update(unusable + without)
        self._sleep()
        return pairs

    def _sleep(self) -> None:
        """The step that follows wants the memory of keys and values."""
        self.engine.sampler.sleep()
        if isinstance(self.judge, ImplicitJudge) and isinstance(self.judge.reference, Sampler):
            self.judge.reference.sleep()
