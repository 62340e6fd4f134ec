"""Preference training on pairs that the policy makes on the way (OAIF, arXiv 2402.04792)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from srlm_fast.config import PreferenceConfig
from srlm_fast.config.options import check_online_training
from srlm_fast.data.records import Pair
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.fit import fit
from srlm_fast.train.layout import choose_layout
from srlm_fast.train.loss import pair_loss
from srlm_fast.train.metrics import LateMeans, Log
from srlm_fast.train.moving import MovingReference
from srlm_fast.train.noise import NoiseDetector, Refinement
from srlm_fast.train.plan import Item, MicroBatches, longest_row, sort_out
from srlm_fast.train.preference import PairForward, PreferenceSteps, late_summary, wide
from srlm_fast.train.reference import choose_reference

# The pairs of the step of that number (from 0), made with the model as it is then.
Draw = Callable[[int], Sequence[Pair]]


def train_online(
    model: Any,
    reference: Any,
    draw: Draw,
    steps: int,
    config: PreferenceConfig,
    *,
    refine: Refinement | None = None,
    num_pairs: int,
    seed: int,
    pad_id: int,
    log: Log,
    reference_is_start: bool = True,
    ranks: Ranks = ALONE,
) -> tuple[list[Pair], dict[str, Any]]:
    """`train_preference` on the pairs of `draw`, which is called before each of `steps` steps.

    A step trains on all its pairs at once, `config.per_device_train_batch_size` or not; where it
    has none that can be used it passes without an update. Several `ranks` must draw the same pairs.
    num_pairs: about how many there will be, of which `refine` takes a share for its window.
    Returns the pairs, and the summary of `train_preference` with the `empty_steps`; `flags` are as
    long as the pairs. Raises UserError for settings that need all pairs beforehand.
    """
    check_online_training(config, refine.tau if refine else None)
    drawn = _Drawn(draw, steps, longest_row(model, config))
    layout, lam = choose_layout(model, config), refine.lam if refine else None
    micro_batches = MicroBatches(drawn.items, config, layout, ranks)
    forward = PairForward(model, drawn.items, config, layout, pad_id, lam)
    compared = choose_reference(reference, config, [], forward.collate, None, ranks)
    like = torch.zeros((), device=model.device, dtype=wide(model.dtype))
    noise = NoiseDetector(
        refine, beta=config.beta, num_pairs=num_pairs, steps=steps, like=like, ranks=ranks
    ) if refine else None  # fmt: skip
    moving = MovingReference(reference, model, config, steps) if config.sync_ref_model else None
    late = LateMeans(3 * steps // 4, ranks)
    step_function = PreferenceSteps(
        forward, compared, pair_loss(config), (), micro_batches, noise, late, ranks,
        reference_is_start,
    )  # fmt: skip
    summary = fit(
        model, config, drawn, micro_batches, step_function, log=log, name="online", ranks=ranks,
        moving=moving, seed=seed,
    )  # fmt: skip
    summary |= {"pairs": drawn.used, "dropped": dict(drawn.dropped)}
    summary |= {"empty_steps": drawn.empty, **late_summary(late.means(), config.beta)}
    if noise:
        summary["flags"] = noise.flags(len(drawn.pairs))
    if moving:
        summary["reference_updates"] = steps // config.ref_model_sync_steps
    return drawn.pairs, summary


class _Drawn:
    """The steps of a training whose items are drawn when `fit` comes to them, once and in order."""

    def __init__(self, draw: Draw, steps: int, max_length: int) -> None:
        self._draw, self._steps, self._max_length = draw, steps, max_length
        self.pairs: list[Pair] = []
        self.items: list[Item] = []
        self.used = self.empty = 0
        self.dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> list[int]:
        pairs, start = self._draw(step), len(self.items)
        items = [((p.prompt_ids, p.chosen_ids), (p.prompt_ids, p.rejected_ids)) for p in pairs]
        kept, dropped = sort_out(items, self._max_length)
        self.pairs += pairs
        self.items += items
        self.dropped += dropped
        self.used += len(kept)
        self.empty += not kept
        return [start + index for index in kept]
