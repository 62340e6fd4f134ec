"""The attention of decoding steps against the textbook, on views of slabs as it meets them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from srlm_fast.sampler.attention import decode_attention, slab_attention

ROWS, LENGTH, CAPACITY, DIM = 3, 7, 11, 8


def textbook(q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: Any, sinks: Any) -> Any:
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    scores = (q.double() @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.double().view(1, -1, 1, 1).expand(len(q), -1, -1, -1)
        scores = torch.cat([scores, sink], -1)
    return (scores.softmax(-1)[..., :LENGTH] @ v).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("softcap,sink", [(None, False), (2.0, False), (None, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_textbook(
    kv_heads: int, masked: bool, softcap: float | None, sink: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, 4, 1, DIM, generator=generator).to(dtype)
    slabs = torch.randn(2, ROWS + 2, kv_heads, CAPACITY, DIM, generator=generator).to(dtype)
    slabs[:, :, :, LENGTH:] = torch.nan  # what lies beyond the filled part must not be read
    k, v = slabs[0, 1:-1, :, :LENGTH], slabs[1, 1:-1, :, :LENGTH]
    mask = torch.rand(ROWS, 1, 1, LENGTH, generator=generator) < 0.7 if masked else None
    if mask is not None:
        mask[..., -1] = True
    sinks = torch.randn(4, generator=generator) if sink else None
    got, _ = slab_attention(None, q, k, v, mask, scaling=0.3, softcap=softcap, s_aux=sinks)
    expected = textbook(q, k, v, mask, 0.3, softcap, sinks)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_copies_of_slabs_do_as_well() -> None:
    q, k, v = (torch.randn(ROWS, 2, n, DIM) for n in (1, LENGTH, LENGTH))
    odd = k.transpose(0, 1).contiguous().transpose(0, 1)  # heads outermost in memory
    got, _ = slab_attention(None, q, odd, v, None)
    torch.testing.assert_close(got, slab_attention(None, q, k, v, None)[0])


@pytest.mark.parametrize("name,inside", [("sdpa", "srlm_slab"), ("flash_attention_2",) * 2])
def test_name_is_flipped_where_it_helps_and_always_restored(name: str, inside: str) -> None:
    config = SimpleNamespace(_attn_implementation=name)
    with (
        pytest.raises(KeyboardInterrupt),
        decode_attention(config, torch.device("cpu")),
    ):
        assert config._attn_implementation == inside
        raise KeyboardInterrupt
    assert config._attn_implementation == name
