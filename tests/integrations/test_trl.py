"""TRL's trainers with our head: the same losses, gradients, metrics and files."""

import copy
from functools import partial

import pytest
import torch

from benchmarks.train_engines import policy_and_reference, random_pairs
from srlm_fast.data.records import Judgement
from srlm_fast.errors import UserError

trl = pytest.importorskip("trl", reason="trl is not installed (extra [trl])")
datasets = pytest.importorskip("datasets", reason="datasets is not installed (with trl)")

import transformers  # noqa: E402

from srlm_fast.integrations.trl import (  # noqa: E402
    SrlmDPOConfig,
    SrlmDPOTrainer,
    accelerate,
    judge_reward,
    patch_logprobs,
)
from tests.integrations import tokens  # noqa: E402

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "initializer_range": 0.3,
}  # fmt: skip
CUTS = ((12, 12), (5, 5), (1, 12), (7, 3), (2, 2), (12, 4), (8, 8), (3, 9))
TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return policy_and_reference(SHAPE, torch.float32)


@pytest.fixture(scope="module")
def rows():
    made = random_pairs(len(CUTS), 9, 12, SHAPE["vocab_size"])
    return datasets.Dataset.from_list(
        [
            {
                "prompt_ids": list(p.prompt_ids),
                "chosen_ids": list(p.chosen_ids[:a]),
                "rejected_ids": list(p.rejected_ids[:b]),
            }
            for p, (a, b) in zip(made, CUTS, strict=True)
        ]
    )


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.tokenizer()


class OnTokenIds(trl.DPOTrainer):
    """TRL tokenises what it is given; our rows are token ids."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


@pytest.fixture
def make(models, rows, tokenizer, tmp_path):
    """A trainer of `kind` on copies of the models."""

    def make_trainer(kind, *, policy=None, reference=None, config=SrlmDPOConfig, **options):
        options = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4,
            "learning_rate": 1e-3, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0,
            "max_steps": 20, "logging_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant",
        } | options  # fmt: skip
        given = {k: options.pop(k) for k in ("eval_dataset", "peft_config") if k in options}
        data = options.pop("data", rows)
        return kind(
            model=policy or copy.deepcopy(models[0]),
            ref_model=None if "peft_config" in given else reference or copy.deepcopy(models[1]),
            args=config(**options),
            train_dataset=data,
            processing_class=tokenizer,
            **given,
        )

    return make_trainer


def record(trainer):
    """The loss and gradients of one batch, and then all that is logged in training."""
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer.log({})  # what that batch was measured as
    trainer._total_train_tokens = 0
    trainer.state.log_history.clear()
    trainer.train()
    return loss.detach(), found, trainer.state.log_history


def check_equal(found, expected, what=""):
    """From equal weights equal losses and gradients, and equal ways from there."""
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-5, abs=1e-7), what
    assert found[1].keys() == expected[1].keys()
    # discopop weighs by sigmoid(x / 0.05), twenty times the rounding of a log-prob.
    tolerance = 1e-4 if what == "discopop" else 1e-5
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name
    check_logs(found[2], expected[2])


def check_logs(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            if "runtime" not in name and "per_second" not in name:
                wanted = pytest.approx(theirs[name], rel=1e-5 if name == "loss" else 1e-4, abs=1e-5)
                assert ours[name] == wanted, (name, theirs["step"])


def compare(make, what="", **options):
    """TRL's trainer, the same accelerated, and ours."""
    expected = record(make(OnTokenIds, **options))
    check_equal(record(accelerate(make(OnTokenIds, **options))), expected, what)
    trainer = make(SrlmDPOTrainer, **options)
    check_equal(record(trainer), expected, what)
    return trainer


def options_of(kind):
    smoothing = 0.1 if kind in ("exo_pair", "robust") else 0.0
    # Squares of log-ratios: at the others' rate training diverges, and roundings with it.
    rate = 1e-5 if kind == "sppo_hard" else 1e-3
    return {"loss_type": [kind], "label_smoothing": smoothing, "learning_rate": rate}


@pytest.mark.parametrize("kind", TYPES)
def test_every_loss_has_the_gradients_of_trl(make, kind):
    trainer = compare(make, kind, **options_of(kind))
    assert (trainer._loss is None) == (kind == "sft")


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


def test_adapters(make):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    compare(make, peft_config=peft.LoraConfig(r=4, init_lora_weights=False))


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


def test_spa_goes_on_from_a_checkpoint_with_what_it_knew(make, rows):
    data = datasets.concatenate_datasets([rows] * 4)
    options = {"loss_type": ["spa"], "spa_warmup_fraction": 0.0, "data": data, "save_steps": 10}
    straight = make(SrlmDPOTrainer, save_strategy="steps", **options)
    straight.train()
    folder = straight.args.output_dir + "/checkpoint-10"
    resumed = make(SrlmDPOTrainer, save_strategy="steps", **options)
    resumed.train(resume_from_checkpoint=folder)
    found, expected = (
        {row["step"]: row for row in t.state.log_history if "spa/tau" in row}
        for t in (resumed, straight)
    )
    assert expected[15]["spa/tau"] != 0
    for step in range(11, 21):
        for name in ("loss", "spa/tau", "spa/flagged_share"):
            assert found[step][name] == pytest.approx(expected[step][name], abs=1e-6), step


def test_a_batch_without_a_label_is_a_differentiable_zero(make):
    trainer = accelerate(make(OnTokenIds))
    ids = torch.ones(2, 5, dtype=torch.int64)
    out = trainer.model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0 and not out.label_mask.any()
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_evaluation_is_trls(make, rows):
    plain = make(OnTokenIds, eval_dataset=rows)
    expected = plain.evaluate()
    for trainer in (
        accelerate(make(OnTokenIds, eval_dataset=rows)), make(SrlmDPOTrainer, eval_dataset=rows)
    ):  # fmt: skip
        assert trainer.evaluate().keys() == expected.keys()
        check_logs(trainer.state.log_history, plain.state.log_history)


def test_other_trainers_inside_the_patch(rows, models, tokenizer, tmp_path):
    texts = datasets.Dataset.from_list(
        [{"input_ids": r["prompt_ids"] + r["chosen_ids"]} for r in rows]
    )
    losses = []
    for patched in (False, True):
        trainer = trl.SFTTrainer(
            model=copy.deepcopy(models[0]),
            args=trl.SFTConfig(
                output_dir=str(tmp_path), max_steps=3, use_cpu=True, bf16=False, report_to=[],
                logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, optim="sgd",
                save_strategy="no", disable_tqdm=True, loss_type="chunked_nll",
            ),
            train_dataset=texts,
            processing_class=tokenizer,
        )  # fmt: skip
        if patched:
            with patch_logprobs():
                trainer.train()
        else:
            trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert trl.trainer.utils._ChunkedLogProbFunction.__name__ == "ChunkedLogProbFunction"


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


def test_what_cannot_be_is_refused_at_the_start(make, monkeypatch):
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
    from srlm_fast.integrations.trl.version import check_trl

    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.17.2")
    with pytest.raises(UserError, match=r"works with TRL 1\.16, found 1\.17\.2"):
        check_trl()


def test_a_second_call_after_training_changes_nothing(make):
    trainer = accelerate(make(OnTokenIds, bf16=True, max_steps=1))
    trainer.train()
    forward = trainer.model.forward
    assert accelerate(trainer).model.forward == forward


def test_a_judge_is_a_reward_function(tokenizer):
    class Length:
        name = "length"

        def score(self, prompts, candidates):
            assert [len(group) for group in candidates] == [2, 1]
            assert [prompt[0].content for prompt in prompts] == ["Why?", "How?"]
            return [
                [Judgement(len(s.response) or None) for s in group] for group in candidates
            ]  # fmt: skip

    class Template:
        encode_prompt = staticmethod(lambda prompt: [1])
        encode_response = staticmethod(lambda prompt, text: [2])

    reward = judge_reward(Length(), Template())
    assert reward.__name__ == "length_judge"
    parts = [{"role": "user", "content": [{"type": "text", "text": "How?"}]}]
    answers = ["abc", "", [{"role": "assistant", "content": "yes"}]]
    assert reward(prompts=["Why?", "Why?", parts], completions=answers) == [3, None, 3]


def test_a_model_without_trls_head_is_refused(models):
    class Trainer:
        model = copy.deepcopy(models[0])

        class accelerator:
            unwrap_model = staticmethod(lambda model: model)

    with pytest.raises(UserError, match="no fused LM head"):
        accelerate(Trainer())
