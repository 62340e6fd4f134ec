"""The paged engine: every shared prefix is computed once and read once for all its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from srlm_fast.model.load import context_length
from srlm_fast.model.probe import Layers
from srlm_fast.sampler import prefill, scoring
from srlm_fast.sampler.batching import default_pages, max_rows, pages_of
from srlm_fast.sampler.decode import (
    STEPS,
    Rules,
    State,
    decode_plan,
    decode_step,
    draw_step,
    harvest,
    start_state,
    steps_of,
)
from srlm_fast.sampler.forest import Node, PrefixForest
from srlm_fast.sampler.graphs import StepGraphs, bucket, round_up
from srlm_fast.sampler.pool import PagePool
from srlm_fast.sampler.rows import Row, own_pages
from srlm_fast.sampler.runner import Runner
from srlm_fast.sampler.scheduler import Scheduler
from srlm_fast.sampler.version import Version, weights_version
from srlm_kernels.backends import row_backend


class PagedEngine:
    """Decodes rows on pages of KV memory. Prompts stay cached while the weights are unchanged.

    `layers`: what a probing pass saw of them. `max_pages`: how many pages there may be
    (0: by the memory at hand); they are allocated as calls need them. `steps`: of a burst.
    """

    def __init__(
        self, model: Any, layers: Layers, *, impl: str, max_pages: int = 0, steps: int = STEPS
    ) -> None:
        self.model, self.steps = model, steps
        self.runner = Runner(model, layers, impl)
        self.graphs = StepGraphs(self.runner)
        self.max_pages = max_pages or default_pages(
            self.runner.memory.page_bytes, self.device, context_length(model)
        )
        self.name = f"paged ({row_backend(impl, self.runner.head.weight)})"
        self.preemptions = 0
        self._version: Version | None = None
        self.sleep()

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def vocab(self) -> int:
        return len(self.runner.head.weight)

    def sleep(self) -> None:
        """Frees the KV memory; the next call allocates it anew."""
        self.graphs.clear()
        self.runner.memory.resize(0)
        self.pool = PagePool(0)
        self.forest = PrefixForest(self.pool)

    @contextmanager
    def phase(self, pages: int) -> Iterator[None]:
        """The model is the engine's inside, and the pool has `pages` pages if it may.

        Whatever breaks the phase, the model is restored and all pages are free again.
        """
        with self.runner.borrowed_model():
            try:
                self._forget_old_weights()
                self._grow(pages)
                yield
            except BaseException:
                self.pool = PagePool(self.runner.memory.pages)
                self.forest = PrefixForest(self.pool)
                raise

    def generate(
        self, rows: Sequence[Row], rules: Rules, on_end: Callable[[list[Row]], None]
    ) -> None:
        """Draws every row to its end; `on_end` is shown the rows as they end."""
        pages = sum(pages_of(len(prompt)) for prompt in {row.prompt for row in rows})
        pages += sum(own_pages(len(row.prompt), row.params.max_tokens - 1) for row in rows)
        with self.phase(pages):
            scheduler = Scheduler(self.forest, rows, max_rows(self.vocab))
            while scheduler.waiting or scheduler.running:
                self._prefill(scheduler.admit(), rules)
                on_end(scheduler.retire())
                scheduler.reserve(self.steps)
                self._burst(scheduler.running, rules)
                on_end(scheduler.retire())
            self.preemptions += scheduler.preemptions

    def score(
        self, prompts: Sequence[Sequence[int]], completions: scoring.Groups, bar: Any
    ) -> scoring.Scores:
        """See `Sampler.score`."""
        pages = sum(
            pages_of(len(prompt)) + sum(pages_of(len(ids)) + 1 for ids in group)
            for prompt, group in zip(prompts, completions, strict=True)
        )
        with self.phase(pages):
            return scoring.score(self, prompts, completions, bar)

    def next_logprobs(self, prompts: Sequence[tuple[int, ...]], token_ids: Sequence[int]) -> Tensor:
        """See `Sampler.next_logprobs`; the prompts differ."""
        with self.phase(sum(pages_of(len(prompt)) for prompt in prompts)):
            return scoring.next_logprobs(self, prompts, token_ids)

    def prompt_states(self, paths: Sequence[Sequence[Node]]) -> Tensor:
        """Hidden states [P, D] of the last token of each path, computing what is not filled."""
        return self._compute([prefill.prompt_stretch(path) for path in paths])

    def check(self) -> None:
        """Raises RuntimeError if a page is lost or owned twice. Call between calls."""
        self.pool.check([node.page for node in self.forest.nodes()])

    def _prefill(self, started: Sequence[Row], rules: Rules) -> None:
        """Computes prompts and, of rows that were preempted, tokens; draws first tokens."""
        fresh = [row for row in started if not row.tokens]
        first: dict[int, list[Row]] = {}
        for row in fresh:
            first.setdefault(id(row.path[-1]), []).append(row)
        paths = [group[0].path for group in first.values()]
        stretches = [prefill.prompt_stretch(path) for path in paths]
        for row in started:
            if row.tokens and not row.path[-1].filled:
                stretches.append(prefill.prompt_stretch(row.path))
            if len(row.tokens) > 1:
                known = row.tokens[:-1]
                stretches.append(prefill.own_stretch(row.path, row.pages, known, drawn=True))
        states = self._compute(stretches)[: len(paths)]
        if fresh:
            rows = [row for group in first.values() for row in group]
            sizes = torch.tensor([len(group) for group in first.values()], device=self.device)
            logits = self.runner.logits(states).repeat_interleave(sizes, 0)
            state = start_state(rows, 1, self.vocab, self.device)
            draw_step(state, logits, rules, self.runner.impl)
            harvest(rows, state)

    def _compute(self, stretches: Sequence[prefill.Stretch]) -> Tensor:
        """The hidden state [S, D] of the last token of each stretch."""
        last: list[Tensor] = []
        for states, spans in prefill.run(self.runner, stretches):
            ends = [s.row + s.size - 1 for s in spans if s.first + s.size == len(s.stretch.tokens)]
            last.append(states[torch.tensor(ends, dtype=torch.int64, device=self.device)])
        return torch.cat(last) if last else torch.empty(0, device=self.device)

    def _burst(self, rows: Sequence[Row], rules: Rules) -> None:
        if not rows:
            return
        left = max(row.params.max_tokens - len(row.tokens) for row in rows)
        steps = min(steps_of(rows, self.steps), left)
        run = self._recorded_steps if self.device.type == "cuda" else self._plain_steps
        drawn = harvest(rows, run(rows, rules, steps))
        if drawn == 0:
            raise RuntimeError("a decoding step drew no token")

    def _plain_steps(self, rows: Sequence[Row], rules: Rules, steps: int) -> State:
        """Up to `steps` steps: a look costs nothing here, and rows that have ended cost time."""
        state = start_state(rows, steps, self.vocab, self.device)
        plan = decode_plan(rows, self.runner)
        for _ in range(steps):
            decode_step(self.runner, state, plan, rules)
            if not bool(state.alive.all()):
                break
        return state

    def _recorded_steps(self, rows: Sequence[Row], rules: Rules, steps: int) -> State:
        """`steps` steps in a row by CUDA graphs, without waiting for the device between them."""
        count = bucket(len(rows))
        state = start_state(rows, self.steps, self.vocab, self.device, count=count)
        plan = decode_plan(rows, self.runner, count=count, size=round_up)
        return self.graphs.run(state, plan, rules, steps)

    def _forget_old_weights(self) -> None:
        version = weights_version(self.model)
        if self._version is None or version.adapters != self._version.adapters:
            self.graphs.clear()  # an adapter that is on is another graph, a changed weight is not
        if version != self._version:
            self.forest.clear()
        self._version = version

    def _grow(self, pages: int) -> None:
        """Room for `pages` beside what is cached, within the limit."""
        memory = self.runner.memory
        cached = self.pool.size - self.pool.free
        wanted = min(self.max_pages, pages + cached)
        if wanted > memory.pages:
            # What is there is copied. On a CPU nothing is behind a page until it is written, so
            # that twice the pages cost no more, and many small calls copy little.
            spare = 2 * memory.pages if self.device.type == "cpu" else 0
            wanted = min(self.max_pages, max(wanted, spare))
            memory.resize(wanted)
            self.pool.grow(wanted)
