"""Sampling parameters that make no sense are refused when they are made."""

from typing import Any

import pytest

from srlm_fast.sampler import SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"temperature": -0.1}, "temperature must be finite and not negative, but is -0.1"),
        ({"temperature": NAN}, "temperature .* is nan"),
        ({"temperature": INF}, "temperature .* is inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": NAN}, "top_p"),
        ({"top_k": -2}, r"top_k must be 0 \(off\) or positive, not -2"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": NAN}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive and finite, not 0.0"),
        ({"repetition_penalty": INF}, "repetition_penalty"),
        ({"repetition_penalty": NAN}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"min_tokens": -1}, r"min_tokens must be in \[0, 16\], not -1"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stop": ("a", "")}, "a stop string must not be empty"),
        ({"stop": ""}, "a stop string must not be empty"),
        ({"logit_bias": {3: NAN}}, "logit_bias must be finite, or -inf to ban a token"),
        ({"logit_bias": {3: 1.0, 4: INF}}, "logit_bias"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_impossible_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_the_edges_are_accepted() -> None:
    params = SamplingParams(
        n=1, temperature=0, top_p=1, top_k=-1, min_p=1, max_tokens=1, min_tokens=1, stop="a",
        stop_token_ids=[3], logit_bias={3: -INF},
    )  # fmt: skip
    assert (params.stop, params.stop_token_ids) == (("a",), (3,))
    assert hash(params) == hash(SamplingParams(**vars(params)))
