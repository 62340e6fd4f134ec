"""Which implementation of an op runs here, and why, in one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srlm_kernels import backends, dispatch
from srlm_kernels.backends import row_backend
from srlm_kernels.prefix_attention import PrefixPlan
from srlm_kernels.prefix_attention import choose as choose_attention

_HEAD_OPS = ("linear_logp", "linear_preference_loss")
# Ops with one implementation for each kind of device, and the argument that decides.
_DECIDES = {
    "tree_attention": "query",
    "merge_states": "o",
    "kv_write": "key",
    "sample": "logits",
    "invariant_linear": "x",
    "layers": "x",
}
OPS = (*_HEAD_OPS, "prefix_attention", *_DECIDES)
_WHAT = {
    "triton": "Triton kernels",
    "cpp": "C++ on the CPU",
    "torch": "plain torch",
    "flex": "FlexAttention over the whole row",
    "pieces": "flash attention of every part, merged",
    "reference": "plain torch, scores in memory",
}


def explain(op: str, **arguments: Any) -> str:
    """One line that says which implementation of `op` impl="auto" takes here, and why.

    `arguments`: any of the op's, by name. Tensors are shown with dtype, shape and device, and those
    that decide do; without them fp32 on the CPU is assumed. Raises ValueError for an unknown op.
    """
    if op in _DECIDES:
        name, why = _by_device(op, arguments)
    elif op == "prefix_attention":
        name, why = _prefix_attention(**arguments)
    elif op in _HEAD_OPS:
        name, why = _with_head(op, arguments)
    else:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    seen = ", ".join(
        f"{key} {str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"
        for key, t in arguments.items()
        if isinstance(t, Tensor)
    )
    return f"{op}: {name} ({'; '.join(why)})" + (f" for {seen}" if seen else "")


def _with_head(op: str, arguments: dict[str, Any]) -> tuple[str, list[str]]:
    given = arguments.get
    need = dispatch.Need(
        given("hidden"), given("weight"), given("bias"), given("ref_hidden"), given("ref_weight"),
        given("outputs", ()), given("logits_dtype"), given("process_group") is not None,
    )  # fmt: skip
    name = dispatch.choose(op, "auto", need)
    why = [dispatch.description(op, name)]
    if name == "chunked":
        like = torch.empty(0, dtype=need.dtype, device=need.device)
        why.append(f"row kernels: {row_backend('auto', like)}")
    known = dispatch.implementations(op)
    better = known[: known.index(name)]
    return name, why + [f"not {n}: {dispatch.passed_over(op, n, need)}" for n in better]


def _by_device(op: str, arguments: dict[str, Any]) -> tuple[str, list[str]]:
    like = arguments.get(_DECIDES[op])
    like = torch.empty(0) if like is None else like
    name, best = row_backend("auto", like, op), backends.best_backend(like)
    reason = backends.refusal(best, like, op)
    return name, [_WHAT[name]] + ([] if reason is None else [f"not {best}: {reason}"])


def _prefix_attention(
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    plan: PrefixPlan | None = None,
    **options: Any,
) -> tuple[str, list[str]]:
    example = torch.empty(0, 1, 64) if query is None else query
    q, k, v = (example if x is None else x for x in (query, key, value))
    plan = plan or PrefixPlan.of([(2**30, [])])  # a window cuts unless the plan is too short for it
    given = {name: options.get(name) for name in ("window", "softcap", "sinks")}
    name, passed_over = choose_attention(q, k, v, plan, **given)
    return name, [_WHAT[name], *(f"not {n}: {reason}" for n, reason in passed_over.items())]
