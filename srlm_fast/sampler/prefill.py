"""Stretches of tokens that are known beforehand, packed into forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from srlm_fast.sampler.forest import Node
from srlm_fast.sampler.plan import PageEntry, PlanBuilder, own_runs, prompt_entries, prompt_runs
from srlm_fast.sampler.runner import Runner
from srlm_kernels.tree_attention import PAGE

PASS_TOKENS = 8192
CPU_PASS_TOKENS = 2048  # the activations of more would leave its caches between two operations
_MOST_PARTIALS = 4  # for each token of a full pass: each is a float32 vector for every head


@dataclass(eq=False)
class Stretch:
    """Consecutive tokens of a sequence, the first at position `start`.

    `runs` are the sequence's pages from position 0 to the last of these tokens, in the parts that
    each give a partial result, and `slots` says where each token's keys and values go; -1: they are
    there already.
    """

    tokens: Sequence[int]
    start: int
    runs: list[list[PageEntry]]
    slots: np.ndarray


class Span(NamedTuple):
    """Tokens first .. first + size of `stretch` are rows row .. row + size of a pass."""

    stretch: Stretch
    first: int
    size: int
    row: int


def prompt_stretch(path: Sequence[Node]) -> Stretch:
    """What of a prompt is to be computed: its pages that are not filled, or its last token alone,
    whose hidden state is wanted in any case.

    The nodes count as filled from here on: whoever shares them comes later, in the same pass or
    another, and a pass writes before it reads. A call that fails forgets all nodes.
    """
    fresh = [node for node in path if not node.filled]
    for node in fresh:
        node.filled = True
    last = path[-1]
    if not fresh:
        end = last.start + len(last.tokens)
        return Stretch(last.tokens[-1:], end - 1, [prompt_entries(path)], np.array([-1]))
    return Stretch(
        [token for node in fresh for token in node.tokens],
        fresh[0].start,
        [prompt_entries(path)],
        np.concatenate([node.page * PAGE + np.arange(len(node.tokens)) for node in fresh]),
    )


def own_stretch(
    path: Sequence[Node], pages: Sequence[int], tokens: Sequence[int], *, drawn: bool
) -> Stretch:
    """Known tokens behind a prompt, on pages of their own. `drawn`: they are read in the runs of
    decoding, so that attention gives what it gave then to the last bit."""
    length = path[-1].start + len(path[-1].tokens)
    position = np.arange(length, length + len(tokens))
    where = np.array(pages, np.int64)[position // PAGE - length // PAGE]
    runs = prompt_runs(path) + own_runs(pages, length)
    runs = runs if drawn else [[entry for run in runs for entry in run]]
    return Stretch(tokens, length, runs, where * PAGE + position % PAGE)


def run(runner: Runner, stretches: Sequence[Stretch]) -> Iterator[tuple[Tensor, list[Span]]]:
    """Computes `stretches` in their order; yields the hidden states [T, D] of each pass and what
    its rows are."""
    for spans in _passes(stretches, pass_tokens(runner.device)):
        builder = PlanBuilder(runner.group)
        for stretch, first, count, row in spans:
            builder.prefill(stretch.runs, stretch.start + first, row, count)
        tokens = sum(span.size for span in spans)
        ids, position, slot = _packed(spans).to(runner.device)
        plan = builder.build(tokens, runner.device)
        yield runner.forward(ids, position, slot, plan), spans


def pass_tokens(device: torch.device) -> int:
    """The most tokens that one forward pass computes."""
    return CPU_PASS_TOKENS if device.type == "cpu" else PASS_TOKENS


def _passes(stretches: Sequence[Stretch], tokens: int) -> Iterator[list[Span]]:
    spans: list[Span] = []
    size = partials = 0
    for stretch in stretches:
        first, runs = 0, len(stretch.runs)
        while first < len(stretch.tokens):
            room = min(tokens - size, (_MOST_PARTIALS * tokens - partials) // runs)
            if room <= 0 and spans:
                yield spans
                spans, size, partials = [], 0, 0
                continue
            count = min(len(stretch.tokens) - first, max(1, room))
            spans.append(Span(stretch, first, count, size))
            size, partials, first = size + count, partials + count * runs, first + count
    if spans:
        yield spans


def _packed(spans: Sequence[Span]) -> Tensor:
    """[3, T] int64: token ids, positions, slots."""
    parts = [
        np.stack(
            [
                np.array(stretch.tokens[first : first + count], np.int64),
                np.arange(stretch.start + first, stretch.start + first + count),
                stretch.slots[first : first + count],
            ]
        )
        for stretch, first, count, _ in spans
    ]
    return torch.from_numpy(np.concatenate(parts, 1))
