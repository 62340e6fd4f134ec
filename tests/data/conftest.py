"""Tiny tokenizers: a byte-level BPE with a ChatML template, and the sandbox's word-level kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog answers the fox.",
    "user assistant system im_start im_end Please answer the question in one line.\n\nThank you.",
    "Name three primary colours: red, yellow and blue.\n\n\n1. red\n2. yellow\n3. blue\n",
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def make_bpe() -> Callable[..., Any]:
    """Builds a byte-level BPE tokenizer; keywords replace those of its constructor."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"])
    backend.add_tokens([AddedToken("<think>", special=False)])
    state = backend.to_str()

    def make(**changes: Any) -> Any:
        keywords = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": CHATML}
        given = {k: v for k, v in (keywords | changes).items() if v is not None}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), **given)

    return make


@pytest.fixture
def bpe(make_bpe: Callable[..., Any]) -> Any:
    return make_bpe()


@pytest.fixture
def words() -> Any:
    vocabulary = (
        "<pad> <unk> <|user|> <|assistant|> <|end|> sort these words : , . apple fig we get"
    )
    ids = {word: i for i, word in enumerate(vocabulary.split())}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=WORDS,
    )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of sample data and models beside the checkout; tests that need it skip without."""
    folder = Path(__file__).parents[3] / "shared"
    if not (folder / "data" / "preferences.jsonl").is_file():
        pytest.skip("needs ../shared, which is not there")
    return folder
