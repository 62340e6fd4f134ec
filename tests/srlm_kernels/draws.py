"""What the tests of `sample` share: calls by name of the implementation, and the textbook."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srlm_kernels import Draw, SampleParams, sample
from srlm_kernels.backends import refusal
from srlm_kernels.sample import SPLITMIX64, uniforms
from srlm_kernels.triton_support import INTERPRETED

DEVICES = {"torch": "cpu", "cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
REFUSALS = {name: refusal(name, torch.empty(0, device=d)) for name, d in DEVICES.items()}
# Under the interpreter, where a row takes milliseconds, only what it is there for.
IMPLEMENTATIONS = [n for n, reason in REFUSALS.items() if reason is None]
if INTERPRETED:
    IMPLEMENTATIONS = ["triton"]
INTEGERS = ("top_k", "min_tokens")


def normal(*size: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale


def parameters(rows: int, temperature: Any = 1.0, **values: Any) -> SampleParams:
    """Parameters of all rows, each given as one number or as one per row."""

    def vector(name: str, value: Any) -> Tensor:
        dtype = torch.int32 if name in INTEGERS else torch.float32
        return torch.as_tensor(value, dtype=dtype).expand(rows).contiguous()

    return SampleParams(
        vector("temperature", temperature), **{k: vector(k, v) for k, v in values.items()}
    )


def draw(
    impl: str,
    logits: Tensor,
    *,
    seed: Tensor | None = None,
    step: int | Tensor = 0,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
    is_stop: Tensor | None = None,
    **values: Any,
) -> Draw:
    """`sample` where `impl` runs, brought back to the CPU; row r has seed r unless told."""
    device, rows = DEVICES[impl], len(logits)

    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    seed = torch.arange(rows) if seed is None else seed
    step = torch.as_tensor(step, dtype=torch.int64).expand(rows)
    params = SampleParams(*map(there, parameters(rows, **values)))
    drawn = sample(
        logits.to(device), seed.to(device), step.to(device), params, bias=there(bias),
        seen=there(seen), is_stop=there(is_stop), impl=impl,
    )  # fmt: skip
    return Draw(*(x.cpu() for x in drawn))


def seeds_of(bits: Sequence[int], step: int = 0) -> Tensor:
    """Seeds whose uniforms at `step` are these multiples of 2^-48: splitmix64 backwards."""
    golden, mix_1, mix_2 = SPLITMIX64
    word = (1 << 64) - 1
    seeds = []
    for x in bits:
        x <<= 16
        x ^= x >> 31 ^ x >> 62
        x = x * pow(mix_2, -1, 1 << 64) & word
        x ^= x >> 27 ^ x >> 54
        x = x * pow(mix_1, -1, 1 << 64) & word
        x ^= x >> 30 ^ x >> 60
        x = x - (step + 1) * golden & word
        seeds.append(x - (1 << 64) if x >> 63 else x)
    return torch.tensor(seeds)


def textbook(
    scores: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, float]:
    """Of one row: renormalised probabilities by sorting and cutting in float64, and what was kept.

    A threshold keeps everything that equals it.
    """
    # Both in fp32 as parameters are; then nothing is rounded.
    top_p, min_p = (float(torch.tensor(x)) for x in (top_p, min_p))
    if temperature == 0 or top_k == 1:
        best = torch.zeros_like(scores, dtype=torch.float64)
        best[scores.argmax()] = 1
        return best, float(scores.double().softmax(-1).max())
    probs = (scores.double() / float(torch.tensor(temperature))).softmax(-1)
    order = probs.sort(descending=True).values
    keep = torch.ones_like(probs, dtype=torch.bool)
    if 0 < top_k < len(probs):
        keep = probs >= order[top_k - 1]
    if top_p < 1:
        kept = (probs * keep).sort(descending=True).values / (probs * keep).sum()
        count = int((kept.cumsum(0) - kept < top_p).sum())
        keep &= probs >= order[max(count, 1) - 1]
    keep &= probs >= min_p * probs.max()
    mass = float((probs * keep).sum())
    return probs * keep / mass, mass


def assert_same_draws(impl: str, rows: int, columns: int, **values: Any) -> None:
    """Tokens are those of the reference but for one in 10^4, and such a one is its neighbour in the
    CDF, at a boundary next to the uniform."""
    different = 0
    for first in range(0, rows, 1000):
        seed = torch.arange(first, min(rows, first + 1000))
        logits = normal(len(seed), columns, seed=first)
        ours, theirs = (draw(name, logits, seed=seed, **values) for name in (impl, "torch"))
        for r in (ours.token != theirs.token).nonzero()[:, 0].tolist():
            different += 1
            probs, _ = textbook(logits[r], **values)
            low, high = sorted((int(ours.token[r]), int(theirs.token[r])))
            assert probs[low + 1 : high].sum() < 1e-7
            assert abs(probs[: low + 1].sum() - uniforms(seed[r], torch.tensor(0))) < 1e-6
        same = ours.token == theirs.token
        for x, y in zip(ours[1:4], theirs[1:4], strict=True):
            torch.testing.assert_close(x[same], y[same], atol=3e-6, rtol=1e-6)
    assert different <= rows * 1e-4


def chi_square(observed: Tensor, expected: Tensor) -> float:
    """The p-value of Pearson's test."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
