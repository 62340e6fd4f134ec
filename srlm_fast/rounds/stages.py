"""The stages of a round: each reads its inputs, writes one file, and counts what it drops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import (
    Example,
    Judgement,
    Pair,
    Prompt,
    PromptRow,
    Sample,
    prompt_text,
    user,
)
from srlm_fast.data.task import Task
from srlm_fast.errors import UserError
from srlm_fast.judge.eft import build_eft
from srlm_fast.judge.judge_prompt import load_judge_prompt
from srlm_fast.judge.pairs import drop_unusable, select_pairs, select_positives
from srlm_fast.judge.prompted import PromptedJudge
from srlm_fast.prompts.self_instruct import new_prompts
from srlm_fast.rounds import cream
from srlm_fast.rounds.engine import Engine
from srlm_fast.rounds.temporal import with_anchors

T = TypeVar("T")
NO_PAIRS = "start a new run that samples more candidates, at a higher temperature"


def evaluation_data(engine: Engine, task: Task) -> list[Example]:
    """EFT rows: judgements of the resident model that order a ranked group as humans did."""
    config = engine.config
    if not config.eft.enabled:
        return []

    def make() -> tuple[list[Example], dict[str, Any]]:
        prompt = load_judge_prompt(config.judge.prompt)
        judge = None
        if config.eft.target == "judge":
            judge = PromptedJudge(
                engine.sampler,
                engine.template,
                config.judge,
                seed=engine.run.seed("eft"),
                context=engine.context,
            )
        return build_eft(judge, task.eft, config.eft, prompt, seed=engine.run.seed("eft"))

    return _some(
        engine.run.records("seed/eft", Example, make),
        "no ranked group gave evaluation data: the baseline never ordered one as humans did; set "
        "--eft.target rank to take scores from the ranks, or --eft.enabled false",
    )


def seed_pairs(engine: Engine, task: Task) -> list[Pair]:
    """SPA's seed D: the task's gold pairs, or samples of pi_init that its annotator orders."""
    config = engine.config

    def make() -> tuple[list[Pair], dict[str, Any]]:
        if task.gold or task.annotate is None:
            return engine.gold_pairs(task.gold), {}
        samples, dropped = engine.candidates(
            _seed_prompts(engine, task), stage="seed", round=0, n=2
        )
        groups, unusable = drop_unusable(by_prompt(samples), config.sampling.keep_truncated)
        verdicts = [
            [Judgement(x) for x in task.annotate(g[0].prompt, [s.response for s in g])] if g else []
            for g in groups
        ]
        pairs, ties = select_pairs(groups, verdicts, round=0)
        surplus = Counter(surplus=max(0, len(pairs) - config.spa.num_seed_pairs))
        drops = dropped + unusable + ties + surplus
        return pairs[: config.spa.num_seed_pairs], {"dropped": dict(drops)}

    return _some(
        engine.run.records("seed/pairs", Pair, make),
        f"the gold seed has no usable pair; {NO_PAIRS}",
    )


def round_prompts(engine: Engine, task: Task, t: int) -> list[Prompt]:
    """The prompts of round t: written by a model, or an unused slice of the pool."""
    config = engine.config.prompts

    def make() -> tuple[list[PromptRow], dict[str, Any]]:
        if config.source == "self_instruct":
            earlier = [r.prompt for s in range(1, t) for r in _prompt_rows(engine, s)]
            held_out = (*task.test_prompts, *(g.prompt for g in task.judge_test))
            prompts, counts = engine.write_prompts(
                lambda sampler, template: new_prompts(
                    sampler,
                    template,
                    [e.prompt for e in task.ift],
                    config.for_round(t),
                    seed=engine.run.seed(f"prompts-{t}"),
                    round=t,
                    earlier=map(prompt_text, earlier),
                    avoid=map(prompt_text, held_out),
                    is_valid=task.is_valid_prompt,
                )
            )
            counts.pop("accepted", None)
        else:
            sizes = task.round_sizes or [config.of_round(s) for s in range(1, t + 1)]
            start = len(_seed_prompts(engine, task)) + sum(sizes[: t - 1])
            prompts, counts = list(task.prompts[start : start + sizes[t - 1]]), Counter()
        return [PromptRow(p) for p in prompts], {"dropped": dict(counts)}

    rows = engine.run.records(f"round-{t}/prompts", PromptRow, make)
    return _some(
        [row.prompt for row in rows],
        f"round {t} has no prompts; give more with --data.prompts, or lower --prompts.num_prompts",
    )


def candidates(engine: Engine, prompts: Sequence[Prompt], t: int) -> list[Sample]:
    """N samples of every prompt from the resident model; consecutive, in prompt order.

    With `sampling.force_eos` the file has what was sampled, and what was cut off ends in an EOS for
    all that follows.
    """

    def make() -> tuple[list[Sample], dict[str, Any]]:
        samples, dropped = engine.candidates(prompts, stage=f"candidates-{t}", round=t)
        if engine.config.pairs.anchored_rejection:
            samples = with_anchors(engine, prompts, samples, t)
        tokens = sum(len(s.response_ids) for s in samples)
        counts = {"dropped": dict(dropped), "tokens": tokens}
        return samples, {**counts, "dtype": str(engine.model.dtype)}

    return ended(engine, engine.run.records(f"round-{t}/samples", Sample, make))


def ended(engine: Engine, samples: list[Sample]) -> list[Sample]:
    """`samples`, and with `sampling.force_eos` those that were cut off end in an EOS."""
    if not engine.config.sampling.force_eos:
        return samples
    eos = engine.template.encode_response(user("question"), "answer")[-1]
    return [
        replace(s, response_ids=(*s.response_ids, eos)) if s.finish_reason == "length" else s
        for s in samples
    ]


def judgements(
    engine: Engine,
    samples: Sequence[Sample],
    t: int,
    initial: Path | None = None,
    before: Path | None = None,
) -> list[Judgement]:
    """A judgement of every usable candidate by the judge of the configuration.

    initial, before: see `Engine.judge`.
    """

    def make() -> tuple[list[Judgement], dict[str, Any]]:
        row = {id(s): i for i, s in enumerate(samples)}
        usable, dropped = drop_unusable(by_prompt(samples), engine.config.sampling.keep_truncated)
        groups = [group for group in usable if group]
        # A run may be resumed on another device, where `dtype: auto` is another one.
        drew = engine.run.info(f"round-{t}/samples").get("dtype") == str(engine.model.dtype)
        judge = engine.judge(
            f"judge-{t}", initial or engine.base, before, own_round=t if drew else None
        )
        verdicts = judge.score([g[0].prompt for g in groups], groups)
        flat = [
            replace(v, sample=row[id(s)])
            for group, vs in zip(groups, verdicts, strict=True)
            for s, v in zip(group, vs, strict=True)
        ]
        # A judgement without votes (its prompt was too long) counts as one that did not parse.
        opinions = [o for j in flat for o in (j.votes or (j,))]
        parsed = sum(o.score is not None for o in opinions) / max(len(opinions), 1)
        return flat, {"judge": judge.name, "dropped": dict(dropped), "parsed_share": parsed}

    verdicts = engine.run.records(f"round-{t}/judgements", Judgement, make)
    if not verdicts:
        why = engine.run.info(f"round-{t}/judgements")["dropped"]
        raise UserError(
            f"round {t} has no candidate to judge (dropped: {why}); start a new run with a larger "
            "--sampling.max_new_tokens, or --sampling.keep_truncated true"
        )
    if all(v.score is None for v in verdicts):
        why = dict(Counter(v.invalid or "no score" for v in verdicts))
        raise UserError(
            f"round {t}: none of {len(verdicts)} judgements gave a score ({why}); start a new run "
            "with --judge.kind expected, a shorter --judge.prompt, or a stronger model"
        )
    return verdicts


def best_and_worst(
    engine: Engine, samples: Sequence[Sample], verdicts: Sequence[Judgement], t: int
) -> list[Pair]:
    """The round's preference pairs: best against worst candidate of each prompt, ties dropped."""

    def make() -> tuple[list[Pair], dict[str, Any]]:
        judged = {v.sample: v for v in verdicts}
        row = {id(s): i for i, s in enumerate(samples)}
        groups = [[s for s in g if row[id(s)] in judged] for g in by_prompt(samples)]
        pairs, dropped = select_pairs(
            groups, [[judged[row[id(s)]] for s in g] for g in groups], t, engine.config.pairs,
            seed=engine.run.seed(f"pairs-{t}"),
        )  # fmt: skip
        report: dict[str, Any] = {}
        if engine.config.pairs.consistency != "off":
            pairs, unweighted, report["consistency"] = cream.weighted(engine, pairs, groups)
            dropped += unweighted
        return pairs, {"dropped": _with_earlier_drops(engine, t, dropped), **report}

    pairs = engine.run.records(f"round-{t}/pairs", Pair, make)
    why = engine.run.info(f"round-{t}/pairs")["dropped"]
    return _some(pairs, f"round {t} made no preference pair (dropped: {why}); {NO_PAIRS}")


def positive_examples(
    engine: Engine, samples: Sequence[Sample], verdicts: Sequence[Judgement], t: int
) -> list[Sample]:
    """The round's responses that scored `srlm.positive_score`, to be trained on as they are."""
    least = engine.config.srlm.positive_score

    def make() -> tuple[list[Sample], dict[str, Any]]:
        kept, dropped = select_positives(samples, verdicts, least)
        return kept, {"dropped": _with_earlier_drops(engine, t, dropped)}

    kept = engine.run.records(f"round-{t}/positives", Sample, make)
    why = engine.run.info(f"round-{t}/positives")["dropped"]
    return _some(
        kept,
        f"round {t}: no response scored {least:g} (dropped: {why}); start a new run with a lower "
        "--srlm.positive_score, or --srlm.training preference",
    )


def _with_earlier_drops(engine: Engine, t: int, dropped: Counter[str]) -> dict[str, int]:
    """What round t dropped of its candidates, in all."""
    earlier = [engine.run.info(f"round-{t}/{name}") for name in ("samples", "judgements")]
    return dict(sum((Counter(info.get("dropped", {})) for info in earlier), Counter(dropped)))


def _prompt_rows(engine: Engine, t: int) -> list[PromptRow]:
    return read_jsonl(engine.run.folder / f"round-{t}/prompts.jsonl", PromptRow)


def _seed_prompts(engine: Engine, task: Task) -> list[Prompt]:
    """The part of the pool that seeds SPA where the task annotates: twice the pairs, for ties."""
    annotated = engine.config.method == "spa" and not task.gold and task.annotate is not None
    return list(task.prompts[: 2 * engine.config.spa.num_seed_pairs]) if annotated else []


def by_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Neighbours that answer the same prompt."""
    return [list(group) for _, group in groupby(samples, key=lambda s: s.prompt)]


def _some(items: list[T], complaint: str) -> list[T]:
    if not items:
        raise UserError(complaint)
    return items
