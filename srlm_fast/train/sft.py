"""Supervised fine-tuning on response tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from srlm_fast.config import TrainConfig
from srlm_fast.model.forward import lm_head
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.batches import Batch, Row, collate
from srlm_fast.train.checkpoint import checkpoints_of
from srlm_fast.train.evaluation import held_out_items, held_out_means
from srlm_fast.train.fit import fit
from srlm_fast.train.layout import choose_layout
from srlm_fast.train.metrics import Log, Micro
from srlm_fast.train.plan import MicroBatches, longest_row, plan_steps, usable_items
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
    eval_rows: Sequence[Row] = (),
    checkpoint: Path | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains `model` in place on rows of (prompt ids, response ids).

    The loss of a step is the mean negative log-likelihood over all response tokens of the step
    (nats); prompt tokens carry none. `log` gets `fit`'s metrics, and with `config.eval_steps` the
    eval_loss of the usable `eval_rows`, a mean over their tokens.
    checkpoint: the folder for `config.save_steps`; called again with the same arguments, start
    weights included, a training that was stopped goes on. For `ranks` see `fit`.
    Returns `fit`'s summary, `rows` trained on, `dropped` by reason, and `eval_dropped` where there
    is an evaluation. Raises UserError when no row is left or training diverges.
    """
    max_length = longest_row(model, config)
    items = [((prompt, response),) for prompt, response in (*rows, *eval_rows)]
    kept, dropped = usable_items(items[: len(rows)], max_length)
    held_out, eval_dropped = held_out_items(items, len(rows), config, max_length)
    device, layout = next(model.parameters()).device, choose_layout(model, config)
    plan = plan_steps(kept, config, seed)

    def forward(indices: Sequence[int]) -> tuple[Tensor, Batch]:
        """The log-probs of the response tokens."""
        batch = collate([items[i][0] for i in indices], pad_id=pad_id, layout=layout, device=device)
        head = lm_head(model)
        return linear_logp(
            batch.states(model), head.weight, batch.target, rows=batch.rows, bias=head.bias,
            softcap=head.softcap, logit_scale=head.logit_scale,
        ).logp, batch  # fmt: skip

    def step_function(
        step: int, step_items: Sequence[int], micros: Sequence[Sequence[int]]
    ) -> Iterator[Micro]:
        num_targets = sum(len(items[i][0][1]) for i in step_items)
        for indices in micros:
            logp, batch = forward(indices)
            yield Micro(-logp.sum() / num_targets, len(batch.target), batch.num_tokens)

    def sums(indices: Sequence[int]) -> tuple[int, dict[str, Tensor]]:
        logp, batch = forward(indices)
        return len(batch.target), {"loss": -logp.sum()}

    with placed(config, ranks, model) as (ranks, (model,)):
        micro_batches = MicroBatches(items, config, layout, ranks, checkpoint)

        def evaluate() -> dict[str, float]:
            return held_out_means(model, held_out, micro_batches, sums, ranks)

        summary = fit(
            model, config, plan, micro_batches, step_function, log=log, name="sft", ranks=ranks,
            evaluate=evaluate if held_out else None, seed=seed,
            checkpoints=checkpoints_of(
                checkpoint, config, items, [model], "sft", len(rows), seed, ranks=ranks
            ),
        )  # fmt: skip
    summary |= {"rows": len(kept), "dropped": dict(dropped)}
    return summary | ({"eval_dropped": eval_dropped} if held_out else {})
