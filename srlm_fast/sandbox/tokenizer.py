"""The world's word-level tokenizer: one token per word, about 100 in all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from srlm_fast.sandbox.documents import review, task_list
from srlm_fast.sandbox.oracle import judge_response
from srlm_fast.sandbox.world import CHATTER, ITEMS, OPERATIONS, TaskPrompt, perfect_response

PAD, UNK, USER, ASSISTANT, END = "<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTEXT_LENGTH = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|> {{ message['content'] }} <|end|>{{ ' ' if not loop.last }}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <|assistant|>{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Every word of the world to its token id; the special tokens come first."""
    special = [PAD, UNK, USER, ASSISTANT, END]
    return {word: i for i, word in enumerate(dict.fromkeys([*special, *_words()]))}


def make_tokenizer() -> Any:
    """An ordinary HF tokenizer (`PreTrainedTokenizerFast`) with the chat template."""
    backend = Tokenizer(WordLevel(vocabulary(), unk_token=UNK))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _words() -> Iterator[str]:
    yield from ITEMS
    yield from (str(score) for score in range(6))
    yield from ("yes", "no", "ok", "bad", "none")
    for operation in OPERATIONS:
        task = TaskPrompt(operation, ITEMS[:4])
        response = perfect_response(task)
        for text in (
            *task_list([task, task]),
            *review(task, response, judge_response(task, response)),
        ):
            yield from text.split()
    for sentence in CHATTER:
        yield from sentence.split()
