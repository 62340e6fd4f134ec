"""New prompts from old ones: the model continues a list of tasks (arXiv 2212.10560)."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from tqdm import tqdm

from srlm_fast.config import PromptsConfig
from srlm_fast.data.records import Prompt, prompt_text, user
from srlm_fast.data.template import ChatTemplate
from srlm_fast.errors import UserError
from srlm_fast.prompts.filters import text_fault
from srlm_fast.prompts.rouge import RougeIndex
from srlm_fast.prompts.task_list import TaskList, load_task_list, one_line
from srlm_fast.sampler import Completion, Sampler, SamplingParams

MAX_BATCH = 256  # calls that share their pool of generated demonstrations
FIRST_BATCH = 32
HOPELESS = 20  # calls that do not fit the context, before giving up
FRUITLESS = 512  # calls without one usable prompt, before giving up


def new_prompts(
    sampler: Sampler,
    template: ChatTemplate,
    seeds: Sequence[Prompt],
    config: PromptsConfig,
    *,
    seed: int,
    round: int,
    earlier: Iterable[str] = (),
    avoid: Iterable[str] = (),
    is_valid: Callable[[str], bool] | None = None,
) -> tuple[list[Prompt], Counter[str]]:
    """Up to `config.num_prompts` new prompts, and what became of everything that was generated.

    Each call shows its own demonstrations: `num_seed_demos` drawn from `seeds`, and
    `num_generated_demos` from the prompts accepted so far (while those are too few, from `seeds`).
    What the model adds is kept unless its list is cut off at the token limit ("truncated"; with
    `config.keep_truncated` that is only the last task of it), it has a fault named by `text_fault`,
    equals a seed, an accepted prompt or one of `avoid` ("duplicate"), fails `is_valid`
    ("malformed"), has ROUGE-L above `config.rouge_l` with a seed or an accepted prompt ("similar"),
    or is not needed any more ("surplus"). Accepted are those of `earlier` rounds too. The counts
    have every generated task under "accepted" or its reason, and calls whose list left no room in
    the context as "call too long".

    Fewer prompts than asked for is no error; none at all, or no seeds, raises UserError.
    """
    if not seeds:
        raise UserError("self-instruction needs seed prompts to show; the task has none")
    task_list = load_task_list(config.template)
    shown = [one_line(prompt_text(prompt)) for prompt in seeds]
    pool = _Pool(shown, config, earlier, avoid, is_valid)
    rng = random.Random(f"{seed}/self-instruction/{round}")
    counts: Counter[str] = Counter()
    calls, max_calls = 0, config.max_calls or 20 * config.num_prompts
    with tqdm(total=config.num_prompts, desc="new prompts", unit="prompt", disable=None) as bar:
        while calls < max_calls and len(pool.accepted) < config.num_prompts:
            size = min(_calls_needed(pool, calls, config.num_prompts), max_calls - calls)
            demos = [pool.demos(rng) for _ in range(size)]  # as many in each
            stop = task_list.stop(len(demos[0]) + 1 + config.max_tasks) if config.max_tasks else ()
            starts = [task_list.start(some) for some in demos]
            calls += size
            for completion in _complete(sampler, template, starts, stop, config, rng, counts):
                for text, cut in _tasks(task_list, completion, config.keep_truncated):
                    counts["truncated" if cut else pool.offer(text)] += 1
            bar.update(len(pool.accepted) - bar.n)
            hopeless = counts["call too long"] == calls >= HOPELESS
            if hopeless or (calls >= FRUITLESS and not pool.accepted):
                break
    if not pool.accepted:
        raise UserError(
            f"self-instruction gave no usable prompt in {calls} calls ({_listed(counts)}); loosen "
            "the filters, lower prompts.max_new_tokens where calls are too long for the context of "
            f"{sampler.context} tokens, raise it or set prompts.keep_truncated where lists are cut "
            "off, or set prompts.source=dataset"
        )
    return [user(text) for text in pool.accepted], counts


class _Pool:
    """Seeds and accepted prompts: what is shown, and what a new prompt must differ from."""

    def __init__(
        self,
        seeds: Sequence[str],
        config: PromptsConfig,
        earlier: Iterable[str],
        avoid: Iterable[str],
        is_valid: Callable[[str], bool] | None,
    ) -> None:
        self.config = config
        self.is_valid = is_valid
        self.accepted: list[str] = []
        # Long conversation starters would crowd the list out of the context.
        self.seeds = [s for s in seeds if 0 < len(s.split()) <= config.max_words] or list(seeds)
        taken = [*seeds, *map(one_line, earlier)]
        self.known = {*taken, *map(one_line, avoid)}
        self.index = RougeIndex(config.rouge_l)
        for text in taken:
            self.index.add(text)

    def demos(self, rng: random.Random) -> list[str]:
        """The demonstrations of one call, in random order."""
        wanted = self.config.num_seed_demos + self.config.num_generated_demos
        generated = min(self.config.num_generated_demos, len(self.accepted))
        drawn = rng.sample(self.accepted, generated)
        drawn += rng.sample(self.seeds, min(wanted - generated, len(self.seeds)))
        rng.shuffle(drawn)
        return drawn

    def offer(self, text: str) -> str:
        """Accepts a new prompt or not, and says "accepted" or why not."""
        if len(self.accepted) >= self.config.num_prompts:
            return "surplus"
        if fault := text_fault(text, self.config):
            return fault
        if text in self.known:
            return "duplicate"
        if self.is_valid and not self.is_valid(text):
            return "malformed"
        if self.index.has_similar(text):
            return "similar"
        self.accepted.append(text)
        self.known.add(text)
        self.index.add(text)
        return "accepted"


def _calls_needed(pool: _Pool, calls: int, num_prompts: int) -> int:
    """Calls that should give the missing prompts, at the rate of accepted prompts so far."""
    missing = num_prompts - len(pool.accepted)
    if calls == 0:  # a list may go on for several tasks: find out before asking for hundreds
        return min(FIRST_BATCH, missing)
    rate = len(pool.accepted) / calls if pool.accepted else 1.0
    return min(MAX_BATCH, math.ceil(missing / rate))


def _complete(
    sampler: Sampler,
    template: ChatTemplate,
    starts: Sequence[tuple[Prompt, str]],
    stop: tuple[str, ...],
    config: PromptsConfig,
    rng: random.Random,
    counts: Counter[str],
) -> Iterator[Completion]:
    """One continuation of each list that fits the context."""
    encoded = [template.encode_prompt(prompt, prefill) for prompt, prefill in starts]
    room = sampler.context - config.max_new_tokens
    fitting = [ids for ids in encoded if len(ids) <= room]
    if too_long := len(encoded) - len(fitting):
        counts["call too long"] += too_long
    params = SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_new_tokens,
        stop=stop,
        seed=rng.getrandbits(32),
    )
    for output in sampler.generate(fitting, params) if fitting else []:
        yield output.outputs[0]


def _tasks(
    task_list: TaskList, completion: Completion, keep_truncated: bool
) -> Iterator[tuple[str, bool]]:
    """The tasks of a completion, and whether each is lost at the token limit."""
    cut = completion.finish_reason == "length"
    tasks = task_list.tasks(completion.text)
    for number, text in enumerate(tasks, 1):
        yield text, cut and (number == len(tasks) or not keep_truncated)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
