"""TRL's DPO with our head: the same losses, gradients and metrics, for whatever it can do."""

import copy
import importlib.metadata
import inspect
import re
from functools import partial

import pytest
import torch

from benchmarks.train_engines import policy_and_reference
from srlm_fast.errors import UserError

trl = pytest.importorskip("trl", reason="trl is not installed (extra [trl])")
datasets = pytest.importorskip("datasets", reason="datasets is not installed (with trl)")

import transformers  # noqa: E402

from srlm_fast.integrations.trl import SrlmDPOTrainer, accelerate  # noqa: E402
from srlm_fast.integrations.trl.packed import pack  # noqa: E402
from tests.integrations.dpo_runs import (  # noqa: E402
    SHAPE,
    OnTokenIds,
    check_equal,
    compare,
    record,
)

TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


def options_of(kind):
    smoothing = 0.1 if kind in ("exo_pair", "robust") else 0.0
    # Squares of log-ratios: at the others' rate training diverges, and roundings with it.
    rate = 1e-5 if kind == "sppo_hard" else 1e-3
    return {"loss_type": [kind], "label_smoothing": smoothing, "learning_rate": rate}


@pytest.mark.parametrize("kind", TYPES)
def test_every_loss_has_the_gradients_of_trl(make, kind):
    trainer = compare(make, kind, **options_of(kind))
    assert (trainer._loss is None) == (kind == "sft")


def test_the_types_are_all_that_trl_has():
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(TYPES)


MORE = {
    "weighted losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    "WPO": {"use_weighting": True},
    "ld_alpha": {"ld_alpha": 0.5},
    "f-divergence": {"f_divergence_type": "js_divergence"},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "truncation": {"max_length": 14},
    "cut from the left": {"max_length": 14, "truncation_mode": "keep_end"},
}


@pytest.mark.parametrize("name", MORE)
def test_every_option_of_trl(make, name):
    compare(make, name, **MORE[name])


# Two steps show these: what they change is the loss, the batches or the logging.
OPTIONS = {
    # Label smoothing is ignored by most losses, and not by these of quantiles.
    "smoothed sigmoid": {"label_smoothing": 0.2, "loss_weights": [0.5]},
    "smoothed aot": {"loss_type": ["aot"], "label_smoothing": 0.2, "loss_weights": [0.5]},
    "smoothed aot_unpaired": {"loss_type": ["aot_unpaired"], "label_smoothing": 0.2, "beta": 0.7},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "discopop's temperature": {"loss_type": ["discopop"], "discopop_tau": 1.0},
    # exp(-log-ratio) has the absolute rounding of a sum as its relative one: short responses.
    "forward KL": {"f_divergence_type": "forward_kl", "max_length": 12},
    "alpha divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3,
                         "max_length": 12},
    "WPO of a divergence": {"use_weighting": True, "loss_type": ["sigmoid", "ipo"],
                            "f_divergence_type": "js_divergence"},
    "ld_alpha of a cache": {"ld_alpha": 0.0, "precompute_ref_log_probs": True},
    "a reference that follows": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "uneven batches": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
                       "padding_free": True, "pad_to_multiple_of": 16, "max_length": None,
                       "logging_steps": 2, "max_steps": 3},
    "reentrant": {"gradient_checkpointing": True,
                  "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "dropout and NEFTune": {"disable_dropout": False, "neftune_noise_alpha": 5.0},
    "all at once": {"gradient_checkpointing": True, "per_device_train_batch_size": 2,
                    "gradient_accumulation_steps": 3, "precompute_ref_log_probs": True,
                    "optim": "adamw_torch", "max_grad_norm": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore:batches are padded")
def test_options_and_their_company(make, name):
    compare(make, name, **{"max_steps": 2, **OPTIONS[name]})


def test_adapters(make):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    compare(make, peft_config=peft.LoraConfig(r=4, init_lora_weights=False))
    compare(
        make, peft_config=peft.LoraConfig(r=4, init_lora_weights=False), max_steps=2,
        gradient_checkpointing=True, precompute_ref_log_probs=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip


@pytest.fixture
def untied(make):
    """`make` with models whose head has a weight of its own, and a change to the policy."""

    def make_trainer(kind, change=lambda model: model, **options):
        torch.manual_seed(0)
        shape = SHAPE | {"tie_word_embeddings": False}
        model = change(policy_and_reference(shape, torch.float32)[0])
        return make(kind, policy=model, max_steps=2, **options)

    return make_trainer


def test_a_head_that_is_trained_beside_adapters(untied):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, init_lora_weights=False, modules_to_save=["lm_head"])
    trainer = compare(untied, peft_config=config)
    assert any("lm_head" in n for n, p in trainer.model.named_parameters() if p.requires_grad)


def test_adapters_that_were_trained_before_are_their_own_reference(untied):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, init_lora_weights=False)
    trainer = compare(
        untied, change=lambda model: peft.get_peft_model(model, config), peft_config=None
    )
    assert "ref" in trainer.model.peft_config


def test_adapters_of_transformers_own_are_no_peft_model(untied):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted(model):
        model.add_adapter(
            peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])
        )  # fmt: skip
        return model

    compare(untied, change=adapted)


@pytest.mark.filterwarnings("ignore:batches are padded")
def test_prompt_learning(make):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    compare(make, peft_config=config, max_steps=2)


def test_an_adapter_on_the_head_is_refused(make):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for kind in (OnTokenIds, SrlmDPOTrainer):
        with pytest.raises((ValueError, UserError), match=r"Remove `'lm_head'`"):
            make(kind, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 3.0}),
        (
            "mixtral",
            {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1},
        ),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
@pytest.mark.filterwarnings("ignore:batches are padded")
def test_models_whose_logits_or_loss_are_their_own(make, family, options):
    shape = SHAPE | {"head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(family, **shape, **options)
    torch.manual_seed(0)
    models = [
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for _ in range(2)
    ]

    def on_copies(kind, **more):
        policy, reference = (copy.deepcopy(model) for model in models)
        return make(kind, policy=policy, reference=reference, **more)

    compare(on_copies, family)


def test_autocast_is_trls_to_its_rounding(make, models):
    """TRL's default: bf16 products of fp32 weights."""
    results = [
        record(trainer)
        for trainer in (
            make(OnTokenIds, bf16=True),
            accelerate(make(OnTokenIds, bf16=True)),
            make(SrlmDPOTrainer, bf16=True),
        )
    ]
    plain = results[0]
    for found in results[1:]:
        assert found[0] == pytest.approx(float(plain[0]), abs=0.05)
        for name, gradient in plain[1].items():
            assert (found[1][name] - gradient).norm() <= 0.1 * gradient.norm(), name
    start = make(SrlmDPOTrainer, bf16=True, reference=copy.deepcopy(models[0]))
    assert record(start)[2][0]["rewards/margins"] == 0  # one path for both models


@pytest.mark.parametrize(("family", "options"), [("gemma2", {"final_logit_softcapping": 3.0})])
def test_a_reference_of_another_kind_has_its_own_logits(make, family, options):
    shape = SHAPE | {"head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(family, **shape, **options)
    torch.manual_seed(0)
    other = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")

    def against_other(kind, **more):
        return make(kind, reference=copy.deepcopy(other), **more)

    assert compare(against_other)._loss is None


def test_empty_responses_and_prompts_cut_off_are_trls(make, rows):
    lists = rows.to_list()
    lists[0]["chosen_ids"], lists[3]["rejected_ids"] = [], []
    lists[5] |= {"chosen_ids": [], "rejected_ids": []}
    compare(partial(make, data=datasets.Dataset.from_list(lists)))
    compare(make, max_length=5, truncation_mode="keep_end")  # shorter than some responses


def test_micro_batches_without_a_label_are_trls(make, rows):
    lists = rows.to_list()
    for row in lists[:6]:
        row |= {"chosen_ids": [], "rejected_ids": []}
    data = datasets.Dataset.from_list(lists)
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    compare(partial(make, data=data), max_steps=2, **alone)


def test_a_stream_of_rows(make, rows):
    compare(partial(make, data=rows.to_iterable_dataset()), max_steps=2)


def test_spa_flags_pairs_and_logs_its_threshold(make):
    trainer = make(SrlmDPOTrainer, loss_type=["spa"], spa_warmup_fraction=0.0)
    trainer.train()
    row = trainer.state.log_history[-2]
    assert {"spa/tau", "spa/flagged_share", "spa/extrapolated_margin"} <= row.keys()
    plain = make(SrlmDPOTrainer)
    plain.train()
    assert row["loss"] != plain.state.log_history[-2]["loss"]


def test_spa_without_refinement_is_dpo(make):
    trainer = make(SrlmDPOTrainer, loss_type=["spa"], spa_warmup_fraction=1.0)
    found = record(trainer)
    for row in found[2]:
        for name in [name for name in row if name.startswith("spa/")]:
            assert name != "spa/flagged_share" or row.pop(name) == 0
            row.pop(name, None)
    check_equal(found, record(make(SrlmDPOTrainer)))


OUT_OF_RANGE = {
    "label_smoothing": {"loss_type": ["robust"], "label_smoothing": 0.5},
    "beta": {"beta": 0.0},
    "tau must": {"loss_type": ["discopop"], "discopop_tau": -1.0},
    "spa.alpha": {"loss_type": ["spa"], "spa_alpha": 2.0},
    "spa_tau must be window or official": {"loss_type": ["spa"], "spa_tau": "dataset"},
}


@pytest.mark.parametrize("message", OUT_OF_RANGE)
def test_a_setting_out_of_range_is_refused_at_the_start(make, message):
    with pytest.raises(UserError, match=message):
        make(SrlmDPOTrainer, **OUT_OF_RANGE[message])


def test_what_cannot_be_is_refused_at_the_start(make):
    with pytest.raises(UserError, match="precompute_ref_log_probs"):
        make(SrlmDPOTrainer, loss_type=["spa"], precompute_ref_log_probs=True)
    with pytest.raises(UserError, match="SrlmDPOConfig"):
        make(SrlmDPOTrainer, loss_type=["spa"], config=trl.DPOConfig)
    with pytest.raises(UserError, match="beside it"):
        make(SrlmDPOTrainer, loss_type=["spa", "sft"])
    with pytest.raises(UserError, match="unknown loss_type 'r_dpo'"):
        make(SrlmDPOTrainer, loss_type=["r_dpo"])
    with pytest.raises(UserError, match="torch_compile"):
        make(SrlmDPOTrainer, torch_compile=True)
    with pytest.warns(UserWarning, match="NEFTune"):
        make(SrlmDPOTrainer, neftune_noise_alpha=5.0)


def test_another_trl_and_none_are_refused(monkeypatch):
    from srlm_fast.integrations.trl.version import check_trl

    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.17.2")
    with pytest.raises(UserError, match=r"works with TRL 1\.16, found 1\.17\.2: pip install"):
        check_trl()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(UserError, match=r"pip install 'srlm_fast\[trl\]'"):
        check_trl()


def test_what_a_batch_knows_on_the_host_stays_there():
    """Ends of sequences on a GPU would be waited for in every step."""
    ids, ones = torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    scored = torch.tensor([[0, 0, 1, 1]] * 2)
    batch = {"input_ids": ids, "attention_mask": ones, "completion_mask": scored}
    packed = pack(batch).to("meta")
    assert packed.target.device.type == packed.rows.device.type == "meta"
    assert packed.cu_seqlens.tolist() == [0, 2, 4]
