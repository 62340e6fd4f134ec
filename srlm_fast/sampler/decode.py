"""Decoding: one token a row and step, several steps between two looks of the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.sampler.params import SamplingParams
from srlm_fast.sampler.plan import PlanBuilder, decode_items
from srlm_fast.sampler.rows import Row
from srlm_fast.sampler.runner import Runner
from srlm_kernels import Draw, SampleParams, sample
from srlm_kernels.tree_attention import PAGE, TreePlan

STEPS = 16  # of a burst, at most


@dataclass(frozen=True)
class Rules:
    """What all rows of a run share: ids that end a row [V] bool, and a bias [V] on the logits."""

    is_stop: Tensor
    bias: Tensor | None


@dataclass
class State:
    """R rows on the device; every tensor is changed in place, step by step.

    `token` is the last one drawn, to be fed at `position`; `step` counts the tokens drawn. A row
    that is not `alive` any more stands still. Step k writes row k of the outputs.
    """

    token: Tensor  # [R] int64, as are position, step, seed and limit
    position: Tensor
    step: Tensor
    seed: Tensor
    limit: Tensor  # most tokens a row may draw
    alive: Tensor  # [R] bool
    pages: Tensor  # [R, more than a row has] int64, -1 behind the last
    first_page: Tensor  # [R] int64: which page of the row the first of these is
    params: SampleParams
    seen: Tensor | None  # [R, V] bool
    allowed: Tensor | None  # [R, V] bool, the tokens that may be drawn in the first step
    cursor: Tensor  # [1] int64
    tokens_out: Tensor  # [K, R] int64
    alive_out: Tensor  # [K, R] bool: the row still was, when it drew this token
    numbers_out: Tensor  # [K, 3, R] float32


def start_state(
    rows: Sequence[Row], steps: int, vocab: int, device: torch.device, *, count: int = 0
) -> State:
    """The state of `rows` before a burst of `steps`: after their last tokens, or before a first one
    from the prompt's logits. Rows that have ended are not alive, nor are those that fill it up to
    `count`."""
    count = max(count, len(rows))
    numbers = [
        (
            row.tokens[-1] if row.tokens else 0,
            len(row.prompt) + len(row.tokens) - 1,
            len(row.tokens),
            row.seed,
            row.params.max_tokens,
            len(row.prompt) // PAGE,
            int(not row.ended),
        )
        for row in rows
    ]
    numbers += [(0,) * 7] * (count - len(rows))
    vectors = torch.tensor(numbers).T.contiguous().to(device)
    token, position, step, seed, limit, first_page, alive = vectors
    return State(
        token, position, step, seed, limit,
        alive=alive.bool(),
        pages=_page_table(rows, count).to(device),
        first_page=first_page,
        params=sample_params(rows, count, device),
        seen=_seen(rows, count, vocab, device),
        allowed=_allowed(rows, count, vocab, device),
        cursor=torch.zeros(1, dtype=torch.int64, device=device),
        tokens_out=torch.zeros(steps, count, dtype=torch.int64, device=device),
        alive_out=torch.zeros(steps, count, dtype=torch.bool, device=device),
        numbers_out=torch.zeros(steps, 3, count, dtype=torch.float32, device=device),
    )  # fmt: skip


def decode_plan(
    rows: Sequence[Row], runner: Runner, *, count: int = 0, size: Callable[[int], int] = int
) -> TreePlan:
    """Who reads which pages while `rows` decode; it holds as long as no row changes its pages.
    `count` is that of `start_state`, `size` that of `PlanBuilder.build`."""
    builder = PlanBuilder(runner.group)
    decode_items(builder, ((row.path, row.pages, len(row.prompt)) for row in rows))
    return builder.build(max(count, len(rows)), runner.device, size)


def decode_step(runner: Runner, state: State, plan: TreePlan, rules: Rules) -> None:
    """Every row that is alive draws a token. No host synchronisation, nothing but `state` changes:
    a CUDA graph can hold it."""
    column = (state.position // PAGE - state.first_page).clamp_(max=state.pages.shape[1] - 1)
    page = state.pages.gather(1, column[:, None])[:, 0]
    slot = page * PAGE + state.position % PAGE  # negative where the row has no page
    hidden = runner.forward(state.token, state.position, slot, plan)
    draw_step(state, runner.logits(hidden), rules, runner.impl)


def draw_step(state: State, logits: Tensor, rules: Rules, impl: str = "auto") -> None:
    """The part of a step after the logits [R, V]; `impl` is that of `sample`."""
    masked = logits if state.allowed is None else logits.masked_fill(~state.allowed, -torch.inf)
    draw: Draw = sample(
        masked, state.seed, state.step, state.params,
        bias=rules.bias, seen=state.seen, is_stop=rules.is_stop, impl=impl,
    )  # fmt: skip
    logprob = draw.logprob
    if state.allowed is not None:  # the model's own counts what was not allowed too
        logprob = logits.log_softmax(-1).gather(1, draw.token[:, None])[:, 0]
    numbers = torch.stack([logprob, draw.sample_logprob, draw.kept_mass])
    state.tokens_out.index_copy_(0, state.cursor, draw.token[None])
    state.alive_out.index_copy_(0, state.cursor, state.alive[None])
    state.numbers_out.index_copy_(0, state.cursor, numbers[None])
    state.cursor += 1
    if state.seen is not None:
        state.seen.scatter_(1, draw.token[:, None], True)
    state.token.copy_(torch.where(state.alive, draw.token, state.token))
    state.position += state.alive
    state.step += state.alive
    state.alive &= ~draw.stopped & (state.step < state.limit)


def harvest(rows: Sequence[Row], state: State) -> int:
    """Appends what the steps drew to the rows, marks those that ended, and counts the tokens.

    Raises UserError where a row had nothing to draw from.
    """
    tokens = state.tokens_out.T.tolist()
    kept, drew = state.numbers_out.cpu(), state.alive_out.cpu()
    if bool((kept[:, 2].isnan() & drew).any()):
        raise UserError(
            "a row had no token to draw: the model's logits are not finite, as after a training"
            " that diverged, or logit_bias, allowed and min_tokens leave none; check those"
        )
    numbers = kept.permute(2, 0, 1).tolist()
    counts = drew.sum(0).tolist()
    alive = state.alive.tolist()
    for i, row in enumerate(rows):
        row.tokens += tokens[i][: counts[i]]
        row.numbers += numbers[i][: counts[i]]
        row.ended = not alive[i] or row.stops.found(row.tokens, counts[i])
    return sum(counts[: len(rows)])


def sample_params(rows: Sequence[Row], count: int, device: torch.device) -> SampleParams:
    """The parameters of `rows` and of `count` in all as vectors; None: off in all of them."""
    params = [row.params for row in rows]
    params += [SamplingParams()] * (count - len(rows))

    def vector(values: list[float], off: float, dtype: torch.dtype) -> Tensor | None:
        if all(value == off for value in values):
            return None
        return torch.tensor(values, dtype=dtype).to(device)

    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32)
    return SampleParams(
        temperature=temperature.to(device),
        top_k=vector([max(0, p.top_k) for p in params], 0, torch.int32),
        top_p=vector([p.top_p for p in params], 1, torch.float32),
        min_p=vector([p.min_p for p in params], 0, torch.float32),
        repetition_penalty=vector([p.repetition_penalty for p in params], 1, torch.float32),
        min_tokens=vector([p.min_tokens for p in params], 0, torch.int32),
    )


def steps_of(rows: Sequence[Row], steps: int) -> int:
    """Of a burst, `steps` at most: what is allowed is known for one step only."""
    return 1 if any(row.params.allowed for row in rows) else steps


def _page_table(rows: Sequence[Row], count: int) -> Tensor:
    width = 1 << max(len(row.pages) for row in rows).bit_length()  # more than any row has
    table = [[*row.pages, *[-1] * (width - len(row.pages))] for row in rows]
    return torch.tensor(table + [[-1] * width] * (count - len(rows)))


def _seen(rows: Sequence[Row], count: int, vocab: int, device: torch.device) -> Tensor | None:
    if all(row.params.repetition_penalty == 1 for row in rows):
        return None
    seen = torch.zeros(count, vocab, dtype=torch.bool)
    for mark, row in zip(seen, rows, strict=False):
        mark[[*row.prompt, *row.tokens]] = True
    return seen.to(device)


def _allowed(rows: Sequence[Row], count: int, vocab: int, device: torch.device) -> Tensor | None:
    if all(row.params.allowed is None for row in rows):
        return None
    allowed = torch.ones(count, vocab, dtype=torch.bool)
    for mark, row in zip(allowed, rows, strict=False):
        if row.params.allowed is None or row.ended:
            continue
        found = row.params.allowed(row.tokens)
        if found.shape != (vocab,) or found.dtype != torch.bool:
            raise UserError(
                f"SamplingParams.allowed must return bool [{vocab}], got {found.dtype}"
                f" {list(found.shape)}"
            )
        mark.copy_(found)
    return allowed.to(device)
