"""OpenRLHF's Actor with our head: in OpenRLHF where it is installed, else in a stand-in with the
published signature and names."""

import importlib
import inspect
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from srlm_fast.errors import UserError
from srlm_fast.integrations import openrlhf as ours

SHAPE = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
# openrlhf.models.actor.Actor.forward of 0.11.2.
PARAMETERS = [
    "self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits",
    "return_logprobs", "ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs",
]  # fmt: skip


def stand_in():
    """A module with the names of openrlhf.models.actor, and what they compute without packing."""
    module = ModuleType("openrlhf.models.actor")

    def log_probs_from_logits(logits, labels, temperature=1.0):
        logp = (logits / temperature).log_softmax(-1)
        return logp.gather(-1, labels[..., None])[..., 0]

    def compute_entropy(logits):
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    class Actor(nn.Module):
        def __init__(self, pretrain_or_model, temperature=1.0, **_):
            super().__init__()
            self.model, self.temperature, self.packing_samples = (
                pretrain_or_model, temperature, False
            )  # fmt: skip

        def forward(
            self, sequences, action_mask=None, attention_mask=None, return_output=False,
            allgather_logits=False, return_logprobs=False, ring_attn_group=None,
            packed_seq_lens=None, return_entropy=False, **mm_inputs,
        ):  # fmt: skip
            place = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            output = self.model(sequences, attention_mask=attention_mask, position_ids=place)
            output["logits"] = output["logits"].to(torch.float32)
            if self.temperature != 1.0:
                output["logits"].div_(self.temperature)
            if return_entropy:
                output.entropy = module.compute_entropy(output["logits"])[:, :-1]
            if action_mask is None and not return_logprobs:
                return output
            labels = sequences.roll(-1, 1)
            found = module.log_probs_from_logits(output["logits"], labels)[:, :-1]
            if action_mask is not None:
                found = found[:, -action_mask.shape[1] :] * action_mask.float()
            return (found, output) if return_output else found

    module.Actor = Actor
    module.log_probs_from_logits = log_probs_from_logits
    module.compute_entropy = compute_entropy
    return module


@pytest.fixture
def actor(monkeypatch):
    """The module openrlhf.models.actor, not patched yet."""
    if find_spec("openrlhf") is not None:
        module = importlib.import_module("openrlhf.models.actor")
        for name in ("log_probs_from_logits", "compute_entropy"):
            monkeypatch.setattr(module, name, getattr(module, name))
        monkeypatch.setattr(module.Actor, "forward", module.Actor.forward)
        return module
    module, models, package = stand_in(), ModuleType("openrlhf.models"), ModuleType("openrlhf")
    package.models, models.actor = models, module
    for each in (package, models, module):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return module


def model_of(family, **options):
    config = AutoConfig.for_model(family, **{**SHAPE, **options})
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def batch():
    ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[2, 7:] = 0
    return ids, mask


def outcome(policy, call, upstream):
    """What a call gives, and the gradients of its log-probs and entropies."""
    logp, output = policy(*call.pop("args"), return_output=True, **call)
    found = [logp]
    if call.get("return_entropy"):
        found.append(output.entropy)
    loss = sum((upstream[: x.shape[0], : x.shape[1]] * x).sum() for x in found)
    leaves = [p for p in policy.parameters() if p.requires_grad]
    return [*found, *torch.autograd.grad(loss, leaves, allow_unused=True)]


def no_logits(*_):
    raise AssertionError("logits were formed")


CALLS = {
    "DPO and SFT": {"return_logprobs": True},
    "PPO": {"action": True},
    "PPO with an entropy bonus": {"action": True, "return_entropy": True},
}
FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 2.0},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", CALLS)
def test_results_and_gradients_are_openrlhfs(actor, call, family):
    policy = actor.Actor(model_of(family, **FAMILIES[family]), temperature=0.7)
    policy.temperature, policy.packing_samples = 0.7, False
    ids, mask = batch()
    upstream = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))

    def arguments():
        options = dict(CALLS[call])
        action = [mask[:, -4:]] if options.pop("action", False) else []
        return {"args": [ids, *action], "attention_mask": mask, **options}

    expected = outcome(policy, arguments(), upstream)
    ours.patch_actor()
    policy.model.get_output_embeddings().register_forward_pre_hook(no_logits)
    found = outcome(policy, arguments(), upstream)
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            assert (a - b).norm() <= 2e-5 * b.norm() + 1e-7
    assert "forward" not in vars(policy.model)


def test_adapters(actor):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    policy = actor.Actor(
        peft.get_peft_model(
            model_of("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"],
                                               init_lora_weights=False)
        )
    )  # fmt: skip
    policy.temperature, policy.packing_samples = 1.0, False
    ids, mask = batch()
    call = {"attention_mask": mask, "return_logprobs": True}
    upstream = torch.ones(3, 9)
    expected = outcome(policy, {"args": [ids], **call}, upstream)
    ours.patch_actor()
    found = outcome(policy, {"args": [ids], **call}, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_calls_that_want_logits_get_them(actor):
    policy = actor.Actor(model_of("llama"))
    policy.temperature, policy.packing_samples = 1.0, False
    ids, mask = batch()
    expected = policy(ids, attention_mask=mask, return_output=True).logits
    ours.patch_actor()
    assert torch.equal(policy(ids, attention_mask=mask, return_output=True).logits, expected)


def test_a_router_loss_stays_openrlhfs(actor):
    model = model_of("mixtral", num_local_experts=4, output_router_logits=True)
    policy = actor.Actor(model)
    policy.temperature, policy.packing_samples = 1.0, False
    ids, mask = batch()
    ours.patch_actor()
    output = policy(ids, attention_mask=mask, return_logprobs=True, return_output=True)[1]
    assert output.aux_loss is not None


def test_the_signature_stays_and_a_second_patch_changes_nothing(actor):
    assert list(inspect.signature(actor.Actor.forward).parameters) == PARAMETERS
    ours.patch_actor()
    once = actor.Actor.forward, actor.compute_entropy
    ours.patch_actor()
    assert (actor.Actor.forward, actor.compute_entropy) == once
    assert list(inspect.signature(actor.Actor.forward).parameters) == PARAMETERS


def test_the_script_runs_with_the_patch(actor, monkeypatch, tmp_path, capsys):
    (tmp_path / "their_script.py").write_text(
        "import sys, openrlhf.models.actor as a\n"
        "print(sys.argv[1:], hasattr(a.Actor.forward, '__wrapped__'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ours, "find_spec", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["openrlhf", "their_script", "--a", "1"])
    ours.main()
    assert capsys.readouterr().out == "['--a', '1'] True\n"


def test_mistakes_have_a_cure(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["openrlhf"])
    with pytest.raises(UserError, match="name the OpenRLHF script"):
        ours.main()
    monkeypatch.setattr(sys, "argv", ["openrlhf", "openrlhf.cli.train_dpo"])
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install openrlhf"):
        ours.main()
