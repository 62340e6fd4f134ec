"""Which layout a model is trained in; every family has the gradients of padded rows."""

import warnings
from typing import Any

import pytest
import torch

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.train.batches import Row, collate
from srlm_fast.train.layout import choose_layout
from tests.sampler.families import FAMILIES, UNSUPPORTED


def rows(lengths: list[tuple[int, tuple[int, ...]]]) -> list[Row]:
    g = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 96, (count,), generator=g).tolist()

    return [
        (prompt, ids(n)) for length, tails in lengths for prompt in (ids(length),) for n in tails
    ]


ROWS = rows([(17, (30, 9)), (1, (5, 1)), (60, (25, 40)), (8, (3,))])  # windows are of 20 and 70


def gradients(model: Any, layout: Any) -> list[torch.Tensor]:
    batch = collate(ROWS, pad_id=0, layout=layout)
    states = batch.states(model)[batch.rows]
    weights = torch.linspace(-1, 1, states.numel()).view_as(states)
    (states * weights).sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return [states.detach(), *found]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_gradients(family: str) -> None:
    model = FAMILIES[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_layout(model, TrainConfig()) == "shared"
    shared, padded = (gradients(model, layout) for layout in ("shared", "padded"))
    largest = max(float(g.norm()) for g in padded)
    for ours, plain in zip(shared, padded, strict=True):
        assert (ours - plain).norm() <= 1e-4 * plain.norm() + 1e-6 * largest


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_what_cannot_share_prompts_is_padded_and_said(family: str) -> None:
    model = UNSUPPORTED[family]()
    with pytest.warns(UserWarning, match="is trained on padded rows: "):
        assert choose_layout(model, TrainConfig()) == "padded"
    with pytest.raises(UserError, match=r"layout: shared does not work for .*; use padded or auto"):
        choose_layout(model, TrainConfig(layout="shared"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_layout(model, TrainConfig(layout="padded")) == "padded"
