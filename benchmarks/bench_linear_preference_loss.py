"""DPO and SPA from hidden states to gradients: policy forward and backward, reference forward.

python -m benchmarks --suite cpu --only linear_preference_loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import srlm_kernels
from benchmarks import baselines, pair_batch, shapes
from benchmarks.baselines import Peer
from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, optional
from benchmarks.pair_batch import IGNORED, PairBatch, Shape
from srlm_kernels.losses import PairLogps, dpo, spa

BETA, ALPHA, EXTRAPOLATION = 0.1, 0.1, 0.5
LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo(BETA),
    "spa": spa(BETA, alpha=ALPHA, threshold=0.0),
}

_BASELINES = {
    "cpu": (
        "GEMMs alone",
        "cut-cross-entropy, compiled",
        "full logits",
        "full logits, SPA",
        "ours, chunked",
    ),
    "cuda": ("GEMMs alone", "TRL", "Liger, compiled", "full logits, SPA", "ours, chunked"),
}


def cases(suite: str) -> Iterator[Case]:
    for label, shape, dtype, device in shapes.of_suite(suite):
        yield _case(label, shape, dtype, device)


def _case(label: str, shape: Shape, dtype: str, device: str) -> Case:
    torch_dtype: torch.dtype = getattr(torch, dtype)
    return Case(
        op="linear_preference_loss",
        name=f"{label}, {dtype}",
        params={"losses": "dpo and spa", **shape.params(dtype, device)},
        make_inputs=partial(pair_batch.make, shape, torch_dtype, device),
        variants=_variants(device),
        oracle=_oracle,
        tolerance=shapes.TOLERANCE[dtype],
        work=shape.work(4, torch_dtype.itemsize),
        baselines=_BASELINES[device],
    )


def _variants(device: str) -> dict[str, Variant]:
    peers = {
        name: Variant(partial(_dpo_of, peer), "dpo", compiles="compiled" in name)
        for name, peer in baselines.of_device(device).items()
    }
    ours = {
        f"ours, {impl}" + (", SPA" if loss == "spa" else ""): Variant(
            partial(_ours, impl, loss), loss
        )
        for impl in ("reference", "chunked")
        for loss in LOSSES
    }
    return {
        "GEMMs alone": Variant(partial(baselines.gemms, products=4), None),
        **peers,
        "Liger": Variant(partial(_liger, False), "dpo"),
        "Liger, compiled": Variant(partial(_liger, True), "dpo", compiles=True),
        "full logits, SPA": Variant(_full_logits_spa, "spa"),
        **ours,
    }


def _ours(impl: str, loss: str, batch: PairBatch) -> Call:
    def compute(rows: slice, cu_seqlens: Tensor) -> srlm_kernels.PreferenceLoss:
        return srlm_kernels.linear_preference_loss(
            batch.hidden, batch.weight, batch.target[rows], cu_seqlens, LOSSES[loss],
            rows=batch.rows[rows], ref_hidden=batch.ref_hidden, ref_weight=batch.ref_weight,
            extrapolation=EXTRAPOLATION if loss == "spa" else None, impl=impl,
        )  # fmt: skip

    try:
        compute(slice(1), batch.cu_seqlens.new_tensor([0, 1, 1]))
    except ValueError as error:  # the op's own words on what it refuses
        raise Unavailable(str(error)) from error

    def call() -> Outputs:
        found = compute(slice(None), batch.cu_seqlens)
        extrapolated = found.extrapolated_logp if loss == "spa" else None
        return _with_gradients(batch, found.loss, extrapolated)

    return call


def _dpo_of(peer: Peer, batch: PairBatch) -> Call:
    """DPO on a peer's log-probabilities, policy first, as trainers do."""
    token_logp = peer(batch)

    def call() -> Outputs:
        logp = _sums(batch, token_logp(batch.hidden, batch.weight))
        with torch.no_grad():
            ref_logp = _sums(batch, token_logp(batch.ref_hidden, batch.ref_weight))
        return _with_gradients(batch, -logsigmoid(BETA * _margins(logp - ref_logp)).mean())

    return call


def _liger(compiled: bool, batch: PairBatch) -> Call:
    """Liger's fused DPO loss, which takes the padded rectangle: chosen sequences, then rejected."""
    loss_class = optional("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
    loss_fn = loss_class(ignore_index=IGNORED, beta=BETA, compiled=compiled)
    target = batch.padded_target.view(-1, batch.length)
    shape = (*target.shape, batch.hidden.shape[1])

    def call() -> Outputs:
        loss, _ = loss_fn(
            batch.weight, batch.hidden.view(shape), target,
            ref_input=batch.ref_hidden.view(shape), ref_weight=batch.ref_weight,
        )  # fmt: skip
        return _with_gradients(batch, loss)

    return call


def _full_logits_spa(batch: PairBatch) -> Call:
    streams = baselines.full_logits_extrapolated(batch, EXTRAPOLATION)

    def call() -> Outputs:
        logp, ref_logp, mixed_logp = (_sums(batch, stream) for stream in streams())
        x = BETA * _margins(logp - ref_logp)
        trusted = BETA * _margins(mixed_logp - ref_logp) > 0
        w = 1 - ALPHA + ALPHA * trusted
        loss = (-w * logsigmoid(x) - (1 - w) * logsigmoid(-x)).mean()
        return _with_gradients(batch, loss, mixed_logp)

    return call


def _sums(batch: PairBatch, logp: Tensor) -> Tensor:
    """Per packed sequence, [2P]."""
    sequences = len(batch.cu_seqlens) - 1
    return logp.new_zeros(sequences).index_add(0, batch.sequence, logp)


def _margins(log_ratios: Tensor) -> Tensor:
    return log_ratios[0::2] - log_ratios[1::2]


def _with_gradients(
    batch: PairBatch, loss: Tensor, extrapolated_logp: Tensor | None = None
) -> Outputs:
    grad_hidden, grad_weight = torch.autograd.grad(loss, (batch.hidden, batch.weight))
    outputs = {"loss": loss.detach(), "grad_hidden": grad_hidden, "grad_weight": grad_weight}
    return outputs if extrapolated_logp is None else outputs | {"extrapolated": extrapolated_logp}


def _oracle(batch: PairBatch, computes: str) -> Outputs:
    outputs: dict[str, Tensor] = {}

    def slopes(logp: Tensor, ref_logp: Tensor, extrapolated_logp: Tensor | None = None) -> Tensor:
        logp.requires_grad_()
        sums = [
            _sums(batch, t)
            for t in (logp, ref_logp, logp if extrapolated_logp is None else extrapolated_logp)
        ]
        lengths = batch.cu_seqlens.diff().to(logp.device)
        pairs = PairLogps(*(t[half::2] for t in (*sums, lengths) for half in (0, 1)))
        loss = LOSSES[computes](pairs).mean()
        outputs["loss"] = loss.detach()
        if extrapolated_logp is not None:
            outputs["extrapolated"] = sums[2]
        return torch.autograd.grad(loss, logp)[0]

    found = pair_batch.oracle(batch, EXTRAPOLATION if computes == "spa" else None, slopes)
    return outputs | {name: found[name] for name in ("grad_hidden", "grad_weight")}
