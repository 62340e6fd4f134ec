"""The axolotl plugin: in axolotl where it is installed, else against its published hooks."""

import importlib
import inspect
import json
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_fast.errors import UserError
from srlm_fast.integrations.liger import LigerFusedLinearDPOLoss

# axolotl.integrations.base.BasePlugin of 0.19.0, the hooks that we override.
HOOKS = {"post_trainer_create": ["self", "cfg", "trainer"]}


@pytest.fixture
def plugin(monkeypatch):
    """`SrlmFastPlugin` on a base class of that name, unless axolotl itself is here."""
    if find_spec("axolotl") is None:
        base = ModuleType("axolotl.integrations.base")
        base.BasePlugin = type("BasePlugin", (), {})
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, base.__name__, base)
    module = importlib.import_module("srlm_fast.integrations.axolotl")
    yield module.SrlmFastPlugin
    sys.modules.pop(module.__name__)


def test_the_hooks_are_axolotls(plugin):
    ours = {name for name, value in vars(plugin).items() if inspect.isfunction(value)}
    assert ours == HOOKS.keys()
    for name, parameters in HOOKS.items():
        assert list(inspect.signature(getattr(plugin, name)).parameters) == parameters


def test_ligers_loss_is_replaced_with_its_options(plugin):
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    options = {"beta": 0.7, "loss_type": "robust", "label_smoothing": 0.2, "use_ref_model": False}
    trainer = SimpleNamespace(liger_loss=liger.LigerFusedLinearDPOLoss(**options))
    for _ in range(2):  # the second time it is ours already
        plugin().post_trainer_create({}, trainer)
        assert type(trainer.liger_loss) is LigerFusedLinearDPOLoss
    again = LigerFusedLinearDPOLoss(**options)
    assert trainer.liger_loss.loss == again.loss
    assert not trainer.liger_loss.use_ref_model


def test_another_trainer_is_refused_with_the_cure(plugin):
    trainer = SimpleNamespace(model=torch.nn.Linear(2, 2), accelerator=SimpleNamespace(
        unwrap_model=lambda model: model))  # fmt: skip
    with pytest.raises(UserError, match="dpo_use_liger_kernel: true, or remove it"):
        plugin().post_trainer_create({}, trainer)


def test_on_a_trl_with_a_fused_head_the_trainer_is_accelerated(plugin):
    pytest.importorskip("trl", reason="trl is not installed (extra [trl])")
    from accelerate import Accelerator
    from trl.trainer.utils import add_fused_lm_head

    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    add_fused_lm_head(model)
    arguments = SimpleNamespace(torch_compile=True)
    trainer = SimpleNamespace(model=model, accelerator=Accelerator(cpu=True), args=arguments)
    with pytest.raises(UserError, match="set torch_compile to False"):  # the reason is not lost
        plugin().post_trainer_create({}, trainer)
    arguments.torch_compile = False
    plugin().post_trainer_create({}, trainer)
    assert model.forward.__func__.srlm_fast


PLAIN = {
    "rl": "dpo", "dpo_use_liger_kernel": True, "sequence_len": 128, "micro_batch_size": 4,
    "gradient_accumulation_steps": 1, "max_steps": 4, "num_epochs": 1, "optimizer": "adamw_torch",
    "learning_rate": 1e-3, "lr_scheduler": "constant", "attn_implementation": "eager",
    "bf16": False, "fp16": False, "tf32": False, "logging_steps": 1, "val_set_size": 0.0, "seed": 0,
    "gradient_checkpointing": False,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(find_spec("axolotl") is None, reason="axolotl is not installed")
def test_axolotl_trains_as_without_it(tmp_path):
    make_model(tmp_path / "model")
    rows = [{"prompt": f"Name {i}.", "chosen": f"It is {i}.", "rejected": "No." * (1 + i % 3)}
            for i in range(16)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
    fields |= {"prompt_format": "{prompt}", "chosen_format": "{chosen}"}
    fields |= {"rejected_format": "{rejected}"}
    data = {"path": str(tmp_path / "pairs.jsonl"), "ds_type": "json", "split": "train"}
    losses = {}
    for name in ("plain", "ours"):
        config = PLAIN | {
            "base_model": str(tmp_path / "model"), "output_dir": str(tmp_path / name),
            "dataset_prepared_path": str(tmp_path / "prepared"), "save_strategy": "steps",
            "save_steps": 4, "datasets": [data | {"type": fields}],
        }  # fmt: skip
        if name == "ours":
            config["plugins"] = ["srlm_fast.integrations.axolotl.SrlmFastPlugin"]
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "axolotl.cli.train", str(tmp_path / f"{name}.yml")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("Plugin loaded successfully" in done.stdout + done.stderr) == (name == "ours")
        state = json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())
        losses[name] = [row["loss"] for row in state["log_history"] if "loss" in row]
    assert len(losses["ours"]) == 4
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-4)


def make_model(folder):
    """A tiny GPT-NeoX over bytes: of its layers Liger replaces none, whose kernels want a GPU."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"</s>": 0, "<s>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    words = Tokenizer(models.BPE(vocab, [], unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="</s>", bos_token="<s>"
    ).save_pretrained(folder)
    config = GPTNeoXConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=0,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        GPTNeoXForCausalLM(config).save_pretrained(folder)
