"""TRL's other trainers with our head: what they log is equal, and judges are their rewards."""

import copy

import pytest
import torch
import transformers

from srlm_fast.data.records import Judgement
from srlm_fast.data.template import ChatTemplate

trl = pytest.importorskip("trl", reason="trl is not installed (extra [trl])")
datasets = pytest.importorskip("datasets", reason="datasets is not installed (with trl)")

from srlm_fast.integrations.trl import accelerate, judge_reward, patch_logprobs  # noqa: E402
from tests.integrations import tokens  # noqa: E402
from tests.integrations.dpo_runs import check_logs  # noqa: E402

SHAPE = {
    "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip


class ByLength:
    """A judge of how many letters differ; it has no opinion on the empty response."""

    name = "variety"

    def __init__(self):
        self.seen = []

    def score(self, prompts, candidates):
        self.seen += [(p, g) for p, g in zip(prompts, candidates, strict=True)]
        return [[Judgement(len({*s.response}) or None) for s in group] for group in candidates]


def asked(text):
    return [{"role": "user", "content": text}]


def rewarded(kind, config, **options):
    def make(folder, out, tokenizer, judge):
        return kind(
            model=str(folder),
            reward_funcs=judge_reward(judge, ChatTemplate(tokenizer)),
            args=config(num_generations=2, max_completion_length=5, beta=0.1, **out, **options),
            train_dataset=datasets.Dataset.from_list(
                [{"prompt": asked(text), "answer": text[0]} for text in ("Why?", "How?", "So?")]
            ),
            processing_class=tokenizer,
        )

    return make


def kto(folder, out, tokenizer, judge):
    rows = [{"prompt": "Name ", "completion": "x" * (1 + i % 3), "label": i % 2 == 0}
            for i in range(4)]  # fmt: skip
    return trl.KTOTrainer(
        model=str(folder), args=trl.KTOConfig(**out), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip


def sft(folder, out, tokenizer, judge):
    rows = [{"prompt": "Name ", "completion": "x" * (1 + i)} for i in range(4)]
    return trl.SFTTrainer(
        model=str(folder), args=trl.SFTConfig(**out), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip


TRAINERS = {
    "SFT": sft,
    "KTO": kto,
    "GRPO": rewarded(trl.GRPOTrainer, trl.GRPOConfig, temperature=0.8),
    "RLOO": rewarded(trl.RLOOTrainer, trl.RLOOConfig),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.of_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    where = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(where)
    return where


def trained(way, name, folder, tokenizer, tmp_path):
    out = {
        "output_dir": str(tmp_path), "max_steps": 2, "use_cpu": True, "bf16": False,
        "report_to": [], "logging_steps": 1, "per_device_train_batch_size": 4, "optim": "sgd",
        "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False,
    }  # fmt: skip
    judge = ByLength()
    trainer = TRAINERS[name](folder, out, copy.deepcopy(tokenizer), judge)
    if way == "accelerated":
        accelerate(trainer)
        assert trainer.model.forward.__func__.srlm_fast
    if way == "patched":
        with patch_logprobs():
            trainer.train()
    else:
        trainer.train()
    timed = ("step_time", "profiling", "runtime", "per_second")
    return judge, [
        {k: v for k, v in row.items() if not any(word in k for word in timed)}
        for row in trainer.state.log_history
    ]


@pytest.mark.parametrize("name", TRAINERS)
def test_other_trainers_log_what_they_did(folder, tokenizer, tmp_path, name):
    plain, *ours = (
        trained(way, name, folder, tokenizer, tmp_path)[1]
        for way in ("plain", "accelerated", "patched")
    )
    assert plain[0]["grad_norm"] > 0
    for found in ours:
        check_logs(found, plain)


def test_a_judge_gets_what_trl_sampled(folder, tokenizer, tmp_path):
    judge, log = trained("plain", "GRPO", folder, tokenizer, tmp_path)
    assert log[0]["rewards/variety_judge/mean"] > 0
    template = ChatTemplate(tokenizer)
    assert len(judge.seen) == 4 and all(len(group) == 2 for _, group in judge.seen)
    for prompt, group in judge.seen:
        assert prompt[0].content in ("Why?", "How?", "So?")
        for sample in group:
            assert sample.prompt == prompt
            assert list(sample.prompt_ids) == template.encode_prompt(prompt)
            assert (
                tokenizer.decode(sample.response_ids, skip_special_tokens=True) == sample.response
            )


class Length:
    name = "length"

    def score(self, prompts, candidates):
        self.asked = [prompt[0].content for prompt in prompts]
        self.sizes = [len(group) for group in candidates]
        return [[Judgement(len(s.response) or None) for s in group] for group in candidates]


class Template:
    encode_prompt = staticmethod(lambda prompt: [1])
    encode_response = staticmethod(lambda prompt, text: [2])


def test_a_judge_is_a_reward_function():
    judge = Length()
    reward = judge_reward(judge, Template())
    assert reward.__name__ == "length_judge"
    parts = [{"role": "user", "content": [{"type": "text", "text": "How?"}]}]
    answers = ["abc", "", [{"role": "assistant", "content": "yes"}]]
    assert reward(prompts=["Why?", "Why?", parts], completions=answers) == [3, None, 3]
    assert judge.asked == ["Why?", "How?"] and judge.sizes == [2, 1]


def test_a_reply_that_only_calls_a_tool_is_empty():
    reply = [{"role": "assistant", "content": None, "tool_calls": []}]
    found = judge_reward(Length(), Template())(
        prompts=["Why?"], completions=[reply], completion_ids=[[5]], answer=["x"], log_extra=None
    )
    assert found == [None]
