"""Tiny models whose every operation runs in the model's dtype, and rows and pairs of token ids."""

import random

import torch
from transformers import MistralConfig, MistralForCausalLM

from srlm_fast.data.records import Pair, user

VOCAB, PAD, EOS = 61, 0, 1


def new_model(seed=0, dtype=torch.float64, attention="sdpa", sliding_window=None, tied=True):
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        sliding_window=sliding_window,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MistralForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    # The family's own norm computes in fp32 whatever its inputs are.
    for layer in model.model.layers:
        layer.input_layernorm = torch.nn.RMSNorm(32, eps=1e-6)
        layer.post_attention_layernorm = torch.nn.RMSNorm(32, eps=1e-6)
    model.model.norm = torch.nn.RMSNorm(32, eps=1e-6)
    return model.to(dtype).eval()


def draw_rows():
    """24 rows of different lengths; two of three responses end with EOS."""
    rng = random.Random(1)
    return [(_ids(rng, 1, 9), _ids(rng, 1, 9) + ((EOS,) if i % 3 else ())) for i in range(24)]


def draw_pairs():
    """12 pairs of different lengths."""
    rng = random.Random(2)
    return [
        Pair(
            prompt=user(f"prompt {i}"),
            prompt_ids=_ids(rng, 2, 8),
            chosen="",
            chosen_ids=(*_ids(rng, 2, 9), EOS),
            rejected="",
            rejected_ids=_ids(rng, 2, 9),
            chosen_score=None,
            rejected_score=None,
            round=1,
        )
        for i in range(12)
    ]


def _ids(rng, low, high):
    return tuple(rng.randrange(2, VOCAB) for _ in range(rng.randint(low, high)))
