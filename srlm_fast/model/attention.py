"""For a while, a model's attention layers call a function of ours that transformers knows by name.

For a name without a mask function transformers makes no mask: what a token sees is our business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def attention_named(config: Any, name: str) -> Iterator[None]:
    """Attention layers inside call the function registered as `name`; the configuration is
    restored in any case."""
    previous = config._attn_implementation
    try:
        config._attn_implementation = name
        yield
    finally:
        config._attn_implementation = previous
