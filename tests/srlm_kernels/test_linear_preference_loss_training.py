"""Two hundred steps of DPO on a tiny model: what training makes of the op's roundings."""

import torch
from torch import nn
from torch.nn import functional as F

from srlm_kernels import linear_logp, linear_preference_loss, losses

VOCABULARY, WIDTH, PAIRS, PROMPT, RESPONSE, STEPS = 97, 32, 16, 4, 6, 200
BETA = 0.1


class Model(nn.Module):
    """Hidden states of a token: of itself, and of the mean of all before it."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator) * shape[-1] ** -0.5)

        self.embedding, self.head = normal(VOCABULARY, WIDTH), normal(VOCABULARY, WIDTH)
        self.inner, self.outer = normal(4 * WIDTH, 2 * WIDTH), normal(WIDTH, 4 * WIDTH)

    def forward(self, tokens, dtype):
        x = self.embedding.to(dtype)[tokens]
        past = x.float().cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]
        z = torch.cat([x, past.to(dtype)], -1)
        return x + F.linear(F.linear(z, self.inner.to(dtype)).tanh(), self.outer.to(dtype))


def batches(seed):
    """Chosen responses of even tokens, rejected ones of any, one label in five the wrong way.

    [2 PAIRS, PROMPT + RESPONSE] each.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        prompt = torch.randint(VOCABULARY, (PAIRS, 1, PROMPT), generator=generator)
        answer = torch.randint(VOCABULARY, (PAIRS, 2, RESPONSE), generator=generator)
        better = (torch.rand(PAIRS, generator=generator) < 0.2).long()
        pairs = torch.arange(PAIRS)
        answer[pairs, better] -= answer[pairs, better] % 2
        yield torch.cat([prompt.expand(-1, 2, -1), answer], -1).flatten(0, 1)


def fused(hidden, head, target, ref_hidden, ref_head):
    cu = torch.arange(0, len(target) + 1, RESPONSE)
    return linear_preference_loss(
        hidden,
        head,
        target,
        cu,
        losses.dpo(BETA),
        ref_hidden=ref_hidden,
        ref_weight=ref_head,
        chunk_rows=37,
        impl="chunked",
    ).loss


def plain(hidden, head, target, ref_hidden, ref_head):
    def sums(h, w):
        log_probs = F.linear(h, w).float().log_softmax(-1)
        return log_probs.gather(1, target[:, None]).view(PAIRS, 2, RESPONSE).sum(-1)

    ratio = sums(hidden, head) - sums(ref_hidden, ref_head)
    return -F.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()


def train(loss_of, dtype=torch.float32, seed=0):
    """The losses of all steps, and the mean entropy of the trained model's predictions, in nats."""
    model, reference = Model(1), Model(1).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    curve = []
    scored = slice(PROMPT - 1, PROMPT + RESPONSE - 1)
    for _, tokens in zip(range(STEPS), batches(seed), strict=False):
        hidden = model(tokens, dtype)[:, scored].flatten(0, 1)
        ref_hidden = reference(tokens, dtype)[:, scored].flatten(0, 1)
        target = tokens[:, PROMPT:].flatten()
        loss = loss_of(hidden, model.head.to(dtype), target, ref_hidden, reference.head.to(dtype))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    with torch.no_grad():
        out = linear_logp(hidden, model.head.to(dtype), target, outputs=("entropy",))
    return torch.tensor(curve), out.entropy.mean().item()


def test_two_hundred_steps_of_dpo():
    expected, entropy = train(plain)
    assert expected[0].sub(torch.tensor(2.0).log()).abs() < 1e-6
    assert expected[-50:].mean() < 0.65  # it does learn

    curve, drifted = train(fused)
    torch.testing.assert_close(curve, expected, rtol=0, atol=1e-4)
    assert abs(drifted - entropy) < 1e-4

    other, moved = train(plain, seed=2)
    curve, drifted = train(fused, torch.bfloat16)
    assert (curve - expected)[-50:].mean().abs() < (other - expected)[-50:].mean().abs()
    # Roundings of dX and dW that add up, step by step, show as an entropy that drifts.
    assert abs(drifted - entropy) < abs(moved - entropy)
