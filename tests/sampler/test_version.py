"""Whatever changes a model changes its version, and nothing else does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from srlm_fast.sampler.version import weights_version

CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda w: w.detach().add_(1e-3),
    "through data": lambda w: w.data.mul_(1.001),
    "one element through data": lambda w: w.data.view(-1)[3].add_(0.01),
    "sign through data": lambda w: w.data.view(-1)[3:4].copy_(w.data.view(-1)[3:4] + 1),
    "other memory": lambda w: setattr(w, "data", w.data.clone()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_seen(
    change: Callable[[torch.Tensor], Any], make_model: Callable[..., Any]
) -> None:
    model = make_model()
    before = weights_version(model)
    assert weights_version(model) == before
    change(model.model.layers[1].mlp.up_proj.weight)
    assert weights_version(model) != before


def test_forward_backward_and_modes_change_nothing(make_model: Callable[..., Any]) -> None:
    model = make_model()
    before = weights_version(model)
    model.train()
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert weights_version(model) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.data.copy_(w.data.flip(0)),
        lambda w: w.data[:, 1::2].neg_(),
        lambda w: w.data[:2].neg_(),
    ],
    ids=["rows change places", "every other sign", "signs of two rows"],
)
def test_sums_that_stay_alike_are_told_apart(
    change: Callable[[torch.Tensor], Any], make_model: Callable[..., Any]
) -> None:
    model = make_model()
    before = weights_version(model)
    change(model.model.layers[1].mlp.up_proj.weight)
    assert weights_version(model) != before
