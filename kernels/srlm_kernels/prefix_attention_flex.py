"""`prefix_attention` by FlexAttention: one kernel over the whole row, blocks nobody sees left out.

On the CPU, where it has no backward, it is there for tests of the mask: not compiled, it forms all
scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from srlm_kernels import backends

if TYPE_CHECKING:
    from srlm_kernels.prefix_attention import PrefixPlan

_NARROWEST = 16  # a tensor core's product
_BLOCK = 128
_ROWS = 8 * _BLOCK  # of tokens that are looked at together
# By default 8, which layers with and without a window, with gradients and without, with keys that
# take none (LoRA), and rows shorter than a block soon need.
_GRAPHS = 64

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def refusal(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> str | None:
    """Why FlexAttention cannot take the call; None: it can."""
    if query.is_cuda:
        if reason := backends.refusal("triton", query):
            return reason
        if min(query.shape[2], value.shape[2]) < _NARROWEST:
            return f"heads must be at least {_NARROWEST} wide"
        return None
    if query.device.type != "cpu":
        return f"it runs on CUDA, not on {query.device.type}"
    given = [t for t in (query, key, value, sinks) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "FlexAttention has no backward on the CPU"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PrefixPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`prefix_attention` where `refusal` is None; arguments are not checked."""
    mask = plan.once(
        ("block mask", query.device, window), lambda: block_mask(plan, window, query.device)
    )
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    if not torch.is_grad_enabled():
        # On the CPU it refuses views of leaves that ask for gradients, whatever the mode.
        q, k, v = q.detach(), k.detach(), v.detach()
    out, aux = _run(query.device.type)(
        q, k, v, score_mod=_capped(softcap), block_mask=mask, scale=scale, enable_gqa=True,
        return_aux=AuxRequest(lse=sinks is not None),
    )  # fmt: skip
    if sinks is not None:
        kept = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])
        out = (out * kept[..., None]).to(query.dtype)
    return out[0].transpose(0, 1)  # type: ignore[no-any-return]


def block_mask(plan: PrefixPlan, window: int | None, device: torch.device) -> BlockMask:
    """What tokens of the plan see, in blocks of 128.

    `create_block_mask` would give the same from all pairs of tokens at once: 10 GB for 32k tokens.
    Here no more than some rows of blocks are looked at together.
    """
    from srlm_kernels.prefix_attention import sees

    places = plan.places(device)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(places.at(query), places.at(key), window)

    counts = []
    for start in range(0, plan.total, _ROWS):
        some = slice(start, min(start + _ROWS, plan.total))
        seen = sees(places.at((some, None)), places, window)
        padding = [-size % _BLOCK for size in seen.shape]
        seen = F.pad(seen, (0, padding[1], 0, padding[0]))
        counts.append(seen.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK)).sum((1, 3)))  # type: ignore[no-untyped-call]
    count = torch.cat(counts)
    full = count == _BLOCK**2
    return BlockMask.from_kv_blocks(
        *_listed((count > 0) & ~full), *_listed(full), BLOCK_SIZE=_BLOCK, mask_mod=mask,
        seq_lengths=(plan.total, plan.total),
    )  # fmt: skip


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of [Q, K] bool per row the number of columns and these, then the others; [1, 1, Q (, K)]."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


@functools.cache
def _run(device: str) -> Callable[..., Any]:
    if device == "cuda":
        return compiled()
    return flex_attention


def compiled(**options: Any) -> Callable[..., Any]:
    """`flex_attention` as `torch.compile` with these options makes it."""
    # By default lengths become symbols when they first change, while scale, window and softcap, of
    # which a model has few, are constants. Out of recompilations, a full graph raises; otherwise it
    # would go on without a kernel, in silence.
    graphs = torch.compile(flex_attention, fullgraph=True, **options)

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # as a part of a larger graph
            return graphs(*args, **kwargs)
        with torch._dynamo.config.patch(recompile_limit=_GRAPHS):
            return graphs(*args, **kwargs)

    return run


@functools.cache
def _capped(softcap: float | None) -> ScoreMod | None:
    if softcap is None:
        return None

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap
