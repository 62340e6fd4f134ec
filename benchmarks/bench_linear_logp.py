"""Per-token log-probabilities of policy and reference, with per-token gradients and without.

python -m benchmarks --suite cpu --only linear_logp
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import srlm_kernels
from benchmarks import baselines, pair_batch, shapes
from benchmarks.baselines import Peer
from benchmarks.case import Call, Case, Outputs, Unavailable, Variant
from benchmarks.pair_batch import PairBatch, Shape

EXTRAPOLATION = 0.5


def cases(suite: str) -> Iterator[Case]:
    for label, shape, dtype, device in shapes.of_suite(suite):
        for kind in ("score", "gradient"):
            yield _case(kind, label, shape, dtype, device)


def _case(kind: str, label: str, shape: Shape, dtype: str, device: str) -> Case:
    gradient = kind == "gradient"
    torch_dtype: torch.dtype = getattr(torch, dtype)
    return Case(
        op="linear_logp",
        name=f"{kind}, {label}, {dtype}",
        params={"kind": kind, **shape.params(dtype, device)},
        make_inputs=partial(pair_batch.make, shape, torch_dtype, device),
        variants=_gradient_variants(device) if gradient else _score_variants(device),
        oracle=_oracle,
        tolerance=shapes.TOLERANCE[dtype],
        work=shape.work(4 if gradient else 2, torch_dtype.itemsize),
        baselines=(
            "GEMMs alone", "cut-cross-entropy, compiled", "full logits",
            "full logits, extrapolated", "ours, chunked",
        ),
    )  # fmt: skip


def _gradient_variants(device: str) -> dict[str, Variant]:
    ours = {
        f"ours, {impl}": Variant(partial(_ours_gradient, impl), "gradient")
        for impl in ("reference", "chunked")
    }
    peers = {
        name: Variant(partial(_peer_gradient, peer), "gradient", compiles="compiled" in name)
        for name, peer in baselines.of_device(device).items()
    }
    return {"GEMMs alone": Variant(partial(baselines.gemms, products=4), None), **peers, **ours}


def _score_variants(device: str) -> dict[str, Variant]:
    peers = {
        name: Variant(partial(_peer_score, peer), "score", compiles="compiled" in name)
        for name, peer in baselines.of_device(device).items()
    }
    impls = ("reference", "chunked") + (("tiled",) if device == "cuda" else ())
    ours = {f"ours, {i}": Variant(partial(_ours_score, i, None), "score") for i in impls}
    extrapolated = {
        f"ours, {i}, extrapolated": Variant(partial(_ours_score, i, EXTRAPOLATION), "extrapolated")
        for i in impls
    }
    official = Variant(_full_logits_extrapolated, "extrapolated")
    bound = Variant(partial(baselines.gemms, products=2), None)
    return {
        "GEMMs alone": bound,
        **peers,
        "full logits, extrapolated": official,
        **ours,
        **extrapolated,
    }


def _ours(
    impl: str, batch: PairBatch, extrapolation: float | None = None, rows: slice = slice(None)
) -> srlm_kernels.LinearLogp:
    return srlm_kernels.linear_logp(
        batch.hidden, batch.weight, batch.target[rows], rows=batch.rows[rows],
        ref_hidden=batch.ref_hidden, ref_weight=batch.ref_weight,
        extrapolation=extrapolation, impl=impl,
    )  # fmt: skip


def _check_impl(impl: str, batch: PairBatch) -> None:
    """Raises Unavailable with the op's own words where it refuses `impl` here."""
    try:
        _ours(impl, batch, rows=slice(1))
    except ValueError as error:
        raise Unavailable(str(error)) from error


def _ours_gradient(impl: str, batch: PairBatch) -> Call:
    _check_impl(impl, batch)

    def call() -> Outputs:
        found = _ours(impl, batch)
        assert found.ref_logp is not None
        return _with_gradients(batch, found.logp, found.ref_logp)

    return call


def _peer_gradient(peer: Peer, batch: PairBatch) -> Call:
    token_logp = peer(batch)

    def call() -> Outputs:
        logp = token_logp(batch.hidden, batch.weight)
        with torch.no_grad():
            ref_logp = token_logp(batch.ref_hidden, batch.ref_weight)
        return _with_gradients(batch, logp, ref_logp)

    return call


def _with_gradients(batch: PairBatch, logp: Tensor, ref_logp: Tensor) -> Outputs:
    grads = torch.autograd.grad(logp, (batch.hidden, batch.weight), batch.upstream)
    names = ("grad_hidden", "grad_weight")
    return {"logp": logp.detach(), "ref_logp": ref_logp, **dict(zip(names, grads, strict=True))}


def _ours_score(impl: str, extrapolation: float | None, batch: PairBatch) -> Call:
    _check_impl(impl, batch)

    @torch.no_grad()
    def call() -> Outputs:
        found = _ours(impl, batch, extrapolation)
        outputs = {"logp": found.logp, "ref_logp": found.ref_logp}
        if extrapolation is not None:
            outputs["extrapolated_logp"] = found.extrapolated_logp
        return {name: value for name, value in outputs.items() if value is not None}

    return call


def _peer_score(peer: Peer, batch: PairBatch) -> Call:
    token_logp = peer(batch)

    @torch.no_grad()
    def call() -> Outputs:
        return {
            "logp": token_logp(batch.hidden, batch.weight),
            "ref_logp": token_logp(batch.ref_hidden, batch.ref_weight),
        }

    return call


def _full_logits_extrapolated(batch: PairBatch) -> Call:
    streams = baselines.full_logits_extrapolated(batch, EXTRAPOLATION)

    @torch.no_grad()
    def call() -> Outputs:
        return dict(zip(("logp", "ref_logp", "extrapolated_logp"), streams(), strict=True))

    return call


def _oracle(batch: PairBatch, computes: str) -> Outputs:
    if computes == "gradient":
        return pair_batch.oracle(batch, slopes=lambda *_: batch.upstream.double())
    return pair_batch.oracle(batch, EXTRAPOLATION if computes == "extrapolated" else None)
