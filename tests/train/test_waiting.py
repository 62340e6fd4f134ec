"""No host sync inside a step, on a pretended GPU: see tests/pretended_gpu.py."""

from dataclasses import replace

import pytest
import torch

from srlm_fast.config import LoraConfig, PreferenceConfig, TrainConfig
from srlm_fast.model.adapters import ROUND_START, FrozenAdapter, add_lora
from srlm_fast.train import fit
from srlm_fast.train.noise import Refinement
from srlm_fast.train.online import train_online
from srlm_fast.train.preference import train_preference
from srlm_fast.train.sft import train_sft
from tests.pretended_gpu import on_gpu
from tests.train import tiny

STEPS = {"learning_rate": 1e-3, "per_device_train_batch_size": 6, "logging_steps": 100}
CONFIG = PreferenceConfig(**STEPS, num_train_epochs=3, micro_batch_size=3)
WAYS = {
    "dpo": {},
    "without micro-batches": {"micro_batch_size": 0},
    "ipo": {"loss_type": "ipo"},
    "aot": {"loss_type": "aot", "micro_batch_size": 0},
    "likelihood": {"rpo_alpha": 0.5},
    "recomputed layers": {"gradient_checkpointing": True},
    "no clipping": {"max_grad_norm": 0.0},
    "a moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "cached log-probs": {"reference_cache": "logps"},
    "cached states": {"reference_cache": "states"},
}


@pytest.fixture
def steps(gpu, monkeypatch):
    """The steps that were taken; but in the first, which is checked, nothing may wait."""
    taken, learn = [], fit._Training._learn

    def watched(self, items):
        if self.step:
            with gpu.nothing_waits():
                learn(self, items)
        else:
            learn(self, items)
        taken.append(self.step)

    monkeypatch.setattr(fit._Training, "_learn", watched)
    return taken


def train(config=CONFIG, refine=None, dtype=torch.bfloat16, pairs=None, **options):
    model, reference = (on_gpu(tiny.new_model(dtype=dtype)) for _ in range(2))
    reference = model if config.reference_cache != "none" else reference
    return train_preference(
        model, reference, pairs or tiny.draw_pairs(), config, refine=refine, seed=0, pad_id=0,
        log=lambda row: None, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_no_step_waits(steps, way, dtype, tmp_path):
    summary = train(replace(CONFIG, **WAYS[way]), dtype=dtype, cache=tmp_path)
    assert steps == list(range(6))
    assert summary["skipped_steps"] == 0


@pytest.mark.parametrize("tau", ["window", "dataset", "official"])
def test_no_step_of_spa_waits(steps, tau):
    summary = train(refine=Refinement(tau=tau, interval=2, k_percent=40.0, warmup_fraction=0.2))
    assert steps == list(range(6))
    assert any(flag is not None for flag in summary["flags"])


def test_no_step_waits_for_labels_of_their_own_smoothing(steps):
    pairs = [replace(p, label_smoothing=0.1 * (i % 3)) for i, p in enumerate(tiny.draw_pairs())]
    train(pairs=pairs)
    assert steps == list(range(6))


def test_no_step_of_sft_waits(steps):
    model = on_gpu(tiny.new_model(dtype=torch.bfloat16))
    config = TrainConfig(**STEPS, num_train_epochs=1, micro_batch_size=3)
    train_sft(model, tiny.draw_rows(), config, seed=0, pad_id=0, log=lambda row: None)
    assert steps == list(range(4))


def test_no_online_step_waits_once_its_pairs_are_drawn(steps):
    model, reference = (on_gpu(tiny.new_model(dtype=torch.bfloat16)) for _ in range(2))
    train_online(
        model, reference, lambda step: tiny.draw_pairs()[3 * step :][:3], 3, CONFIG,
        num_pairs=9, seed=0, pad_id=0, log=lambda row: None,
    )  # fmt: skip
    assert steps == list(range(3))


def test_no_step_with_adapters_waits(steps):
    pytest.importorskip("peft")
    model = on_gpu(add_lora(tiny.new_model(dtype=torch.bfloat16), LoraConfig(r=4)))
    model.add_adapter(ROUND_START, model.peft_config["policy"], autocast_adapter_dtype=False)
    model.set_adapter("policy")
    train_preference(
        model, FrozenAdapter(model, None), tiny.draw_pairs(), CONFIG, seed=0, pad_id=0,
        log=lambda row: None,
    )  # fmt: skip
    assert steps == list(range(6))
