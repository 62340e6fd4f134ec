"""Other ways to get log-probabilities of target tokens: one function per peer.

Each takes a batch and returns `logp(hidden, weight) -> [N] fp32`, in the packed order of
`PairBatch.rows`, or raises Unavailable. Every peer gets its rows as it wants them: full logits and
cut-cross-entropy the padded batch (the latter drops ignored rows itself), the others only the rows
that count, as TRL's trainer gives them on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import Unavailable, optional
from benchmarks.pair_batch import IGNORED, PairBatch
from srlm_kernels.plan import chunk_rows

TokenLogp = Callable[[Tensor, Tensor], Tensor]
Peer = Callable[[PairBatch], TokenLogp]


def full_logits(batch: PairBatch) -> TokenLogp:
    """Logits of every position as a model returns them, then log_softmax in fp32."""
    check_memory(batch, streams=2)
    index = batch.padded_target.clamp(min=0)[:, None]

    def logp(hidden: Tensor, weight: Tensor) -> Tensor:
        log_probs = (hidden @ weight.T).float().log_softmax(-1)
        return log_probs.gather(-1, index)[:, 0][batch.rows]

    return logp


def full_logits_compiled(batch: PairBatch) -> TokenLogp:
    """`full_logits` under torch.compile."""
    return torch.compile(full_logits(batch))


def torch_linear_cross_entropy(batch: PairBatch) -> TokenLogp:
    """PyTorch's chunked linear_cross_entropy with its default options."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Unavailable(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    if not batch.weight.is_cuda and batch.weight.shape[0] > 2**16:
        raise Unavailable("a call takes minutes on a CPU at this vocabulary")

    def logp(hidden: Tensor, weight: Tensor) -> Tensor:
        return -F.linear_cross_entropy(
            hidden[batch.rows], weight, batch.target, reduction="none", options=options()
        ).float()

    return logp


def trl(batch: PairBatch) -> TokenLogp:
    """TRL's ChunkedLogProbFunction, called as its trainers call it."""
    function = optional("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    chunk = optional("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

    def logp(hidden: Tensor, weight: Tensor) -> Tensor:
        x = hidden[batch.rows]
        outputs = function.apply(x, weight, None, batch.target, 1.0, chunk, None, 1.0, ())
        return outputs[0]  # type: ignore[no-any-return]

    return logp


def cut_cross_entropy_compiled(batch: PairBatch) -> TokenLogp:
    """cut-cross-entropy's torch.compile path, the one that runs on any device."""
    return _cut_cross_entropy(batch, impl="torch_compile")


def cut_cross_entropy_exact(batch: PairBatch) -> TokenLogp:
    """cut-cross-entropy's Triton kernels without gradient filtering, which would approximate."""
    return _cut_cross_entropy(batch, impl="cce", filter_eps=None)


def _cut_cross_entropy(batch: PairBatch, **options: str | None) -> TokenLogp:
    linear_cross_entropy = optional("cut_cross_entropy").linear_cross_entropy

    def logp(hidden: Tensor, weight: Tensor) -> Tensor:
        nll = linear_cross_entropy(
            hidden, weight, batch.padded_target, ignore_index=IGNORED, reduction="none", **options
        )
        return -nll[batch.rows].float()

    return logp


def of_device(device: str) -> dict[str, Peer]:
    """The peers by name, the safest first."""
    peers: dict[str, Peer] = {
        "full logits": full_logits,
        "torch linear_cross_entropy": torch_linear_cross_entropy,
        "TRL": trl,
        "full logits, compiled": full_logits_compiled,
        "cut-cross-entropy, compiled": cut_cross_entropy_compiled,
    }
    return peers | (
        {"cut-cross-entropy, exact": cut_cross_entropy_exact} if device == "cuda" else {}
    )


def full_logits_extrapolated(
    batch: PairBatch, extrapolation: float
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """SPA's own formulation (arXiv 2406.04412): three logit tensors and their log_softmax.

    As in the authors' code the mixture is formed, without a gradient, and normalised in the dtype
    of the logits. Returns log-probabilities [N] fp32 of policy, reference and mixture; those of the
    policy can be differentiated.
    """
    check_memory(batch, streams=3)
    index = batch.padded_target.clamp(min=0)[:, None]

    def pick(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, index)[:, 0][batch.rows].float()

    def streams() -> tuple[Tensor, Tensor, Tensor]:
        logits = batch.hidden @ batch.weight.T
        with torch.no_grad():
            ref_logits = batch.ref_hidden @ batch.ref_weight.T
            mixed = (1 + extrapolation) * logits - extrapolation * ref_logits
            ref_logp, mixed_logp = pick(ref_logits), pick(mixed)
        return pick(logits), ref_logp, mixed_logp

    return streams


def gemms(batch: PairBatch, products: int) -> Callable[[], dict[str, Tensor]]:
    """A bound, not a peer: the bare matrix products, chunk by chunk into buffers that exist.

    2: policy and reference logits. 4: dX and dW as well. The chunks are those of our ops, operands
    have the right shapes and layout, and nothing is done with a product.
    """
    x, ref = batch.hidden.detach()[batch.rows], batch.ref_hidden[batch.rows]
    w, ref_w = batch.weight.detach(), batch.ref_weight
    chunk = chunk_rows(w.shape[0], w.device)
    logits, other = (w.new_empty(min(chunk, len(x)), w.shape[0]) for _ in range(2))
    grad_x, grad_w = torch.empty_like(x), torch.zeros_like(w)

    def call() -> dict[str, Tensor]:
        for lo in range(0, len(x), chunk):
            part = slice(lo, lo + chunk)
            z = logits[: len(x[part])]
            torch.mm(x[part], w.T, out=z)
            torch.mm(ref[part], ref_w.T, out=other[: len(z)])
            if products == 4:
                torch.mm(z, w, out=grad_x[part])
                # beta 0 in place of 1 would spare the sum over chunks, which belongs to the work.
                torch.addmm(grad_w, z.T, x[part], out=grad_w)
        return {}

    return call


def check_memory(batch: PairBatch, streams: int) -> None:
    """Raises Unavailable where the full logits of so many streams cannot fit."""
    rows, vocab = batch.hidden.shape[0], batch.weight.shape[0]
    if batch.hidden.is_cuda:
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0] + cached
        # Logits, their fp32 copy, log-probabilities and the gradients of these three.
        need = rows * vocab * (6 * batch.hidden.element_size() + 12) * streams // 2
        if need > free:
            raise Unavailable(f"needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
