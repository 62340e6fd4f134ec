"""Adapters: TRL's gradients, and the training that a separate reference gives."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.train_engines import random_pairs, trl_trainer
from srlm_fast.config import LoraConfig, PreferenceConfig, TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.model.adapters import POLICY, Adapters
from srlm_fast.train.loss import pair_loss
from srlm_fast.train.noise import Refinement
from srlm_fast.train.preference import PairForward, train_preference
from srlm_fast.train.reference import LiveReference, LoraReference
from srlm_fast.train.sft import train_sft

pytest.importorskip("peft", reason="peft is not installed (extra [peft])")

BASE = Path("base")
CONFIG = PreferenceConfig(
    learning_rate=3e-3, num_train_epochs=2, per_device_train_batch_size=5, logging_steps=1
)
REFINE = Refinement(alpha=0.3, lam=0.5, k_percent=40.0, window=6)
FAMILIES = ("llama", "qwen2", "gemma2")


def shift(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=g, dtype=torch.float64) / 5)


def adapted(family, dtype=torch.float64, **settings):
    """A model whose adapters were trained before."""
    config = AutoConfig.for_model(
        family, vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        tie_word_embeddings=family != "qwen2", initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    adapters = Adapters(model, LoraConfig(**{"r": 4, "lora_alpha": 4, **settings}), base=BASE)
    shift(adapters.model, 1)
    return adapters


def policy_of(model):
    return {n: p for n, p in model.named_parameters() if f".{POLICY}." in n}


def gradients(model, step):
    model.zero_grad()
    step().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def our_step(model, reference, pairs, layout, extrapolation=None):
    items = [((p.prompt_ids, p.chosen_ids), (p.prompt_ids, p.rejected_ids)) for p in pairs]
    forward = PairForward(model, items, CONFIG, layout, 0, extrapolation)
    loss = pair_loss(CONFIG)
    return lambda: forward(range(len(pairs)), reference, loss, scale=1 / len(pairs))[0].loss


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_trls(family, layout):
    pytest.importorskip("trl", reason="trl is not installed (extra [bench])")
    import peft

    ours = adapted(family, torch.float32)
    base = copy.deepcopy(ours.model).unload()
    settings = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, settings)
    peft.set_peft_model_state_dict(theirs, ours._state(POLICY))
    pairs = random_pairs(4, 9, 12, 61)
    trainer, batch = trl_trainer(theirs, None, pairs, loss_type=["sigmoid"], beta=CONFIG.beta)
    reference = ours.frozen()
    for model in (ours.model, theirs):
        shift(model, 2)
    expected = gradients(theirs, lambda: trainer.compute_loss(trainer.model, dict(batch)))
    found = gradients(ours.model, our_step(ours.model, LoraReference(reference), pairs, layout))
    assert len(found) == len(expected) == len(policy_of(ours.model))
    for name, gradient in expected.items():
        mine = found[name.replace(".default.", f".{POLICY}.")]
        assert (mine - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("refine", [None, REFINE])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_with_a_separate_reference(family, refine, checkpointing, pairs):
    """Bit for bit, and all that backward computes again is computed with the policy's adapter."""
    ours = adapted(family)
    twin = copy.deepcopy(ours.model)
    base = {n: p.detach().clone() for n, p in twin.named_parameters() if not p.requires_grad}
    apart = copy.deepcopy(twin)
    config = replace(CONFIG, gradient_checkpointing=checkpointing, micro_batch_size=2)
    found, logs = [], []
    for model, reference in ((ours.model, ours.frozen()), (twin, apart)):
        log = []
        summary = train_preference(
            model, reference, pairs, config, refine=refine, seed=0, pad_id=0, log=log.append
        )
        logs.append(log)
        found.append((summary, policy_of(model)))
    (mine, trained), (theirs, expected) = found
    assert mine == theirs and logs[0] == logs[1]
    assert mine["loss_first"] == pytest.approx(math.log(2), abs=1e-9)
    assert all(torch.equal(p, expected[name]) for name, p in trained.items())
    with ours.frozen(BASE).active() as model:
        for name, weight in base.items():
            assert torch.equal(model.get_parameter(name), weight)
    assert not any(torch.equal(p, policy_of(apart)[name]) for name, p in trained.items())


@pytest.mark.parametrize("refine", [None, REFINE])
def test_the_adapter_of_the_rounds_start_may_follow_the_policy(refine, pairs):
    """As a separate reference would, bit for bit; the base stays."""
    ours = adapted("llama")
    twin, apart = copy.deepcopy(ours.model), copy.deepcopy(ours.model)
    base = {n: p.detach().clone() for n, p in twin.named_parameters() if not p.requires_grad}
    config = replace(CONFIG, sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=2)
    found = []
    for model, reference in ((ours.model, ours.frozen()), (twin, apart)):
        log = []
        summary = train_preference(
            model, reference, pairs, config, refine=refine, seed=0, pad_id=0, log=log.append
        )
        found.append((summary, log, [*policy_of(model).values()]))
    assert found[0][:2] == found[1][:2] and found[0][0]["reference_updates"] == 3
    assert all(map(torch.equal, found[0][2], found[1][2]))
    with ours.frozen(BASE).active() as model:
        assert all(torch.equal(model.get_parameter(name), w) for name, w in base.items())


def test_adapters_that_cannot_follow_are_refused(pairs):
    ours = adapted("llama")
    soft = replace(CONFIG, sync_ref_model=True, ref_model_sync_steps=2)
    hard = replace(soft, ref_model_mixup_alpha=1.0)
    for config, reference, error in (
        (soft, ours.frozen(), pytest.raises(UserError, match="mean of two LoRA adapters")),
        (hard, ours.frozen(BASE), pytest.raises(ValueError, match="the round's start")),
    ):
        with error:
            train_preference(
                ours.model, reference, pairs, config, seed=0, pad_id=0, log=lambda _: None,
                reference_is_start=False,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_margins_start_at_exactly_zero(layout, dtype, pairs):
    """train_preference raises where one does not: with trained adapters, and with untrained ones
    against the base."""
    ours = adapted("llama", dtype)
    config = replace(CONFIG, layout=layout)
    train_preference(ours.model, ours.frozen(), pairs, config, seed=0, pad_id=0, log=lambda _: None)
    ours.load(BASE)
    train_preference(
        ours.model, ours.frozen(BASE), pairs, config, seed=0, pad_id=0, log=lambda _: None
    )


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("cache", "refine"), [("logps", None), ("states", REFINE)])
def test_cached_is_live(cache, refine, fixed, pairs, tmp_path):
    found = []
    for kind in ("none", cache):
        ours = adapted("llama")
        train_preference(
            ours.model, ours.frozen(BASE if fixed else None), pairs,
            replace(CONFIG, reference_cache=kind), refine=refine, seed=0, pad_id=0,
            reference_is_start=not fixed, log=lambda _: None, cache=tmp_path,
        )  # fmt: skip
        found.append(torch.cat([p.detach().flatten() for p in policy_of(ours.model).values()]))
    torch.testing.assert_close(*found, atol=1e-10, rtol=0)


def test_states_do_not_depend_on_adapters_that_are_off(pairs, tmp_path):
    """A run that goes on may have others beside the policy than the one that was interrupted."""
    names = []
    for others in (0, 1):
        ours = adapted("llama")
        reference = ours.frozen()
        if others:
            ours._fill("SFT", ours._state(POLICY))
        config = replace(CONFIG, reference_cache="states")
        train_preference(
            ours.model, reference, pairs, config, seed=0, pad_id=0, log=lambda _: None,
            cache=tmp_path,
        )  # fmt: skip
        names.append({p.name for p in tmp_path.iterdir()})
    assert names[0] == names[1]


@pytest.mark.parametrize("change", [{"lora_alpha": 64}, {"use_rslora": True}])
@pytest.mark.parametrize("cache", ["logps", "states"])
def test_another_scaling_is_another_training(change, cache, pairs, tmp_path):
    """It is in no weight: neither a checkpoint nor a cached reference may be taken for it."""

    def train(folder, **settings):
        ours = adapted("llama", **settings)
        config = replace(CONFIG, reference_cache=cache, save_steps=1)
        summary = train_preference(
            ours.model, ours.frozen(), pairs, config, seed=0, pad_id=0, log=lambda _: None,
            cache=folder, checkpoint=folder,
        )  # fmt: skip
        return summary, policy_of(ours.model)

    train(tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    found, expected = (train(folder, **change) for folder in (tmp_path, tmp_path / "alone"))
    assert found[0] == expected[0]
    assert all(torch.equal(p, expected[1][name]) for name, p in found[1].items())
    assert not kept & {path.name for path in (tmp_path / "alone").iterdir()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trains_adapters_alone(checkpointing, rows):
    ours = adapted("gemma2")
    base = [p.detach().clone() for p in ours.model.parameters() if not p.requires_grad]
    config = TrainConfig(
        learning_rate=1e-2, num_train_epochs=4, gradient_checkpointing=checkpointing
    )
    summary = train_sft(ours.model, rows, config, seed=0, pad_id=0, log=lambda _: None)
    assert summary["loss_last"] < summary["loss_first"]
    after = [p for p in ours.model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(base, after, strict=True))


def test_a_bf16_step_of_a_micro_batch_keeps_no_second_model(pairs):
    """Of the parameters that are there, only adapters are there twice."""
    ours = adapted("llama", torch.bfloat16)
    count = sum(p.numel() for p in ours.model.parameters())
    train_preference(ours.model, ours.frozen(), pairs, CONFIG, seed=0, pad_id=0, log=lambda _: None)
    more = sum(p.numel() for p in ours.model.parameters()) - count
    assert more == sum(p.numel() for p in policy_of(ours.model).values())


def test_a_live_reference_takes_the_same_weights(pairs):
    """With SPA's mixed logits too, the shared head gives what a head of its own gives."""
    ours = adapted("gemma2")
    frozen = ours.frozen()
    shift(ours.model, 2)
    apart = copy.deepcopy(ours.model)
    apart.set_adapter("round_start")
    found = [
        gradients(ours.model, our_step(ours.model, reference, pairs, "shared", extrapolation=0.5))
        for reference in (LoraReference(frozen), LiveReference(apart))
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
