"""`DPOTrainer`'s metrics, kept on the device until they are logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srlm_fast.integrations.trl.packed import Packed
from srlm_kernels import PreferenceLoss

# name: (sum, count) among the columns of `_sums`.
RATIOS = {
    "entropy": ("entropy", "tokens"),
    "logits/chosen": ("chosen logits", "chosen tokens"),
    "logits/rejected": ("rejected logits", "rejected tokens"),
    "mean_token_accuracy": ("top1", "chosen tokens"),
    "rewards/chosen": ("chosen rewards", "pairs"),
    "rewards/rejected": ("rejected rewards", "pairs"),
    "rewards/accuracies": ("wins", "pairs"),
    "rewards/margins": ("margins", "pairs"),
    "logps/chosen": ("chosen logps", "pairs"),
    "logps/rejected": ("rejected logps", "pairs"),
}


# What TRL sums by tokens; the others are of pairs.
BY_TOKEN = {name for both in RATIOS.values() if "pairs" not in both for name in both}
BY_TOKEN |= {"padded tokens"}


class PairMetrics:
    """Sums of micro-batches; nothing waits for the device before `read`."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Tensor]] = []

    def add(
        self,
        result: PreferenceLoss,
        packed: Packed,
        beta: float,
        noise: dict[str, Tensor] | None,
        repeated: bool = False,
    ) -> None:
        """One micro-batch; `noise` are SPA's metrics, summed over its pairs.

        repeated: its rows are those of another process, which TRL leaves out where it counts tokens
            but not where it counts pairs.
        """
        row = _sums(result, packed, beta)
        if repeated:
            row |= {name: torch.zeros_like(row[name]) for name in BY_TOKEN}
        self._rows.append(row | {name: value.detach() for name, value in (noise or {}).items()})

    def read(self, accelerator: Any) -> list[dict[str, float]]:
        """TRL's metrics of each micro-batch over all processes, and `num_tokens` of its own."""
        rows, self._rows = self._rows, []
        if not rows:
            return []
        names = list(rows[0])
        table = torch.stack([torch.stack([row[n].double() for n in names]) for row in rows])
        found = []
        for values in accelerator.reduce(table, reduction="sum").tolist():
            sums = dict(zip(names, values, strict=True))
            row = {k: sums[a] / sums[b] if sums[b] else 0.0 for k, (a, b) in RATIOS.items()}
            row |= {k: v / sums["pairs"] for k, v in sums.items() if k.startswith("spa/")}
            found.append(row | {"num_tokens": sums["padded tokens"]})
        return found


@torch.no_grad()
def _sums(result: PreferenceLoss, packed: Packed, beta: float) -> dict[str, Tensor]:
    assert result.entropy is not None and result.mean_logit is not None
    assert result.is_top1 is not None
    pairs = len(result.margins)
    lengths = packed.cu_seqlens.diff().to(packed.target.device, non_blocking=True)
    side = torch.arange(2 * pairs, device=lengths.device) % 2
    chosen = side.repeat_interleave(lengths, output_size=len(packed.target)) == 0
    rewards = beta * (result.logp - result.ref_logp).view(-1, 2)

    def count(number: int) -> Tensor:
        return torch.full((), number, device=lengths.device)

    return {
        "entropy": result.entropy.sum(),
        "tokens": count(len(packed.target)),
        "chosen logits": (result.mean_logit * chosen).sum(),
        "chosen tokens": chosen.sum(),
        "rejected logits": (result.mean_logit * ~chosen).sum(),
        "rejected tokens": (~chosen).sum(),
        "top1": (result.is_top1 & chosen).sum(),
        "chosen rewards": rewards[:, 0].sum(),
        "rejected rewards": rewards[:, 1].sum(),
        "wins": (rewards[:, 0] > rewards[:, 1]).sum(),
        "margins": (rewards[:, 0] - rewards[:, 1]).sum(),
        "chosen logps": result.logp[0::2].sum(),
        "rejected logps": result.logp[1::2].sum(),
        "pairs": count(pairs),
        "padded tokens": count(packed.padded_tokens),
    }
