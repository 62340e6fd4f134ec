import math

import pytest
import torch

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.train.optim import MAX_STREAK, Optimizer, lr_factor


def test_schedules():
    def factors(steps=10, **settings):
        config = TrainConfig(**settings)
        return [lr_factor(config, step, steps) for step in range(steps)]

    assert factors(lr_scheduler_type="constant") == [1.0] * 10
    linear = factors(lr_scheduler_type="linear", min_lr_ratio=0.5)
    assert linear == pytest.approx([1 - 0.05 * t for t in range(10)])
    cosine = factors(lr_scheduler_type="cosine", min_lr_ratio=0.2)
    expected = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * t / 10)) for t in range(10)]
    assert cosine == pytest.approx(expected)
    warm = factors(lr_scheduler_type="linear", min_lr_ratio=0.0, warmup_ratio=0.2)
    assert warm == pytest.approx([0.5, 1.0] + [1 - t / 8 for t in range(8)])


def test_part_of_a_warm_up_step_is_a_whole_one():
    """As transformers rounds it: 3 of 10 steps for a ratio of 0.21."""
    config = TrainConfig(warmup_ratio=0.21, lr_scheduler_type="constant")
    factors = [lr_factor(config, step, 10) for step in range(4)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1])


def _linear(dtype, seed=0):
    layer = torch.nn.Linear(6, 5, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, 6, generator=generator))
        layer.bias.zero_()
    return layer


def _set_gradients(layer, value):
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_adamw_with_clipping(fused):
    config = TrainConfig(learning_rate=0.1, max_grad_norm=0.5, weight_decay=0.3)
    layer, twin = _linear(torch.float64), _linear(torch.float64)
    optimizer = Optimizer(layer, config)
    optimizer._fused = optimizer._fused and fused
    decay = [{"params": [twin.weight], "weight_decay": 0.3}, {"params": [twin.bias]}]
    plain = torch.optim.AdamW(decay, lr=0.1, weight_decay=0.0, foreach=False)
    for factor in (1.0, 0.5):
        _set_gradients(layer, 2.0)
        _set_gradients(twin, 2.0)
        optimizer.collect()
        norm, taken = optimizer.step(torch.tensor(1.0), factor)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for group in plain.param_groups:
            group["lr"] = 0.1 * factor
        plain.step()
        assert norm.item() == pytest.approx(2.0 * math.sqrt(35)) and bool(taken)
    torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias, twin.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_non_finite_step_changes_nothing_and_is_counted(fused, where):
    layer, twin = _linear(torch.float32), _linear(torch.float32)
    optimizers = [Optimizer(m, TrainConfig(learning_rate=0.1)) for m in (layer, twin)]
    if not fused:
        for optimizer in optimizers:
            optimizer._fused = False
            optimizer._adamw.defaults["fused"] = False
            for group in optimizer._adamw.param_groups:
                group["fused"] = False
    for good in (True, False, True):
        for model, optimizer in zip((layer, twin), optimizers, strict=True):
            if not good and model is twin:
                continue
            _set_gradients(model, 1.0 if good or where == "loss" else math.nan)
            loss = torch.tensor(math.inf if not good and where == "loss" else 1.0)
            optimizer.collect()
            _, taken = optimizer.step(loss, 1.0)
            assert bool(taken) is good
    assert torch.equal(layer.weight, twin.weight)
    assert [int(o.skipped) for o in optimizers] == [1, 0]
    optimizers[0].check()


def test_five_non_finite_steps_in_a_row_name_the_learning_rate():
    layer = _linear(torch.float32)
    optimizer = Optimizer(layer, TrainConfig(learning_rate=0.25))
    for _ in range(2):  # with a good step between them, four and four are not five
        for value in [math.nan] * (MAX_STREAK - 1) + [1.0]:
            _set_gradients(layer, value)
            optimizer.step(torch.tensor(1.0), 1.0)
    optimizer.check()
    for _ in range(MAX_STREAK):
        _set_gradients(layer, math.nan)
        optimizer.step(torch.tensor(1.0), 1.0)
    with pytest.raises(UserError, match=r"lower learning_rate \(now 0.25\)"):
        optimizer.check()


def test_updates_below_the_resolution_of_bf16_are_not_lost():
    layer = _linear(torch.bfloat16)
    start = layer.weight.detach().clone()
    optimizer = Optimizer(layer, TrainConfig(learning_rate=1e-4, max_grad_norm=0.0))
    for _ in range(200):
        _set_gradients(layer, 1.0)
        optimizer.collect()
        optimizer.step(torch.tensor(1.0), 1.0)
    moved = (start.float() - layer.weight.float()).mean().item()
    assert moved == pytest.approx(0.02, rel=0.1)
    assert layer.weight.dtype == torch.bfloat16


def test_bf16_gradients_accumulate_in_fp32():
    layer = _linear(torch.bfloat16)
    optimizer = Optimizer(layer, TrainConfig(max_grad_norm=0.0))
    for _ in range(300):  # bf16 would stop counting at 256
        _set_gradients(layer, 1.0)
        optimizer.collect()
    norm, _ = optimizer.step(torch.tensor(1.0), 1.0)
    assert norm.item() == pytest.approx(300 * math.sqrt(35))


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable"):
        Optimizer(_linear(torch.float32).requires_grad_(False), TrainConfig())


def test_a_state_that_is_taken_up_is_not_kept():
    """It may map a file."""
    config = TrainConfig(learning_rate=0.1)
    layer, other = _linear(torch.float32), _linear(torch.float32, seed=1)
    before, after = Optimizer(layer, config), Optimizer(other, config)
    _set_gradients(layer, 1.0)
    before.step(torch.tensor(1.0), 1.0)
    after.restore(before.state())
    found, given = after.state(), before.state()
    assert found.keys() == given.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, given[name])
        assert tensor.data_ptr() != given[name].data_ptr(), name
