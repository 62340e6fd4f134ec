"""What a self-test of a few tokens cannot see is found in the rules of the model's masks."""

from collections.abc import Callable
from typing import Any

import pytest

from srlm_fast.model.probe import Layers, probe


def test_layers_and_their_shapes(make_model: Callable[..., Any]) -> None:
    found = probe(make_model("llama", num_key_value_heads=1))
    assert isinstance(found, Layers)
    assert [(s.heads, s.key_dim, s.value_dim) for s in found.shapes.values()] == [(1, 8, 8)] * 2
    assert found.group == 4


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("bloom", {}, "0 of its 2 layers"),
        (
            "phimoe",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 50},
            "mask of layer",
        ),
        (
            "phi3",
            {
                "original_max_position_embeddings": 32,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 32,
                },
            },
            "passes 32 tokens",
        ),
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"], "intermediate_size": 64},
            "1 of its 2 layers",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_run_on_pages_is_said(
    family: str, options: dict[str, Any], why: str, make_model: Callable[..., Any]
) -> None:
    model = make_model(family, **options)
    name = model.config._attn_implementation
    found = probe(model)
    assert isinstance(found, str) and why in found
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("window", [1, 5, 77, 128])
def test_windows_of_any_length_are_recognised(window: int, make_model: Callable[..., Any]) -> None:
    assert isinstance(
        probe(make_model("mistral", sliding_window=window, max_position_embeddings=128)), Layers
    )
