"""The sums of a head's gradients."""

import torch

from srlm_kernels.head import Grads, Head, shared_or_own

HEAD = Head(torch.randn(5, 3), torch.randn(5))


def test_a_reference_shares_what_it_has_not():
    own = torch.zeros(5, 3)
    assert shared_or_own(HEAD, None, None) == HEAD
    assert shared_or_own(HEAD, None, own[:, 0]).weight is HEAD.weight
    assert shared_or_own(HEAD, own, None) == Head(own, None)


def test_nothing_added_is_a_zero_gradient():
    grads = Grads.of(HEAD, torch.float32, weight=True, bias=True)
    assert grads.empty and not grads.total().any() and not grads.bias.any()
    assert Grads.of(HEAD, torch.float32, weight=False, bias=True).total() is None
    assert Grads.of(Head(HEAD.weight), torch.float32, weight=True, bias=True).bias is None


def test_sides_are_added_scaled():
    grads = Grads.of(HEAD, torch.float64, weight=True, bias=True)
    for factor in (2.0, -3.0):
        side = grads.another()
        side.weight.fill_(1)
        side.bias.fill_(10)
        side.empty = False
        grads.add(side, torch.tensor(factor, dtype=torch.float64))
    assert not grads.empty
    assert grads.weight.eq(-1).all() and grads.bias.eq(-10).all()


def test_an_empty_side_adds_nothing():
    grads = Grads.of(HEAD, torch.float32, weight=True, bias=False)
    side = grads.another()
    side.weight.fill_(torch.nan)
    grads.add(side, torch.tensor(1.0))
    assert grads.empty and not grads.total().any()


def test_a_callers_buffer_is_added_to():
    buffer = torch.ones(5, 3)
    grads = Grads(buffer, None, empty=False)
    assert grads.total() is buffer
    assert buffer.eq(1).all()
