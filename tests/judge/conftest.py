"""Judges in front of scripted texts, and in front of a real tiny model."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from srlm_fast.data.records import Prompt, Sample, user
from srlm_fast.data.template import ChatTemplate
from srlm_fast.sampler import Completion, Output, Sampler, SamplingParams

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
SPECIAL = ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]


class CharTemplate:
    """One token per character, so that scripted texts survive encoding and decoding exactly."""

    eos_ids = frozenset({0})

    def encode_prompt(self, prompt: Prompt, prefill: str = "") -> list[int]:
        text = "".join(f"<{m.role}>{m.content}" for m in prompt) + "<assistant>" + prefill
        return [ord(c) for c in text]

    def encode_response(self, prompt: Prompt, response: str) -> list[int]:
        return [*map(ord, response), 0]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids if i)


@dataclass
class ScriptedSampler:
    """Answers with `answer(prompt text, candidate index, seed)` and remembers every call."""

    answer: Callable[[str, int, int], str]
    context: int = 100_000
    calls: list[tuple[list[list[int]], SamplingParams, str]] = field(default_factory=list)

    def generate(self, prompts, params, progress=""):
        self.calls.append((prompts, params, progress))
        return [
            Output(ids, [self._completion(ids, i, params) for i in range(params.n)])
            for ids in prompts
        ]

    def _completion(self, ids, index, params):
        text = self.answer("".join(map(chr, ids)), index, params.seed)
        return Completion(
            index, [*map(ord, text), 0], text, "stop", None, 0.0, [], [], [], params.seed
        )


@pytest.fixture
def char_template():
    return CharTemplate()


@pytest.fixture
def scripted():
    return ScriptedSampler


@pytest.fixture
def make_sample():
    def make(response: str, index: int = 0, prompt: Prompt | None = None, **changes) -> Sample:
        ids = tuple(map(ord, response))
        fields = {"response_ids": (*ids, 0), "finish_reason": "stop", **changes}
        prompt = prompt or user("question")
        return Sample(prompt, (1, 2), response, logprobs=(), index=index, seed=7, round=1, **fields)

    return make


@pytest.fixture(scope="session")
def word_template():
    words = "review task : response ; justify then Score: 0 1 2 3 4 5 sort these a b c d yes no"
    vocab = {word: i for i, word in enumerate(SPECIAL + words.split())}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return ChatTemplate(_wrapped(tokenizer))


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(SPECIAL)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.chat_template = CHAT
    return wrapped


@pytest.fixture(scope="session")
def wrap_tokenizer():
    return _wrapped


@pytest.fixture(scope="session")
def tiny_sampler(word_template):
    def make(seed: int) -> Sampler:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(word_template.tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            eos_token_id=word_template.tokenizer.eos_token_id,
        )
        return Sampler(LlamaForCausalLM(config).eval(), word_template.tokenizer)

    return make
