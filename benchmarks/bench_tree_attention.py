"""Attention of one decoding step: N candidates of each prompt, every row with tokens of its own.

python -m benchmarks --suite cpu --only tree_attention

The ceiling is a copy of the bytes that must be read once. What "independent" reads is more by
design: every row has the prompt to itself, as when nothing is shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, Work
from benchmarks.shapes import TOLERANCE
from srlm_fast.sampler.plan import SPLIT, PlanBuilder
from srlm_kernels.tree_attention import PAGE, TreePlan, tree_attention

IMPLEMENTATIONS = {"cpu": ("torch", "cpp"), "cuda": ("torch", "triton")}


@dataclass(frozen=True)
class Shape:
    """Rows of a step: `candidates` of every prompt; lengths are multiples of a page."""

    prompts: int
    candidates: int
    prompt: int
    own: int
    kv_heads: int
    group: int
    width: int

    @property
    def rows(self) -> int:
        return self.prompts * self.candidates

    @property
    def length(self) -> int:
        return self.prompt + self.own

    def __str__(self) -> str:
        return (
            f"{self.prompts} x {self.candidates} rows, {self.prompt} + {self.own} tokens, "
            f"heads {self.kv_heads} x {self.group} x {self.width}"
        )


# As in 0.5B models; then, 64 rows at a time, as in 8B models.
SHAPES = {
    "smoke": [Shape(2, 3, 64, 64, 1, 2, 16)],
    "cpu": [Shape(2, 8, prompt, 128, 2, 7, 64) for prompt in (512, 2048)],
    "gpu": [
        Shape(64 // candidates, candidates, prompt, 256, 8, 4, 128)
        for prompt in (512, 2048)
        for candidates in (4, 8, 16)
    ],
}


@dataclass
class Step:
    """One query per row, and where its keys and values are. Pages of prompts come first."""

    shape: Shape
    query: Tensor
    key_pages: Tensor
    value_pages: Tensor
    plan: TreePlan
    position: Tensor


def cases(suite: str) -> Iterator[Case]:
    device = "cuda" if suite == "gpu" else "cpu"
    for shape in SHAPES[suite]:
        for name in ("bfloat16",) if suite == "gpu" else ("float32", "bfloat16"):
            dtype: torch.dtype = getattr(torch, name)
            ours = {f"ours, {i}": Variant(partial(_ours, i)) for i in IMPLEMENTATIONS[device]}
            yield Case(
                op="tree_attention",
                name=f"{shape}, {name}",
                params=vars(shape) | {"dtype": name, "device": device},
                make_inputs=partial(_step, shape, dtype, device),
                variants={
                    "independent, SDPA": Variant(_independent),
                    **ours,
                    "shared, flex": Variant(_flex, compiles=True),
                },
                oracle=lambda step, _: {"out": _dense(step)},
                tolerance=TOLERANCE[name],
                work=Work(0.0, _bytes(shape, dtype), (64, 64, 64)),
                baselines=("independent, SDPA",),
            )


def _bytes(shape: Shape, dtype: torch.dtype) -> float:
    """Keys and values once, queries and results."""
    tokens = shape.prompts * shape.prompt + shape.rows * shape.own
    per_token = 2 * shape.kv_heads * shape.width
    return dtype.itemsize * per_token * float(tokens + shape.rows * shape.group)


def _step(shape: Shape, dtype: torch.dtype, device: str) -> Step:
    generator = torch.Generator(device).manual_seed(0)
    pages = shape.prompts * (shape.prompt // PAGE) + shape.rows * (shape.own // PAGE)
    page = (shape.kv_heads, PAGE, shape.width)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    query = 3 * normal(shape.rows, shape.kv_heads * shape.group, shape.width)
    key_pages, value_pages = normal(pages, *page), normal(pages, *page)
    if device == "cpu":  # as the sampler stores them there
        key_pages = key_pages.mT.contiguous().mT
    position = torch.full((shape.rows,), shape.length - 1, dtype=torch.int32, device=device)
    return Step(shape, query, key_pages, value_pages, _plan(shape, device), position)


def _plan(shape: Shape, device: str) -> TreePlan:
    builder = PlanBuilder(shape.group)

    def read(first_page: int, positions: range, rows: range) -> None:
        for run in range(positions.start, positions.stop, SPLIT):
            part = range(run, min(run + SPLIT, positions.stop), PAGE)
            builder.read(
                [(first_page + (at - positions.start) // PAGE, at, 0, PAGE) for at in part], rows
            )

    per_prompt, per_row = shape.prompt // PAGE, shape.own // PAGE
    for i in range(shape.prompts):
        rows = range(i * shape.candidates, (i + 1) * shape.candidates)
        read(i * per_prompt, range(shape.prompt), rows)
    for row in range(shape.rows):
        first = shape.prompts * per_prompt + row * per_row
        read(first, range(shape.prompt, shape.length), range(row, row + 1))
    return builder.build(shape.rows, torch.device(device))


def _copies(step: Step) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, Hkv, L, D], every row with a copy of its prompt."""
    shape = step.shape
    prompt = torch.arange(shape.prompts * (shape.prompt // PAGE), device=step.query.device)
    own = torch.arange(len(prompt), step.key_pages.shape[0], device=step.query.device)
    pages = [
        prompt.view(shape.prompts, -1).repeat_interleave(shape.candidates, 0),
        own.view(shape.rows, -1),
    ]
    index = torch.cat(pages, 1)
    key, value = (
        x[index].transpose(1, 2).flatten(2, 3).contiguous()
        for x in (step.key_pages, step.value_pages)
    )
    return key, value


def _dense(step: Step) -> Tensor:
    key, value = (x.double() for x in _copies(step))
    query = step.query.double().unflatten(1, (step.shape.kv_heads, -1))
    p = torch.einsum("rhgd,rhkd->rhgk", query, key).mul(step.shape.width**-0.5).softmax(3)
    return torch.einsum("rhgk,rhkd->rhgd", p, value).flatten(1, 2)


def _independent(step: Step) -> Call:
    """The query heads of a key head as queries of one head: the faster way, above all on a CPU."""
    key, value = _copies(step)
    query = step.query.unflatten(1, (step.shape.kv_heads, -1))

    def call() -> Outputs:
        return {"out": scaled_dot_product_attention(query, key, value).flatten(1, 2)}

    return call


def _flex(step: Step) -> Call:
    """One call over all keys that there are, each once; a mask says whose they are."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape, device = step.shape, step.query.device
    key, value = (x.transpose(0, 1).flatten(1, 2)[None].contiguous() for x in
                  (step.key_pages, step.value_pages))  # fmt: skip
    query = step.query.transpose(0, 1)[None].contiguous()
    row = torch.arange(shape.rows, device=device)
    prompts = torch.arange(shape.prompts, device=device).repeat_interleave(shape.prompt)
    # Of each key the first row that sees it, and the end of these rows.
    first = torch.cat([prompts * shape.candidates, row.repeat_interleave(shape.own)])
    end = torch.cat([(prompts + 1) * shape.candidates, row.repeat_interleave(shape.own) + 1])

    def sees(batch: Tensor, head: Tensor, row: Tensor, token: Tensor) -> Tensor:
        return (row >= first[token]) & (row < end[token])

    mask = create_block_mask(sees, None, None, shape.rows, len(first), device=str(device))
    run = torch.compile(flex_attention)

    def call() -> Outputs:
        out = run(query, key, value, block_mask=mask, enable_gqa=True)
        return {"out": out[0].transpose(0, 1)}

    return call


def _ours(impl: str, step: Step) -> Call:
    from srlm_kernels.backends import refusal

    if reason := refusal(impl, step.query):
        raise Unavailable(reason)

    def call() -> Outputs:
        out = tree_attention(
            step.query, step.key_pages, step.value_pages, step.plan, step.position,
            scale=step.shape.width**-0.5, impl=impl,
        )  # fmt: skip
        return {"out": out}

    return call
