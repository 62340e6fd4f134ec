"""Supervised fine-tuning on response tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from srlm_fast.config import TrainConfig
from srlm_fast.model.forward import lm_head
from srlm_fast.model.load import context_length
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.batches import Row, collate
from srlm_fast.train.fit import fit
from srlm_fast.train.layout import choose_layout
from srlm_fast.train.metrics import Log, Micro
from srlm_fast.train.plan import MicroBatches, plan_steps, usable_items
from srlm_fast.train.sharded import placed
from srlm_kernels import linear_logp


def train_sft(
    model: Any,
    rows: Sequence[Row],
    config: TrainConfig,
    *,
    seed: int,
    pad_id: int,
    log: Log,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains `model` in place on rows of (prompt ids, response ids).

    The loss of a step is the mean negative log-likelihood over all response tokens of the step
    (nats); prompt tokens carry none. `log` gets `fit`'s metrics; for `ranks` see `fit`.
    Returns `fit`'s summary, `rows` trained on and `dropped` by reason. Raises UserError when no row
    is left or training diverges.
    """
    items = [((prompt, response),) for prompt, response in rows]
    kept, dropped = usable_items(items, config.max_length or context_length(model))
    device, layout = next(model.parameters()).device, choose_layout(model, config)
    plan = plan_steps(kept, config, seed)

    def step_function(
        step: int, step_items: Sequence[int], micros: Sequence[Sequence[int]]
    ) -> Iterator[Micro]:
        num_targets = sum(len(rows[i][1]) for i in step_items)
        for indices in micros:
            batch = collate([rows[i] for i in indices], pad_id=pad_id, layout=layout, device=device)
            head = lm_head(model)
            logp = linear_logp(
                batch.states(model),
                head.weight,
                batch.target,
                rows=batch.rows,
                bias=head.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            ).logp
            yield Micro(-logp.sum() / num_targets, len(batch.target), batch.num_tokens)

    with placed(config, ranks, model) as (ranks, (model,)):
        micro_batches = MicroBatches(items, config, layout, ranks)
        summary = fit(
            model, config, plan, micro_batches, step_function, log=log, name="sft", ranks=ranks
        )
    return {**summary, "rows": len(kept), "dropped": dict(dropped)}
