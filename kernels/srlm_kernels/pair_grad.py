"""From token log-probabilities to losses of pairs and the slope of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srlm_kernels.backends import row_backend
from srlm_kernels.losses import PairLogps


@dataclass(frozen=True)
class PairGrad:
    """Of P pairs: sums per sequence [2P], chosen and rejected in turn, and losses per pair [P]."""

    logp: Tensor
    ref_logp: Tensor
    extrapolated_logp: Tensor
    losses: Tensor
    """[P], unscaled."""
    slopes: Tensor
    """[2P]: d(scale * sum of losses) / d(summed log-probability of the sequence)."""

    @property
    def margins(self) -> Tensor:
        ratio = self.logp - self.ref_logp
        return ratio[0::2] - ratio[1::2]

    @property
    def ext_margins(self) -> Tensor:
        ratio = self.extrapolated_logp - self.ref_logp
        return ratio[0::2] - ratio[1::2]


def pair_grad(
    logp: Tensor,
    scored: Tensor,
    cu_seqlens: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    scale: float | Tensor,
    pair: Mapping[str, Tensor] | None = None,
    ref_logp: Tensor | None = None,
    extrapolated_logp: Tensor | None = None,
    ref_sums: Tensor | None = None,
    impl: str = "auto",
) -> PairGrad:
    """Sum token log-probabilities over sequences, then `loss_fn` and its derivative per pair.

    Args:
        logp, ref_logp, extrapolated_logp: [N] fp32 or fp64, 0 where not scored; a missing reference
            counts as 0, a missing extrapolation as `logp`.
        scored: [N] bool, the tokens that count towards a length.
        cu_seqlens: [2P+1] int offsets; sequences 2p and 2p+1 are chosen and rejected of pair p.
        loss_fn, pair, scale: see `linear_preference_loss`.
        ref_sums: [2P], in the place of `ref_logp`.
        impl: "auto", "torch" or "triton" (dpo and spa on CUDA, or under its interpreter).
    """
    if _backend(impl, logp, loss_fn, pair) == "triton":
        from srlm_kernels.pair_grad_triton import pair_grad_triton as run
    else:
        run = pair_grad_ref
    return run(
        logp, scored, cu_seqlens, loss_fn, scale=scale, pair=pair, ref_logp=ref_logp,
        extrapolated_logp=extrapolated_logp, ref_sums=ref_sums,
    )  # fmt: skip


def _backend(
    impl: str, logp: Tensor, loss_fn: Callable[..., Tensor], pair: Mapping[str, Tensor] | None
) -> str:
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"pair_grad has no impl={impl!r}; known: auto, torch, triton")
    if impl == "torch" or (impl == "auto" and row_backend("auto", logp) != "triton"):
        return "torch"
    row_backend("triton", logp)  # raises where Triton cannot run
    from srlm_kernels.pair_grad_triton import takes

    if takes(logp, loss_fn, pair):
        return "triton"
    if impl == "triton":
        raise ValueError(f"impl='triton' has no kernel for {loss_fn!r}; use impl='auto'")
    return "torch"


def pair_grad_ref(
    logp: Tensor,
    scored: Tensor,
    cu_seqlens: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    scale: float | Tensor,
    pair: Mapping[str, Tensor] | None = None,
    ref_logp: Tensor | None = None,
    extrapolated_logp: Tensor | None = None,
    ref_sums: Tensor | None = None,
) -> PairGrad:
    """`pair_grad` by torch's autograd, for any `loss_fn`."""
    offsets = cu_seqlens.to(logp.device, torch.int64)

    def per_sequence(values: Tensor) -> Tensor:
        # In fp32 the running sum of a long response loses more than its terms ever lost.
        wide = torch.segment_reduce(values.double(), "sum", offsets=offsets, unsafe=True)
        return wide.to(logp.dtype)

    policy = per_sequence(logp)
    if ref_sums is not None:
        ref = ref_sums.to(logp.dtype)
    else:
        ref = torch.zeros_like(policy) if ref_logp is None else per_sequence(ref_logp)
    ext = policy if extrapolated_logp is None else per_sequence(extrapolated_logp)
    losses, slopes = pair_step(loss_fn, (policy, ref, ext, per_sequence(scored)), pair or {}, scale)
    return PairGrad(policy, ref, ext, losses, slopes)


def pair_step(
    loss_fn: Callable[..., Tensor],
    sums: tuple[Tensor, Tensor, Tensor, Tensor],
    pair: Mapping[str, Tensor],
    scale: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Losses [P] and slopes [2P] from the sums (policy, reference, extrapolated, lengths) [2P]."""
    with _autograd():
        s = PairLogps(*(_recordable(half) for x in sums for half in (x[0::2], x[1::2])))
        chosen, rejected = s.chosen.clone().requires_grad_(), s.rejected.clone().requires_grad_()
        given = {name: _recordable(values) for name, values in pair.items()}
        losses = loss_fn(replace(s, chosen=chosen, rejected=rejected), **given)
        if not isinstance(losses, Tensor) or losses.shape != chosen.shape:
            raise ValueError(
                f"loss_fn must return one loss per pair, shape {list(chosen.shape)}, "
                f"got {list(losses.shape) if isinstance(losses, Tensor) else losses}"
            )
        if losses.requires_grad:
            found = torch.autograd.grad(
                losses.sum(), (chosen, rejected), allow_unused=True, materialize_grads=True
            )
            slopes = torch.stack(found, dim=1).flatten()
        else:  # nothing depends on a log-probability
            slopes = torch.zeros_like(sums[0])
    # Whatever dtypes the loss, `pair` and `scale` have: results have that of the sums.
    return losses.detach().to(chosen.dtype), (scale * slopes).detach().to(chosen.dtype)


def _recordable(values: Tensor) -> Tensor:
    """Autograd records no tensor that was made in inference mode, but a copy of it."""
    return values.clone() if values.is_inference() else values


@contextmanager
def _autograd() -> Iterator[None]:
    """A region where autograd records, whatever it is called from.

    Even inside a custom op, which runs below autograd, and unseen by hooks that move what is saved
    to the host.
    """
    with ExitStack() as stack:
        if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradOther):
            stack.enter_context(torch._C._ForceDispatchKeyGuard(*_OUTSIDE))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged))
        yield


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


_OUTSIDE = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())
"""The dispatcher's state outside of any op, as it is while this module is imported."""
