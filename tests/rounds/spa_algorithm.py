"""SPA's Algorithm 1 (arXiv 2406.04412) once more, in plain torch and float64, from its equations.

Nothing of the engine is used: one row a forward, whole logits, log_softmax, probabilities as the
paper has them, AdamW and its schedule written out. What is not the algorithm's is given: the
samples, and the order in which pairs are trained on.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Triple:
    """(x, y_w, y_l) as token ids."""

    x: Ids
    y_w: Ids
    y_l: Ids

    @property
    def length(self) -> int:
        """Tokens of the longer row."""
        return len(self.x) + max(len(self.y_w), len(self.y_l))


@dataclass(frozen=True)
class Settings:
    """The engine's names, for one training; alpha 0 is the seed's plain DPO."""

    beta: float
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    alpha: float = 0.0
    lam: float = 0.0
    k_percent: float = 0.0
    warmup_fraction: float = 0.0
    tau: str = "dataset"
    window: int = 0
    micro_batch_size: int = 0


@dataclass
class Step:
    """One optimiser step, as it was."""

    loss: float = 0.0
    taus: list[float] = field(default_factory=list)  # as log-odds, of each pair
    flags: dict[int, bool] = field(default_factory=dict)  # by the triple's place in D_i
    ext_margins: list[float] = field(default_factory=list)  # beta-scaled
    grads: list[Tensor] = field(default_factory=list)  # clipped
    weights: list[Tensor] = field(default_factory=list)


def logits(model: Any, x: Ids, y: Ids) -> Tensor:
    """h(x, y_{1:t-1}) for every t: [len(y), V]."""
    ids = torch.tensor([[*x, *y]])
    h: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(x) - 1 : -1]
    return h


def log_pi(h: Tensor, y: Ids) -> Tensor:
    """log pi(y|x) of the distributions softmax(h): the sum over the response."""
    return h.log_softmax(-1)[torch.arange(len(y)), torch.tensor(y)].sum()


def judgment(policy: Any, init: Any, x: Ids, y: Ids) -> tuple[float, float]:
    """log pi_{i-1}(y|x) and log pi_init(y|x), whose difference equation 7 compares."""
    with torch.no_grad():
        found = [float(log_pi(logits(model, x, y), y)) for model in (policy, init)]
    return found[0], found[1]


def preferred(x: Ids, y_1: Ids, y_2: Ids, r_1: float, r_2: float, beta: float) -> Triple:
    """Equation 8: the labels that equation 7 gives."""
    p = 1 / (1 + math.exp(-beta * (r_1 - r_2)))
    return Triple(x, y_1, y_2) if p > 0.5 else Triple(x, y_2, y_1)


@dataclass
class _Pair:
    """Equations 5 and 12 of one triple: log-odds, of which the second has no gradient."""

    margin: Tensor
    ext_margin: float


def _forward(policy: Any, ref: Any, d: Triple, s: Settings) -> _Pair:
    margins = []
    for y, sign in ((d.y_w, 1), (d.y_l, -1)):
        h = logits(policy, d.x, y)
        with torch.no_grad():
            h_ref = logits(ref, d.x, y)
            extrapolated = (1 + s.lam) * h - s.lam * h_ref
            log_ref, log_ext = log_pi(h_ref, y), log_pi(extrapolated, y)
        margins.append((sign * (log_pi(h, y) - log_ref), sign * (log_ext - log_ref)))
    (w, ext_w), (minus_l, minus_ext_l) = margins
    return _Pair(s.beta * (w + minus_l), float(s.beta * (ext_w + minus_ext_l)))


def _refined_loss(pair: _Pair, z: bool, alpha: float) -> Tensor:
    """Equation 10; z = 0 and alpha = 0: equation 6."""
    log_p, log_reversed = logsigmoid(pair.margin), logsigmoid(-pair.margin)
    return -((1 - alpha * z) * log_p + alpha * z * log_reversed)


def _is_noise(ext_margin: float, tau: float, official: bool) -> bool:
    """Equation 11: p < tau, in probabilities; the authors' code has it the other way round."""
    p, threshold = (1 / (1 + math.exp(-odds)) for odds in (ext_margin, tau))
    return not p > threshold if official else p < threshold


class _Threshold:
    """tau as log-odds, by the three readings of "the K-th percentile of D_i"."""

    def __init__(self, s: Settings, size: int) -> None:
        self.s, self.value = s, 0.0
        self.window = max(1, min(s.window or 512, size // 2 if s.window else size // 4))
        self.seen: list[float] = []
        self.means: deque[float] = deque(maxlen=50)

    def percentile(self, margins: list[float]) -> float:
        return sorted(margins)[int(len(margins) * self.s.k_percent / 100)]

    def begin_step(self) -> None:
        if self.s.tau == "window" and len(self.seen) >= self.window:
            self.value = self.percentile(self.seen[-self.window :])

    def end_micro_batch(self, margins: list[float]) -> None:
        self.seen += margins
        self.means.append(sum(margins) / len(margins))
        if self.s.tau == "official" and len(self.means) == 50:
            down = int(50 * self.s.k_percent / 100)
            ordered = sorted(self.means)
            self.value = (ordered[down] + ordered[down + 1]) / 2


def train(model: Any, data: list[Triple], order: list[list[int]], s: Settings) -> list[Step]:
    """DPO, or one iteration of Algorithm 1, of `model` in place; its reference is its start."""
    ref = copy.deepcopy(model)
    params = [p for p in model.parameters() if p.ndim >= 2]
    params += [p for p in model.parameters() if p.ndim < 2]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    threshold, steps, scored = _Threshold(s, len(data)), [], False
    for number, batch in enumerate(order):
        alpha = 0.0 if number < s.warmup_fraction * len(order) else s.alpha
        if alpha and s.tau == "dataset" and not scored:
            with torch.no_grad():
                margins = [_forward(model, ref, d, s).ext_margin for d in data]
            threshold.value, scored = threshold.percentile(margins), True
        step = Step()
        threshold.begin_step()
        ordered = sorted(batch, key=lambda i: data[i].length)
        size = s.micro_batch_size or len(batch)
        for micro in (ordered[i : i + size] for i in range(0, len(ordered), size)):
            pairs = [_forward(model, ref, data[i], s) for i in micro]
            for i, pair in zip(micro, pairs, strict=True):
                z = _is_noise(pair.ext_margin, threshold.value, s.tau == "official")
                loss = _refined_loss(pair, z, alpha) / len(batch)
                loss.backward()
                step.loss += float(loss.detach())
                step.taus.append(threshold.value)
                step.ext_margins.append(pair.ext_margin)
                if alpha:
                    step.flags[i] = z
            threshold.end_micro_batch([pair.ext_margin for pair in pairs])
        _clip(params, s.max_grad_norm)
        step.grads = [_grad(p).clone() for p in params]
        _adamw(params, moments, number, _rate(number, len(order), s), s.weight_decay)
        step.weights = [p.detach().clone() for p in params]
        steps.append(step)
    return steps


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def _clip(params: list[Any], max_norm: float) -> None:
    norm = math.sqrt(sum(float(_grad(p).square().sum()) for p in params))
    for p in params:
        _grad(p).mul_(min(1.0, max_norm / (norm + 1e-6)))


def _rate(step: int, steps: int, s: Settings) -> float:
    """A linear warm-up, then half a cosine to 0."""
    warmup = math.ceil(s.warmup_ratio * steps)
    if step < warmup:
        return s.learning_rate * (step + 1) / warmup
    return s.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@torch.no_grad()
def _adamw(
    params: list[Any], moments: list[tuple[Tensor, Tensor]], step: int, rate: float, decay: float
) -> None:
    for p, (m, v) in zip(params, moments, strict=True):
        g = _grad(p)
        m.mul_(0.9).add_(0.1 * g)
        v.mul_(0.999).add_(0.001 * g.square())
        if p.ndim >= 2:
            p.mul_(1 - rate * decay)
        corrected = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        p.sub_(rate * corrected[0] / (corrected[1].sqrt() + 1e-8))
        p.grad = None
