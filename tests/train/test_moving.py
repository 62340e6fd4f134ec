"""References that follow the policy: TRL's update, ties, and what is refused or said."""

from dataclasses import replace

import pytest
import torch

from srlm_fast.config import Config, LoraConfig, PreferenceConfig
from srlm_fast.errors import UserError
from srlm_fast.model.weights import frozen_copy
from srlm_fast.train.moving import MovingReference
from srlm_fast.train.preference import train_preference

CONFIG = PreferenceConfig(sync_ref_model=True, ref_model_sync_steps=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.6, 0.01, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_the_update_is_trls(make_model, tied, alpha, dtype):
    """bf16 weights are rounded once, where TRL rounds three times."""
    trl = pytest.importorskip("trl", reason="trl is not installed (extra [bench])")
    policy, reference = (make_model(seed, dtype=dtype, tied=tied) for seed in (0, 1))
    theirs, before = frozen_copy(reference), frozen_copy(reference)
    config = replace(CONFIG, ref_model_mixup_alpha=alpha)
    moving = MovingReference(reference, policy, config, steps=3)
    for step in (1, 2, 4, 5):
        moving.after_step(step)
    for weight, other in zip(reference.parameters(), before.parameters(), strict=True):
        assert torch.equal(weight, other)
    moving.after_step(3)
    trl.trainer.callbacks.SyncRefModelCallback._sync_target_model(policy, theirs, alpha)
    rows = zip(*(m.parameters() for m in (reference, theirs, before, policy)), strict=True)
    wide = torch.promote_types(dtype, torch.float32)
    for weight, other, start, end in rows:
        exact = (1 - alpha) * start.double() + alpha * end.double()
        rounding = torch.finfo(dtype).eps / 2 * exact.abs()
        inside = 4 * torch.finfo(wide).eps * (start.abs() + end.abs())
        assert ((weight - exact).abs() <= rounding + inside).all()
        if alpha == 1:
            assert torch.equal(weight, end)
        if dtype == torch.float64:
            torch.testing.assert_close(weight, other, atol=1e-14, rtol=0)


def test_few_steps_are_said(make_model, pairs):
    model = make_model()
    with pytest.warns(UserWarning, match="will not move in this training of 1 steps"):
        summary = train_preference(
            model, frozen_copy(model), pairs, CONFIG, seed=0, pad_id=0, log=lambda _: None
        )
    assert summary["reference_updates"] == 0


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha must be above 0"),
        ({"ref_model_mixup_alpha": 1.1}, "ref_model_mixup_alpha must be above 0, at most 1"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be at least 1"),
        ({"reference": "fixed"}, "reference fixed is another one"),
        ({"reference": "ema"}, "reference ema is another one"),
        ({"reference_cache": "logps"}, "changes what reference_cache would keep"),
        ({"reference_cache": "states"}, "changes what reference_cache would keep"),
        ({"loss_type": "simpo"}, "loss simpo has none"),
    ],
)
def test_senseless_settings_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        replace(CONFIG, **settings)


def test_adapters_have_no_mean():
    lora, hard = LoraConfig(r=4), replace(CONFIG, ref_model_mixup_alpha=1.0)
    for preference in (CONFIG, PreferenceConfig(reference="ema")):
        with pytest.raises(UserError, match="mean of two LoRA adapters"):
            Config(lora=lora, preference=preference)
    with pytest.raises(UserError, match="mean of two LoRA adapters"):
        Config(lora=lora, preference=PreferenceConfig(reference="ema", ref_model_mixup_alpha=1.0))
    Config(lora=lora, preference=hard)
