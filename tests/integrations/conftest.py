"""What the tests of TRL's DPO train: tiny models, token ids, a maker of trainers."""

import copy
import gc

import pytest
import torch

from benchmarks.train_engines import policy_and_reference, random_pairs
from tests.integrations import tokens


@pytest.fixture(scope="session", autouse=True)
def cheap_collections():
    """Trainers collect garbage when they begin and when they end; what was imported is none."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def models():
    from tests.integrations import dpo_runs

    return policy_and_reference(dpo_runs.SHAPE, torch.float32)


@pytest.fixture(scope="session")
def rows():
    import datasets

    from tests.integrations import dpo_runs

    made = random_pairs(len(dpo_runs.CUTS), 9, 12, dpo_runs.SHAPE["vocab_size"])
    return datasets.Dataset.from_list(
        [
            {
                "prompt_ids": list(p.prompt_ids),
                "chosen_ids": list(p.chosen_ids[:a]),
                "rejected_ids": list(p.rejected_ids[:b]),
            }
            for p, (a, b) in zip(made, dpo_runs.CUTS, strict=True)
        ]
    )


@pytest.fixture(scope="session")
def tokenizer():
    return tokens.tokenizer()


@pytest.fixture
def make(models, rows, tokenizer, tmp_path):
    """A trainer of `kind` on copies of the models."""
    from srlm_fast.integrations.trl import SrlmDPOConfig

    def make_trainer(kind, *, policy=None, reference=None, config=None, **options):
        options = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4,
            "learning_rate": 1e-3, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0,
            "max_steps": 20, "logging_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant",
        } | options  # fmt: skip
        names = ("eval_dataset", "peft_config", "compute_metrics")
        given = {name: options.pop(name) for name in names if name in options}
        data = options.pop("data", rows)
        return kind(
            model=policy or copy.deepcopy(models[0]),
            ref_model=None if "peft_config" in given else reference or copy.deepcopy(models[1]),
            args=(config or SrlmDPOConfig)(**options),
            train_dataset=data,
            processing_class=tokenizer,
            **given,
        )

    return make_trainer
