"""`accelerate` and `patch_logprobs`: TRL's contract of `fused_lm_head=True`, field by field."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
import transformers

from srlm_fast.errors import UserError

trl = pytest.importorskip("trl", reason="trl is not installed (extra [trl])")

import trl.trainer.utils as trl_utils  # noqa: E402
from accelerate import Accelerator  # noqa: E402

from srlm_fast.integrations.trl import SrlmDPOTrainer, accelerate, patch_logprobs  # noqa: E402
from srlm_fast.integrations.trl import fused_head as module  # noqa: E402
from srlm_kernels import LinearLogp  # noqa: E402
from tests.integrations.dpo_runs import OnTokenIds  # noqa: E402

SHAPE = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "output_router_logits": True, "router_aux_loss_coef": 0.1,
}  # fmt: skip
# What there is beside hidden @ weight: a cap, a factor of each name, a divisor, a bias, experts.
FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "falcon_h1": {"lm_head_multiplier": 0.4, "mamba_d_ssm": 32, "mamba_n_heads": 4,
                  "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    "granite": {"logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 2.0},
    "phi": {},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2},
    "qwen3_moe": EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1},
}  # fmt: skip
IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 7:] = 0
LABELS = IDS.masked_fill((torch.arange(9) < 3) | (MASK == 0), -100)
CALLS = {
    "labels": {"labels": LABELS},
    "shifted labels": {"shift_labels": LABELS.roll(-1, 1)},
    "a count": {"labels": LABELS, "num_items_in_batch": torch.tensor(5)},
    "no label": {"labels": torch.full_like(LABELS, -100)},
}
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def heads(model, **options):
    """The model with TRL's head, and with ours in its place."""
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    for each in (theirs, ours):
        trl_utils.add_fused_lm_head(each, **{"outputs": OUTPUTS, **options})
    accelerate(SimpleNamespace(model=ours, accelerator=Accelerator(cpu=True)))
    return theirs, ours


def check_call(theirs, ours, **call):
    """Every field, and the gradients of loss and log-probs."""
    outs = [each(attention_mask=MASK, fused_lm_head=True, **call) for each in (theirs, ours)]
    gradients = []
    for model, out in zip((theirs, ours), outs, strict=True):
        upstream = torch.linspace(-1, 1, out.log_probs.numel()).view_as(out.log_probs)
        loss = out.loss + (upstream * out.log_probs).sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    for name in (*OUTPUTS, "loss", "label_mask", "aux_loss"):
        a, b = (getattr(out, name) for out in outs)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, msg=name)
    assert len(gradients[0]) == len(gradients[1])
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm() + 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_trls_contract(family):
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    pair = heads(model.eval())
    for name in CALLS if family in ("llama", "qwen3_moe") else ("labels",):
        check_call(*pair, input_ids=IDS, **CALLS[name])


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"cast_lm_head_to_fp32": True}, {"outputs": ("log_probs",)}]
)
def test_the_options_of_trls_head(options):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    check_call(*heads(model, **options), input_ids=IDS, labels=LABELS)


def test_a_head_in_fp32_on_a_body_in_bf16():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).bfloat16()
    model.lm_head.float()
    check_call(*heads(model, cast_lm_head_to_fp32=True), input_ids=IDS, labels=LABELS)


def test_images_reach_a_vision_model():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=4, patch_size=2,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SHAPE), image_token_index=59,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = IDS.where(IDS != 59, 1).clone()
    ids[:, :4] = 59  # the patches of an image of 4 x 4
    pixels = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(LABELS == -100, -100).masked_fill(ids == 59, -100)
    check_call(*heads(model), input_ids=ids, labels=labels, pixel_values=pixels)


def test_labels_follow_the_head_of_a_model_that_is_split_over_devices(monkeypatch):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    _, ours = heads(model)
    ours.lm_head.to("meta")

    def scored(hidden, weight, target, **_):
        assert hidden.device == weight.device == target.device
        return LinearLogp(hidden.new_zeros(len(target)))

    monkeypatch.setattr(module, "linear_logp_with_entropy", scored)
    out = ours(input_ids=IDS, labels=LABELS, fused_lm_head=True)
    assert out.label_mask.device.type == out.log_probs.device.type == "meta"


def test_packed_batches_are_not_for_a_model_that_is_split_over_devices(make):
    trainer = make(SrlmDPOTrainer)
    trainer.model.hf_device_map = {"model": 0, "lm_head": 1}
    assert "several devices" in trainer._padded_because()


def test_without_the_flag_the_forward_is_the_models_own():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    _, ours = heads(model)
    expected = model(input_ids=IDS, labels=LABELS)
    found = ours(input_ids=IDS, labels=LABELS)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    sampled = [m.generate(IDS, max_new_tokens=3, do_sample=False) for m in (model, ours)]
    assert torch.equal(*sampled)


@pytest.mark.parametrize("trainer", [None, SimpleNamespace(model=None)])
def test_what_is_no_trainer_is_refused(trainer):
    with pytest.raises(UserError, match="takes a trainer of TRL's, not a"):
        accelerate(trainer)


def test_a_trainer_without_trls_head_is_refused(models, tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer = transformers.Trainer(model=copy.deepcopy(models[0]), args=arguments)
    with pytest.raises(UserError, match="no fused LM head"):
        accelerate(trainer)


def test_a_second_call_after_training_changes_nothing(make):
    trainer = accelerate(make(OnTokenIds, bf16=True, max_steps=1))
    trainer.train()
    forward = trainer.model.forward
    assert accelerate(trainer).model.forward == forward
    ours = make(SrlmDPOTrainer)
    forward = ours.model.forward
    assert accelerate(ours).model.forward == forward


def test_a_model_that_compiles_itself():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPE, "num_hidden_layers": 1})
    theirs, ours = heads(transformers.LlamaForCausalLM(config))
    ours.compile(backend="eager")
    check_call(theirs, ours, input_ids=IDS, labels=LABELS)
    torch._dynamo.reset()


def test_an_adapter_that_is_put_on_the_head_later_is_refused(make):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    trainer = accelerate(make(OnTokenIds))
    trainer.model.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(UserError, match="leave it out of target_modules"):
        trainer.model(input_ids=IDS, labels=LABELS, fused_lm_head=True)


def test_zero3_is_refused_at_the_start_and_by_the_op():
    torch.manual_seed(0)
    _, ours = heads(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)))
    arguments = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    with pytest.raises(UserError, match="use ZeRO-2 or FSDP2"):
        accelerate(SimpleNamespace(model=ours, accelerator=None, args=arguments))
    ours.lm_head.weight.data = torch.empty(0)  # as DeepSpeed leaves it
    with pytest.raises(ValueError, match=r"inside deepspeed\.zero\.GatheredParameters"):
        ours(input_ids=IDS, labels=LABELS, fused_lm_head=True)


def test_the_patch_ends_with_the_last_block_whatever_happens_inside():
    before = trl_utils._ChunkedLogProbFunction
    with pytest.raises(KeyError), patch_logprobs():
        with patch_logprobs():
            pass
        assert trl_utils._ChunkedLogProbFunction is not before
        raise KeyError
    assert trl_utils._ChunkedLogProbFunction is before


def test_threads_may_leave_the_patch_in_any_order():
    before = trl_utils._ChunkedLogProbFunction
    entered, left, seen = threading.Event(), threading.Event(), []

    def other():
        with patch_logprobs():
            entered.set()
            left.wait()
            seen.append(trl_utils._ChunkedLogProbFunction)

    thread = threading.Thread(target=other)
    with patch_logprobs():
        thread.start()
        entered.wait()
    left.set()
    thread.join()
    assert seen[0] is not before
    assert trl_utils._ChunkedLogProbFunction is before
