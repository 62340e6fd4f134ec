"""Tiny models of several families, and a tokenizer with one token for each character."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.pretended_gpu import gpu

__all__ = ["gpu"]

VOCAB = 96


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """A 2-layer model of a family, with weights large enough to make peaked distributions."""

    def make(family: str = "llama", seed: int = 0, **options: Any) -> Any:
        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        config = AutoConfig.for_model(family, **(shape | options))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Any]) -> Any:
    """The llama that tests share; whoever changes it makes another."""
    return make_model()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Ids 0, 1, 2 are pad, BOS and EOS; id i is the character chr(29 + i)."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(29 + i): i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Ragged prompts of 1 to 17 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = [7, 1, 12, 3, 17, 7]
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
