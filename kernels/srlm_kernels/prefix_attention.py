"""Training attention of packed preference data: the responses of a group share one prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from srlm_kernels import prefix_attention_cpp, prefix_attention_flex, prefix_attention_pieces
from srlm_kernels.operands import as_autocast, without_autocast

_IMPLEMENTATIONS = ("flex", "cpp", "pieces", "reference")
_Made = TypeVar("_Made")


class Group(NamedTuple):
    """Tokens of a packed row: a prompt from `start` on, then its responses one after the other."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def end(self) -> int:
        """Where the next group starts."""
        return self.start + self.prompt + sum(self.responses)


class Places(NamedTuple):
    """Where tokens stand: int32 [n] each."""

    group: Tensor
    segment: Tensor
    """0: the prompt; i: response i of the group."""
    position: Tensor
    """Those of a response go on from its prompt."""

    def at(self, index: Any) -> Places:
        """The places of some of the tokens."""
        return Places(self.group[index], self.segment[index], self.position[index])


@dataclass(frozen=True)
class PrefixPlan:
    """How a packed row of tokens is cut into groups; lengths on the host. Made by `of`."""

    groups: tuple[Group, ...]
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> PrefixPlan:
        """A plan from (prompt length, response lengths) of each group, in the order of the row.

        A group without responses is plain causal attention. Raises ValueError for an empty plan,
        prompt or response.
        """
        found, start = [], 0
        for i, (prompt, responses) in enumerate(groups):
            if min((prompt, *responses)) < 1:
                raise ValueError(
                    f"prompts and responses need at least one token, group {i} has a prompt of "
                    f"{prompt} and responses of {list(responses)}"
                )
            found.append(Group(start, prompt, tuple(responses)))
            start = found[-1].end
        if not found:
            raise ValueError("a plan needs at least one group")
        return cls(tuple(found))

    @property
    def total(self) -> int:
        """Tokens of the packed row."""
        return self.groups[-1].end

    @cached_property
    def longest(self) -> int:
        """The most positions that a prompt with one of its responses has."""
        return max(g.prompt + max(g.responses, default=0) for g in self.groups)

    def once(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """What `make` returned when this plan was first asked for `key`."""
        if key not in self._made:
            self._made[key] = make()
        made: _Made = self._made[key]
        return made

    def places(self, device: torch.device) -> Places:
        """The places of all tokens, on `device`; copied there once."""

        def copied(host: Tensor) -> Tensor:
            if device.type == "cuda":
                host = host.pin_memory()  # an unpinned copy would wait for the device
            return host.to(device, non_blocking=True)

        return self.once(("places", device), lambda: Places(*map(copied, self._host_places)))

    @cached_property
    def _host_places(self) -> Places:
        segments = [
            (i, segment, g.prompt if segment else 0, length)
            for i, g in enumerate(self.groups)
            for segment, length in enumerate((g.prompt, *g.responses))
        ]
        group, segment, first, length = torch.tensor(segments, dtype=torch.int32).T
        token = torch.arange(self.total, dtype=torch.int32)
        shift = first - (length.cumsum(0, dtype=torch.int32) - length)
        return Places(
            group.repeat_interleave(length),
            segment.repeat_interleave(length),
            token + shift.repeat_interleave(length),
        )


def sees(query: Places, key: Places, window: int | None) -> Tensor:
    """Whether the tokens at `query` attend to those at `key`, broadcast; bool."""
    ahead = query.position - key.position
    shared = (key.segment == 0) | (key.segment == query.segment)
    seen = (query.group == key.group) & shared & (ahead >= 0)
    return seen if window is None else seen & (ahead < window)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PrefixPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention over a packed row of groups [prompt | response 1 | ... | response K].

    A token of a prompt sees the prompt up to itself; a token of a response sees the whole prompt
    and its own response up to itself, as if each response stood behind a copy of the prompt
    ("Accelerating Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305).
    Differentiable once in query, key, value and sinks. Equal inputs give equal bits, with gradients
    or without; except for "flex", whatever other groups are packed beside a group.

    Args:
        query: [T, H, Dk] float, any strides.
        key: [T, Hkv, Dk] like `query`. Query head h reads h // (H // Hkv).
        value: [T, Hkv, Dv] like `query`.
        plan: of the T tokens. It keeps what implementations derive from it: reuse it over layers.
        scale: of the products, before `softcap` * tanh(. / softcap); None: Dk^-1/2.
        window: a query at position p sees positions above p - window; those of every response
            begin at the length of its prompt. None: all.
        sinks: [H] float, one more logit per head without a value.
        impl: "auto", "flex" (CUDA; FlexAttention), "cpp" (CPU; C++ for AVX-512), "pieces" (CPU;
            torch's flash attention of every part, merged) or "reference". `choose` says what
            "auto" takes, and why it does not take another.

    Returns:
        [T, H, Dv] in the dtype of `query`; inside an autocast region in its dtype, as all three are
        cast to that first.

    Raises:
        TypeError, ValueError: shapes, dtypes, options or a plan that do not fit, or an `impl` that
            cannot run here.
    """
    query, key, value = as_autocast(query, key, value)
    _check(query, key, value, plan, sinks)
    if scale is None:
        scale = query.shape[2] ** -0.5
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None, got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if window is not None and window >= plan.longest:
        window = None
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    known: dict[str, Callable[..., Tensor]] = {
        "flex": prefix_attention_flex.attend,
        "cpp": prefix_attention_cpp.attend,
        "pieces": prefix_attention_pieces.attend,
        "reference": prefix_attention_ref,
    }
    run = known[_chosen(impl, query, key, value, plan, **options)]
    return run(query, key, value, plan, scale=scale, **options)


def _check(
    query: Tensor, key: Tensor, value: Tensor, plan: PrefixPlan, sinks: Tensor | None
) -> None:
    if query.ndim != 3 or not query.is_floating_point():
        raise TypeError(
            f"query must be a float tensor [T, H, Dk], got {query.dtype} {list(query.shape)}"
        )
    tokens, heads, width = query.shape
    if key.ndim != 3 or key.shape[::2] != (tokens, width) or value.shape[:-1] != key.shape[:2]:
        raise ValueError(
            f"key must be [{tokens}, Hkv, {width}] and value [{tokens}, Hkv, Dv], got "
            f"{list(key.shape)} and {list(value.shape)}"
        )
    if heads % key.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {key.shape[1]} key heads evenly")
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise TypeError(f"key and value must be {query.dtype}, got {key.dtype} and {value.dtype}")
    if plan.total != tokens:
        raise ValueError(f"plan is for {plan.total} tokens, query has {tokens}")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise ValueError(
            f"sinks must be a float tensor [{heads}], got {sinks.dtype} {list(sinks.shape)}"
        )
    for name, tensor in (("key", key), ("value", value), ("sinks", sinks)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}")


def _chosen(
    impl: str, query: Tensor, key: Tensor, value: Tensor, plan: PrefixPlan, **options: Any
) -> str:
    if impl == "auto":
        return choose(query, key, value, plan, **options)[0]
    if impl not in _IMPLEMENTATIONS:
        known = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"prefix_attention has no impl={impl!r}; known: auto, {known}")
    if reason := refusal(impl, query, key, value, plan, **options):
        raise ValueError(f"prefix_attention cannot run with impl={impl!r} here: {reason}")
    return impl


def choose(
    query: Tensor, key: Tensor, value: Tensor, plan: PrefixPlan, **options: Any
) -> tuple[str, dict[str, str]]:
    """The implementation that "auto" takes, and why it takes none of the better ones, by name."""
    reasons: dict[str, str] = {}
    for name in ("flex",) if query.is_cuda else ("cpp", "pieces"):
        reason = refusal(name, query, key, value, plan, **options)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    return "reference", reasons


def refusal(
    impl: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PrefixPlan,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> str | None:
    """Why the implementation called `impl` cannot take the call; None: it can."""
    if impl == "flex":
        return prefix_attention_flex.refusal(query, key, value, sinks)
    if impl == "cpp":
        return prefix_attention_cpp.refusal(query)
    if impl == "pieces":
        cuts = window is not None and window < plan.longest
        options = {"a window that cuts": cuts, "softcap": softcap, "sinks": sinks is not None}
        return prefix_attention_pieces.refusal(query, value, options)
    return None


def prefix_attention_ref(
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
    """`prefix_attention` in plain torch, with a dense mask of each group; arguments are not
    checked."""
    kv_heads, wide = key.shape[1], torch.promote_types(query.dtype, torch.float32)
    outs = []
    for group in plan.groups:
        tokens = slice(group.start, group.end)
        places = plan.places(query.device).at(tokens)
        seen = sees(places.at((slice(None), None)), places, window)
        q, k, v = (x[tokens].to(wide) for x in (query, key, value))
        with without_autocast(query):
            q = q.reshape(len(q), kv_heads, -1, q.shape[2])
            s = torch.einsum("qhgd,khd->hgqk", q, k) * scale
            s = s if softcap is None else torch.tanh(s / softcap) * softcap
            s = s.masked_fill(~seen, -torch.inf)
            if sinks is not None:
                sink = sinks.to(wide).view(kv_heads, -1, 1, 1)
                s = torch.cat([s, sink.expand(*s.shape[:3], 1)], 3)
            p = s.softmax(3)[..., : len(k)]
            outs.append(torch.einsum("hgqk,khd->qhgd", p, v).flatten(1, 2))
    return torch.cat(outs).to(query.dtype)
