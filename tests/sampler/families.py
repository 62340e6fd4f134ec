"""Tiny models of many families with random weights: what each family does differently, it does.

Windows are shorter than the prompts of the tests, softcaps and sinks bite, and scales are not the
default ones, so that an attention function that ignores one of them gives other tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96
CONTEXT = 192
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,  # rows run to max_tokens
    "pad_token_id": 0,
}
_WINDOW = {"sliding_window": 20}
_HYBRID = _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {  # DeepSeek's attention: values are narrower than keys
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 6,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SEED = 85  # of weights with which no greedy choice of the tests is a close one

_PAGED: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 12},
    # Its frequencies move beyond the context only, and so never.
    "llama with dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    },
    "qwen2": _HYBRID | {"use_sliding_window": True},
    "qwen3": {},
    "mistral": _WINDOW,
    "ministral": _HYBRID,
    "gemma2": _HYBRID
    | {
        "attn_logit_softcapping": 3.0,
        "attn_implementation": "eager",  # older transformers would take one without a softcap
        "final_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 20,
    },
    "gemma3_text": _HYBRID | {"query_pre_attn_scalar": 20},
    "phi3": {"sliding_window": 70},  # more than a page
    "gpt_oss": _HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo": {"clip_qkv": 1.5},
    "olmo2": {},
    "olmo3": _HYBRID,
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode": {},  # one KV head
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "starcoder2": _WINDOW,
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True},
    "granite": {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
        "logits_scaling": 0.5,
    },
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": _HYBRID | {"logit_scale": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 0]},
    "qwen3_moe": _EXPERTS,
    "deepseek_v3": _LATENT
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    "nemotron": {"partial_rotary_factor": 0.5},
    "exaone4": _HYBRID,
    "mimo_v2_flash": _WINDOW  # sinks in the layer that has the window
    | _EXPERTS
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "v_head_dim": 6},
    "gemma4_text": _HYBRID  # layers differ in their head dimension
    | {"global_head_dim": 12, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
}

# What pages cannot serve, and why not.
_UNSUPPORTED: dict[str, dict[str, Any]] = {
    "bloom": {},  # attention of its own, with ALiBi
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT},
    "falcon": {"alibi": True, "head_dim": None},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": _LINEAR,
    # A state-space model and attention in every layer: all that attention can see is in order.
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "diffllama": {},  # attends twice in a layer
    "doge": {},  # masks by its data
    # The mask has a limit that attention is not told of, farther away than a short test looks.
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 100},
    "llama4_text": {
        "attention_chunk_size": 100,
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
    },
    # One row beyond 110 tokens changes the frequencies of all that are computed with it.
    "phi3 with longrope": {
        "original_max_position_embeddings": 110,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "original_max_position_embeddings": 110,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0, 2.0, 1.5, 1.2],
        },
    },
}


def make(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """An fp32 model in eval mode; the first word of `name` is its type."""
    config = AutoConfig.for_model(
        name.split()[0],
        **{key: value for key, value in (_SHAPE | options).items() if value is not None},
    )
    config.eos_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    _sharpen(model)
    return model


@torch.no_grad()
def _sharpen(model: PreTrainedModel) -> None:
    """Weights that make logits depend on all the context, and biases, gains and sinks that are not
    zeros and ones."""
    generator = torch.Generator().manual_seed(_SEED)
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight in tables:
            weight.copy_(noise)
        elif weight.ndim < 2:
            weight.add_(0.3 * noise)
        else:
            weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    name: partial(make, name, options) for name, options in _PAGED.items()
}
UNSUPPORTED: dict[str, Callable[[], PreTrainedModel]] = {
    name: partial(make, name, options) for name, options in _UNSUPPORTED.items()
}
