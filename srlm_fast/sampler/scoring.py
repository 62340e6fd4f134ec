"""Teacher-forced log-probabilities. Call inside `inference(model)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from srlm_fast.model.forward import Head, hidden_states, lm_head
from srlm_fast.sampler.batching import max_rows, plan
from srlm_kernels import linear_logp

_FORWARD_TOKENS = 8192


def score(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    progress: str = "",
) -> list[list[Tensor]]:
    """See `Sampler.score`."""
    rows = [
        (p, c)
        for p, group in enumerate(completions)
        for c, completion in enumerate(group)
        if len(completion)
    ]
    scores = [[torch.empty(0) for _ in group] for group in completions]
    head = lm_head(model)
    lengths = [len(prompts[p]) + len(completions[p][c]) for p, c in rows]
    bar = tqdm(total=sum(lengths), desc=progress, unit="tok", disable=None if progress else True)
    with bar:
        for batch in plan(lengths, rows=1, extra=0, tokens=_FORWARD_TOKENS, most=_FORWARD_TOKENS):
            where = [rows[i] for i in batch]
            pairs = [(prompts[p], completions[p][c]) for p, c in where]
            for (p, c), logps in zip(where, _score_batch(model, head, pairs), strict=True):
                scores[p][c] = logps
            bar.update(sum(lengths[i] for i in batch))
    return scores


def next_logprobs(model: Any, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
    """See `Sampler.next_logprobs`."""
    head = lm_head(model)
    device = head.weight.device
    wanted = torch.tensor(token_ids, dtype=torch.long, device=device)
    unique = list(dict.fromkeys(map(tuple, prompts)))
    found: dict[tuple[int, ...], Tensor] = {}
    most = max_rows(len(head.weight))
    lengths = [len(prompt) for prompt in unique]
    for batch in plan(lengths, rows=1, extra=0, tokens=_FORWARD_TOKENS, most=most):
        part = [unique[i] for i in batch]
        states = hidden_states(model, _right_padded(part).to(device))
        last = torch.tensor([len(prompt) - 1 for prompt in part], device=device)
        logits = head.logits(states[torch.arange(len(part), device=device), last])
        logps = logits[:, wanted] - logits.logsumexp(-1, keepdim=True)
        found.update(zip(part, logps.cpu(), strict=True))
    if not prompts:
        return torch.empty(0, len(token_ids))
    return torch.stack([found[tuple(prompt)] for prompt in prompts])


def _score_batch(
    model: Any, head: Head, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Tensor]:
    device = head.weight.device
    ids = _right_padded([[*prompt, *completion] for prompt, completion in pairs])
    width = ids.shape[1]
    rows = torch.cat(
        [
            torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1) + row * width
            for row, (prompt, completion) in enumerate(pairs)
        ]
    )
    states = hidden_states(model, ids.to(device)).flatten(0, 1)
    size = max_rows(len(head.weight))
    logp = torch.cat(
        [
            linear_logp(
                states,
                head.weight,
                ids.flatten()[part + 1].to(device),
                rows=part.to(device),
                bias=head.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            ).logp
            for part in torch.split(rows, size)
        ]
    )
    return list(torch.split(logp.float().cpu(), [len(completion) for _, completion in pairs]))


def _right_padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, S] ids, zero after each row's end: attention is causal, so no mask is needed."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
