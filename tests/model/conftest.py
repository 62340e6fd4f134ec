"""Tiny models made from a configuration, and a tokenizer to save beside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """A 2-layer model of a family."""

    def make(family: str = "llama", seed: int = 0, **options: Any) -> Any:
        shape = {
            "vocab_size": 80,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        config = AutoConfig.for_model(family, **(shape | options))
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture
def tokenizer() -> Any:
    """Three control tokens and a chat template; no pad token."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "word": 3}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> Path:
    """A model folder as transformers writes it."""
    make_model().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"
