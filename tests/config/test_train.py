"""Settings of preference training that would change nothing."""

from typing import Any

import pytest

from srlm_fast.config import PreferenceConfig
from srlm_fast.errors import UserError


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"loss_type": "simpo", "reference": "fixed"}, "loss simpo has no reference"),
        ({"loss_type": "simpo", "reference_cache": "logps"}, "loss simpo has no reference"),
        ({"ref_model_sync_steps": 9}, "ref_model_sync_steps needs sync_ref_model"),
        ({"ref_model_mixup_alpha": 0.9}, "needs sync_ref_model: true, or reference: ema"),
        ({"ref_model_mixup_alpha": 0.9, "reference": "fixed"}, "or reference: ema"),
    ],
)
def test_a_reference_that_nothing_uses(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        PreferenceConfig(**settings)


def test_a_reference_that_moves() -> None:
    assert PreferenceConfig(reference="ema", ref_model_mixup_alpha=0.9).reference == "ema"
    assert PreferenceConfig(sync_ref_model=True, ref_model_sync_steps=9).sync_ref_model
