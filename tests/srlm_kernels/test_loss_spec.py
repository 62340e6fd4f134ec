"""Losses written down and read back, and carried through a compiled graph."""

import dataclasses
import json
import math

import pytest
import torch

from srlm_kernels import losses
from srlm_kernels.loss_spec import from_spec, is_builtin, spec

THRESHOLD = torch.tensor(0.1)
# 0.1 + 0.2 has 17 digits: a text that rounds would show.
EVERY = [
    *[make(beta=0.1 + 0.2) for make in losses.LOSSES.values()],
    losses.dpo(1, 0.25),
    losses.spa(0.1, 0.2, -0.5, flag_equal=True),
    losses.spa(0.1, 0.2, -math.inf),
    losses.spa(0.1, 0.2, THRESHOLD),
    losses.with_nll(losses.ipo(0.1), 1e-30),
    losses.with_nll(losses.with_nll(losses.spa(0.1, 0.2, THRESHOLD), 0.5), 2),
]


class dpo(losses.dpo):
    """Another loss under a known name."""


def twice(s: losses.PairLogps) -> torch.Tensor:
    return 2 * losses.dpo(0.1)(s)


NOT_BUILT_IN = [twice, dpo(0.1), losses.with_nll(twice, 0.1), losses.dpo, None, print]


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_what_is_read_back_is_the_same_loss(loss):
    assert is_builtin(loss)
    text, tensors = spec(loss)
    again = from_spec(text, tensors)
    # Tensors compare by identity here: dataclasses compare as tuples.
    assert type(again) is type(loss)
    assert again == loss
    assert spec(again)[0] == text


def test_text_is_plain_json_with_places_for_tensors():
    loss = losses.with_nll(losses.spa(0.1, 0.2, THRESHOLD), 0.5)
    text, tensors = spec(loss)
    assert json.loads(text) == ["with_nll", ["spa", 0.1, 0.2, "tensor", False], 0.5]
    assert [id(t) for t in tensors] == [id(THRESHOLD)]


def test_a_changed_copy_is_written_anew():
    loss = losses.with_nll(losses.dpo(0.1), 0.5)
    changed = dataclasses.replace(loss, loss=dataclasses.replace(loss.loss, beta=0.7))
    assert spec(changed)[0] == '["with_nll", ["dpo", 0.7, 0.0], 0.5]'


@pytest.mark.parametrize("loss", NOT_BUILT_IN, ids=range(len(NOT_BUILT_IN)))
def test_what_is_not_built_in_is_not_written(loss):
    assert not is_builtin(loss)
    with pytest.raises(TypeError, match="can be written down, got"):
        spec(loss)


@pytest.mark.parametrize(
    ("text", "tensors", "message"),
    [
        ('["eval", 0.1]', [], "unknown loss 'eval'; known: dpo, "),
        ('["dpo", -1.0, 0.0]', [], "beta must be positive"),
        ('["dpo", 0.1', [], "Expecting ',' delimiter"),
        ('["spa", 0.1, 0.2, "tensor", false]', [], "has places for 1 tensors, got 0"),
        ('["dpo", 0.1, 0.0]', [THRESHOLD], "has places for 0 tensors, got 1"),
    ],
)
def test_texts_that_no_loss_wrote_are_refused(text, tensors, message):
    with pytest.raises(ValueError, match=message):
        from_spec(text, tensors)


@torch.library.custom_op("srlm_test_loss_spec::losses", mutates_args=())
def losses_op(
    chosen: torch.Tensor, rejected: torch.Tensor, text: str, tensors: list[torch.Tensor]
) -> torch.Tensor:
    none, one = torch.zeros_like(chosen), torch.ones_like(chosen)
    s = losses.PairLogps(chosen, rejected, none, none, chosen, rejected, one, one)
    return from_spec(text, tensors)(s)


@losses_op.register_fake
def _(chosen, rejected, text, tensors):
    return torch.empty_like(chosen)


@pytest.fixture
def sums() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([-3.0, -9.0, -4.0]), torch.tensor([-5.0, -2.0, -4.5])


def through_text(loss, sums):
    return losses_op(*sums, *spec(loss)) if is_builtin(loss) else sums[0]


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_a_loss_given_to_a_compiled_function(loss, sums):
    torch._dynamo.reset()
    compiled = torch.compile(through_text, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(loss, sums), through_text(loss, sums), rtol=0, atol=0)


def test_options_that_change_between_calls(sums):
    """Regression: from the second value on, a float is an input of the graph without a text."""
    torch._dynamo.reset()
    compiled = torch.compile(through_text, backend="eager", fullgraph=True)
    for beta in (0.1, 0.2, 0.3, 0.4):
        loss = losses.with_nll(losses.dpo(beta, beta), beta)
        assert torch.equal(compiled(loss, sums), through_text(loss, sums))


def test_a_new_threshold_tensor_compiles_nothing_new(sums):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(through_text, backend=counter, fullgraph=True)
    for threshold in (-9.0, 0.0, 9.0):
        loss = losses.spa(0.1, 0.2, torch.tensor(threshold))
        assert torch.equal(compiled(loss, sums), through_text(loss, sums))
    assert counter.frame_count == 1


def test_a_loss_made_inside_a_compiled_function(sums):
    torch._dynamo.reset()

    def made_inside(sums):
        loss = losses.with_nll(losses.spa(0.1, 0.2, sums[0].mean()), 0.5)
        return through_text(loss, sums)

    compiled = torch.compile(made_inside, backend="eager", fullgraph=True)
    assert torch.equal(compiled(sums), made_inside(sums))


def test_a_users_own_loss_is_told_apart_in_a_compiled_function(sums):
    torch._dynamo.reset()
    compiled = torch.compile(through_text, backend="eager", fullgraph=True)
    assert torch.equal(compiled(twice, sums), sums[0])
    assert torch.equal(compiled(losses.with_nll(twice, 0.1), sums), sums[0])
