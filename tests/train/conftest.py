"""A tiny model, rows and pairs, and log-probs that owe nothing to what is tested."""

import pytest
import torch

from tests.pretended_gpu import gpu
from tests.train import tiny

__all__ = ["gpu"]


@pytest.fixture
def make_model():
    return tiny.new_model


@pytest.fixture
def rows():
    return tiny.draw_rows()


@pytest.fixture
def pairs():
    return tiny.draw_pairs()


@pytest.fixture
def response_logps():
    """Per-token log-probs of one response from the full logits of the HF model, one row a call.

    Independent of what it tests: no padding, no packing, the shift written out.
    """

    def logps(model, prompt, response):
        ids = torch.tensor([[*prompt, *response]])
        logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        return torch.stack([logp[len(prompt) + t - 1, y] for t, y in enumerate(response)])

    return logps
