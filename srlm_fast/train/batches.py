"""Token-id rows as one forward's input, and where in it the loss falls.

A row is (prompt ids, response ids). Ids are trained on as they are: no EOS is added, none is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from typing import Any, Literal

import torch
from torch import Tensor

from srlm_fast.model.forward import hidden_states
from srlm_fast.model.prefix import packed_states
from srlm_kernels import PrefixPlan

Row = tuple[Sequence[int], Sequence[int]]
Layout = Literal["shared", "padded"]


@dataclass(frozen=True)
class Batch:
    """One forward's input, and where in its hidden states the responses are predicted.

    input_ids, position_ids: int64, [B, S] padded on the right, or [1, T] packed as `plan` says.
        There is no attention mask: no token sees the padding on its right. (A mask would do harm:
        padding beyond a sliding window sees nothing, and a softmax over nothing is NaN.)
    rows: [N] int64, index into the flattened hidden states of the position that predicts each
        response token; the first one is predicted by the last prompt token, which responses that
        share a prompt have in common.
    target: [N] int64, the response tokens, sequence after sequence.
    cu_seqlens: [sequences + 1] int32, where each sequence's targets begin and end in [N]. On the
        host, where the loss cuts its chunks by them: from a device they would be waited for.
    num_tokens: prompt and response tokens that are computed, padding not counted.
    plan: of the packed tokens; None: the batch is padded.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    target: Tensor
    cu_seqlens: Tensor
    num_tokens: int
    plan: PrefixPlan | None = None

    def states(self, model: Any) -> Tensor:
        """The last hidden states of `model`, [B * S, D]; `rows` counts along them."""
        if self.plan is None:
            return hidden_states(model, self.input_ids, position_ids=self.position_ids).flatten(
                0, 1
            )
        return packed_states(model, self.input_ids, self.position_ids, self.plan)[0]


def collate(
    rows: Sequence[Row],
    *,
    pad_id: int,
    layout: Layout = "padded",
    device: torch.device | str = "cpu",
) -> Batch:
    """The batch of `rows`, in their order; every prompt must have at least one token.

    With "shared" nothing is padded, and neighbouring rows with the same prompt compute it once.
    Of no rows at all it is one token of padding, which predicts nothing.
    """
    if not rows:
        batch = collate([([pad_id], [])], pad_id=pad_id, layout=layout, device=device)
        return replace(batch, rows=batch.rows[:0], cu_seqlens=batch.cu_seqlens[:1], num_tokens=0)
    groups = [[row] for row in rows]
    if layout == "shared":
        groups = [list(group) for _, group in groupby(rows, lambda row: tuple(row[0]))]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    for group in groups:
        prompt = group[0][0]
        last = len(ids) + len(prompt) - 1
        ids.extend(prompt)
        positions.extend(range(len(prompt)))
        for _, response in group:
            if response:
                predicting += [last, *range(len(ids), len(ids) + len(response) - 1)]
            ids.extend(response)
            positions.extend(range(len(prompt), len(prompt) + len(response)))
        if layout == "padded":
            ids.extend([pad_id] * (-len(ids) % width))
    tensor = partial(on_device, device=torch.device(device))
    shape = (1, len(ids)) if layout == "shared" else (len(rows), width)
    return Batch(
        input_ids=tensor(ids).view(shape),
        position_ids=tensor(positions)[None] if layout == "shared" else _counted(shape, device),
        rows=tensor(predicting),
        target=tensor([token for _, response in rows for token in response]),
        cu_seqlens=torch.tensor([0, *accumulate(len(r) for _, r in rows)], dtype=torch.int32),
        num_tokens=len(positions),
        plan=_plan(groups) if layout == "shared" else None,
    )


def _plan(groups: Sequence[Sequence[Row]]) -> PrefixPlan:
    """A row with nobody to share its prompt is one causal stretch, which is less work."""
    lengths = []
    for group in groups:
        prompt = len(group[0][0])
        responses = [len(response) for _, response in group if response]
        lengths.append((prompt, responses) if len(responses) > 1 else (prompt + sum(responses), []))
    return PrefixPlan.of(lengths)


def _counted(shape: tuple[int, int], device: torch.device | str) -> Tensor:
    return torch.arange(shape[1], device=device).expand(shape)


def on_device(
    values: Sequence[float], *, device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """[len(values)], copied without waiting for the device."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()  # an unpinned copy would wait for the device
    return host.to(device, non_blocking=True)
