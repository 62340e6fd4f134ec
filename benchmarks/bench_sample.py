"""Drawing one token per row of logits.

python -m benchmarks --suite cpu --only sample

Ours also give the two log-probabilities and the kept mass of what they draw; the others do not, and
draw from one random stream for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, Work, optional
from srlm_kernels.sample import SampleParams, sample, sample_ref

SHAPES = {
    "smoke": [(4, 61, "float32", "cpu")],
    "cpu": [(16, 32000, "float32", "cpu"), (16, 32000, "bfloat16", "cpu")],
    "gpu": [(16, 32000, "bfloat16", "cuda"), (256, 152064, "bfloat16", "cuda")],
}
CUTS = {"plain": {}, "top_p 0.9": {"top_p": 0.9}, "top_k 50": {"top_k": 50}}
IMPLEMENTATIONS = {"cpu": ("torch", "cpp"), "cuda": ("torch", "triton")}


@dataclass
class Rows:
    """Logits [R, V], the same parameters for each row, and which tokens may be drawn [R, V]."""

    logits: Tensor
    seed: Tensor
    params: SampleParams
    possible: Tensor
    kept_mass: Tensor

    def drawn(self, token: Tensor) -> Outputs:
        return {"possible": self.possible.gather(1, token[:, None])}


def cases(suite: str) -> Iterator[Case]:
    for rows, columns, dtype, device in SHAPES[suite]:
        for cut, limits in CUTS.items():
            ours = {
                f"ours, {i}": Variant(partial(_ours, i), computes="kept mass")
                for i in IMPLEMENTATIONS[device]
            }
            yield Case(
                op="sample",
                name=f"[{rows}, {columns}], {dtype}, {cut}",
                params={
                    "rows": rows, "columns": columns, "cut": cut, "dtype": dtype, "device": device,
                },
                make_inputs=partial(_rows, rows, columns, getattr(torch, dtype), device, limits),
                variants={**_peers(limits, device), **ours},
                oracle=_oracle,
                tolerance=1e-4,
                work=Work(0.0, 1.0 * rows * columns * getattr(torch, dtype).itemsize, (64, 64, 64)),
                baselines=tuple(_peers(limits, device)),
            )  # fmt: skip


def _rows(
    rows: int, columns: int, dtype: torch.dtype, device: str, limits: dict[str, float]
) -> Rows:
    """Of each row the n-th most probable token is so by n^-1.5, as in models: 58 hold 0.9."""
    g = torch.Generator().manual_seed(0)
    order = torch.rand(rows, columns, generator=g).argsort(1)
    logits = (-1.5 * (order + 1.0).log()).to(device, dtype)
    limited = {
        name: torch.full((rows,), x, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, x in limits.items()
    }
    params = SampleParams(
        torch.ones(rows, device=device), **{name: x.to(device) for name, x in limited.items()}
    )
    seed = torch.arange(rows, device=device)
    kept_mass = sample_ref(logits.double(), seed, seed, params).kept_mass
    descending = logits.double().softmax(1).sort(1, descending=True).values
    count = (descending.cumsum(1) < kept_mass[:, None] - 1e-9).sum(1, keepdim=True)
    lowest = descending.gather(1, count.clamp(max=columns - 1))
    possible = logits.double().softmax(1) >= lowest * (1 - 1e-9)
    return Rows(logits, seed, params, possible.float(), kept_mass)


def _oracle(rows: Rows, computes: str) -> Outputs:
    possible = {"possible": torch.ones(len(rows.seed), 1, device=rows.logits.device)}
    return possible if not computes else possible | {"kept_mass": rows.kept_mass}


def _ours(impl: str, rows: Rows) -> Call:
    from srlm_kernels.backends import refusal

    if reason := refusal(impl, rows.logits):
        raise Unavailable(reason)

    def call() -> Outputs:
        draw = sample(rows.logits, rows.seed, rows.seed, rows.params, impl=impl)
        return {**rows.drawn(draw.token), "kept_mass": draw.kept_mass}

    return call


def _peers(limits: dict[str, float], device: str) -> dict[str, Variant]:
    name = "processors of transformers, multinomial" if limits else "torch, multinomial"
    peers = {name: Variant(partial(_transformers, limits)), "vllm": Variant(partial(_vllm, limits))}
    if device == "cuda":
        peers["flashinfer"] = Variant(partial(_flashinfer, limits))
    return peers


def _transformers(limits: dict[str, float], rows: Rows) -> Call:
    warpers: list[Callable[..., Tensor]] = []
    if limits:
        hf = optional("transformers.generation")
        made = {"top_p": hf.TopPLogitsWarper, "top_k": hf.TopKLogitsWarper}
        warpers = [made[name](x) for name, x in limits.items()]

    def call() -> Outputs:
        scores = rows.logits.float()
        for warper in warpers:
            scores = warper(None, scores)
        return rows.drawn(torch.multinomial(scores.softmax(-1), 1)[:, 0])

    return call


def _vllm(limits: dict[str, float], rows: Rows) -> Call:
    ops = optional("vllm.v1.sample.ops.topk_topp_sampler")
    ops.current_platform.import_kernels()
    sampler, params = ops.TopKTopPSampler(), rows.params

    def call() -> Outputs:
        scores = rows.logits.to(torch.float32, copy=True)  # it may write over them
        token, _ = sampler(scores, {}, params.top_k, params.top_p)
        return rows.drawn(token.long())

    return call


def _flashinfer(limits: dict[str, float], rows: Rows) -> Call:
    sampling = optional("flashinfer.sampling")

    def call() -> Outputs:
        if not limits:
            token = sampling.sampling_from_logits(rows.logits.float())
        else:
            ((name, limit),) = limits.items()
            draw = getattr(sampling, f"{name}_sampling_from_probs")
            token = draw(rows.logits.float().softmax(-1), limit)
        return rows.drawn(token.long())

    return call
