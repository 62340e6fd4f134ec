"""Teacher-forced log-probabilities: each prompt is computed once for all its completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from srlm_fast.sampler.batching import max_rows
from srlm_fast.sampler.forest import Node
from srlm_fast.sampler.pool import OutOfPages
from srlm_fast.sampler.prefill import PASS_TOKENS, Span, Stretch, own_stretch, prompt_stretch, run
from srlm_fast.sampler.rows import own_pages
from srlm_kernels import linear_logp

if TYPE_CHECKING:
    from srlm_fast.sampler.paged import PagedEngine

Ids = Sequence[int]
Groups = Sequence[Sequence[Ids]]  # the completions of each prompt
Scores = list[list[Tensor]]


@dataclass
class _Batch:
    """Completions that are computed together, and the pages they hold meanwhile.

    `wanted` of a stretch: which of its tokens predict which target, and the place of the result.
    """

    stretches: list[Stretch] = field(default_factory=list)
    wanted: list[np.ndarray] = field(default_factory=list)  # [3, W] of each stretch
    places: list[tuple[int, int, int]] = field(default_factory=list)  # prompt, completion, tokens
    paths: list[Sequence[Node]] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    tokens: int = 0
    results: int = 0


def score(engine: PagedEngine, prompts: Sequence[Ids], completions: Groups, bar: Any) -> Scores:
    """See `Sampler.score`. Call inside the engine's `phase`."""
    scores = [[torch.empty(0, dtype=torch.float32) for _ in group] for group in completions]
    for batch in _batches(engine, prompts, completions):
        flat = torch.empty(batch.results, dtype=torch.float32, device=engine.device)
        for states, spans in run(engine.runner, batch.stretches):
            _fill(engine, flat, states, spans, batch)
        parts = torch.split(flat.cpu(), [size for _, _, size in batch.places])
        for (p, c, _), logps in zip(batch.places, parts, strict=True):
            scores[p][c] = logps.clone()  # not a view of the whole batch
        bar.update(batch.results)
        for path in batch.paths:
            engine.forest.release(path)
        engine.pool.give(batch.pages)
    return scores


def next_logprobs(engine: PagedEngine, prompts: Sequence[Ids], token_ids: Ids) -> Tensor:
    """[P, K] log-probs of `token_ids` after each prompt. Call inside the engine's `phase`."""
    wanted = torch.tensor(list(token_ids), dtype=torch.int64, device=engine.device)
    found: list[Tensor] = []
    while len(found) < len(prompts):
        paths: list[list[Node]] = []
        for prompt in prompts[len(found) :][: max_rows(engine.vocab)]:
            try:
                paths.append(engine.forest.take(prompt))
            except OutOfPages:
                break
        logits = engine.runner.logits(engine.prompt_states(paths))
        found += (logits[:, wanted] - logits.logsumexp(-1, keepdim=True)).cpu()
        for path in paths:
            engine.forest.release(path)
    return torch.stack(found)


def _batches(engine: PagedEngine, prompts: Sequence[Ids], completions: Groups) -> Iterator[_Batch]:
    """Batches of about PASS_TOKENS, or of what there are pages for."""
    batch = _Batch()
    for p, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        todo = [c for c, completion in enumerate(group) if len(completion)]
        while todo:
            taken = _add(engine, batch, p, prompt, [(c, group[c]) for c in todo])
            todo = todo[taken:]
            if (todo or batch.tokens >= PASS_TOKENS) and batch.places:
                yield batch
                batch = _Batch()
    if batch.places:
        yield batch


def _add(
    engine: PagedEngine, batch: _Batch, p: int, prompt: Ids, group: Sequence[tuple[int, Ids]]
) -> int:
    """Adds completions of a prompt while there are pages and room; says how many."""
    try:
        path = engine.forest.take(prompt)
    except OutOfPages:
        return 0
    firsts: list[tuple[int, int]] = []  # target and place of each completion's first token
    own: list[tuple[Stretch, np.ndarray]] = []
    tokens = 0
    for c, completion in group:
        if batch.tokens + tokens >= PASS_TOKENS:
            break
        known = completion[:-1]
        try:
            pages = engine.forest.take_pages(own_pages(len(prompt), len(known)))
        except OutOfPages:
            break
        batch.pages += pages
        firsts.append((completion[0], batch.results))
        if known:
            rest = np.arange(len(known))
            wanted = np.stack([rest, np.array(completion[1:]), batch.results + 1 + rest])
            own.append((own_stretch(path, pages, known, drawn=False), wanted))
        batch.places.append((p, c, len(completion)))
        batch.results += len(completion)
        tokens += len(completion)
    if not firsts:
        engine.forest.release(path)
        return 0
    start = prompt_stretch(path)
    targets, places = np.array(firsts).T
    last = np.full(len(firsts), len(start.tokens) - 1)
    for stretch, wanted in [(start, np.stack([last, targets, places])), *own]:
        batch.stretches.append(stretch)
        batch.wanted.append(wanted)
    batch.paths.append(path)
    batch.tokens += len(start.tokens) + tokens
    return len(firsts)


def _fill(
    engine: PagedEngine, flat: Tensor, states: Tensor, spans: Sequence[Span], batch: _Batch
) -> None:
    """Writes the log-probs that one pass gives to their places in `flat`."""
    wanted_of = {id(s): w for s, w in zip(batch.stretches, batch.wanted, strict=True)}
    parts = []
    for stretch, first, count, row in spans:
        local, target, place = wanted_of[id(stretch)]
        here = (local >= first) & (local < first + count)
        parts.append(np.stack([local[here] - first + row, target[here], place[here]]))
    rows, target, place = torch.from_numpy(np.concatenate(parts, 1)).to(engine.device)
    head = engine.runner.head
    flat[place] = linear_logp(
        states,
        head.weight,
        target,
        rows=rows,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        impl="reference" if engine.runner.impl == "torch" else "auto",
    ).logp.float()
