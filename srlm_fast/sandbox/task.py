"""The world as a `Task`: seed data graded by the oracle, prompt pools, and the oracle itself."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from srlm_fast.config import Config
from srlm_fast.data.records import Example, Prompt, RankedGroup, prompt_text, user
from srlm_fast.data.task import Task
from srlm_fast.errors import UserError
from srlm_fast.sandbox.oracle import Criteria, judge_response
from srlm_fast.sandbox.responses import graded_response
from srlm_fast.sandbox.world import Quality, TaskPrompt, World, draw_prompt, get_world, parse_prompt

RESPONSES_PER_TREE = 3
MOST_PROMPTS = 1_000_000


def make_task(config: Config) -> Task:
    """The sandbox's data for this seed; no prompt is in two pools.

    IFT and EFT come from trees of their own (the rank-0 response; all three, ranked).
    The oracle's scores stand for the human labels of the seed data. Raises UserError on an unknown
    world.
    """
    world = get_world(config.sandbox.world)
    pools = _PromptPools(config.seed)
    test = pools.draw("test", config.evaluate.num_prompts)
    judge_test = pools.draw("judge test", config.evaluate.num_judge_groups)
    ift = pools.draw("ift", config.sandbox.num_ift)
    eft = pools.draw("eft", config.sandbox.num_eft)
    # SPA's seed takes two prompts for each of its pairs, since some samples tie.
    wanted = 2 * config.spa.num_seed_pairs + config.prompts.of_rounds(config.rounds)
    if wanted > MOST_PROMPTS:
        raise UserError(
            f"{wanted:,} prompts are more than the sandbox gives ({MOST_PROMPTS:,}); lower "
            "prompts.num_prompts or rounds"
        )
    prompts = pools.draw("prompts", wanted)
    if config.preference.load_best_model_at_end:
        test += pools.draw("validation", config.pairwise.num_prompts)

    def trees(name: str, tasks: Sequence[TaskPrompt], quality: Quality) -> list[RankedGroup]:
        rng = Random(f"{name} responses {config.seed}")
        return [_ranked_group(task, world, quality, rng) for task in tasks]

    return Task(
        name=f"sandbox {world.name}",
        ift=[Example(t.prompt, t.responses[0]) for t in trees("ift", ift, world.tree_quality)],
        eft=trees("eft", eft, world.tree_quality),
        judge_test=trees("judge test", judge_test, world.review_quality),
        prompts=[user(str(task)) for task in prompts],
        test_prompts=[user(str(task)) for task in test],
        annotate=annotate,
        oracle=oracle,
        is_valid_prompt=lambda text: parse_prompt(text) is not None,
    )


def oracle(prompt: Prompt, response: str) -> dict[str, int]:
    """The five criteria, 0 or 1 each; all 0 where the prompt is no task of the world."""
    task = parse_prompt(prompt_text(prompt))
    criteria = judge_response(task, response) if task else Criteria(*[False] * 5)
    return {name: int(met) for name, met in criteria._asdict().items()}


def annotate(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    """The true score of each response, 0 to 5."""
    return [float(sum(oracle(prompt, response).values())) for response in responses]


class _PromptPools:
    """Draws prompts that no earlier pool holds."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.seen: set[TaskPrompt] = set()

    def draw(self, name: str, count: int) -> list[TaskPrompt]:
        rng = Random(f"{name} prompts {self.seed}")
        pool: list[TaskPrompt] = []
        while len(pool) < count:
            task = draw_prompt(rng)
            if task not in self.seen:
                self.seen.add(task)
                pool.append(task)
        return pool


def _ranked_group(task: TaskPrompt, world: World, quality: Quality, rng: Random) -> RankedGroup:
    """Graded responses, best first; equal scores share a rank."""
    graded = [graded_response(task, world, quality, rng) for _ in range(RESPONSES_PER_TREE)]
    scored = [(float(judge_response(task, text).score), text) for text in graded]
    scored.sort(key=lambda pair: -pair[0])
    scores = tuple(score for score, _ in scored)
    levels = sorted(set(scores), reverse=True)
    return RankedGroup(
        prompt=user(str(task)),
        responses=tuple(text for _, text in scored),
        ranks=tuple(float(levels.index(score)) for score in scores),
        scores=scores,
    )
