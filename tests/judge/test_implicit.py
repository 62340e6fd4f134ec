import math
from dataclasses import replace

import pytest
import torch

from srlm_fast.data.records import Sample, user
from srlm_fast.judge.base import text_samples
from srlm_fast.judge.implicit import ImplicitJudge
from srlm_fast.sampler import SamplingParams

PROMPTS = [user("sort these a b c"), user("sort these d"), user("yes")]


@pytest.fixture
def candidates(word_template):
    texts = [["a b c", "c b a", "no"], ["d"], []]
    return [text_samples(p, t, word_template) for p, t in zip(PROMPTS, texts, strict=True)]


def log_prob(sampler, sample):
    """The summed log-prob of a response, from the model's own logits in float64."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    logps = sampler.model(ids).logits[0, :-1].double().log_softmax(-1)
    token_logps = logps.gather(1, ids[0, 1:, None])[:, 0]
    return token_logps[-len(sample.response_ids) :].sum().item()


def test_equation_7_without_beta(tiny_sampler, candidates):
    policy, init = tiny_sampler(0), tiny_sampler(1)
    judged = ImplicitJudge(policy, init).score(PROMPTS, candidates)
    assert [len(group) for group in judged] == [3, 1, 0]
    for group, judgements in zip(candidates, judged, strict=True):
        for sample, judgement in zip(group, judgements, strict=True):
            expected = log_prob(policy, sample) - log_prob(init, sample)
            assert judgement.score == pytest.approx(expected, abs=1e-4)


def test_without_reference(tiny_sampler, candidates):
    policy = tiny_sampler(0)
    [[judgement, *_], *_] = ImplicitJudge(policy, None).score(PROMPTS, candidates)
    assert judgement.score == pytest.approx(log_prob(policy, candidates[0][0]), abs=1e-4)


def test_zero_when_the_policy_is_the_reference(tiny_sampler, candidates):
    judged = ImplicitJudge(tiny_sampler(0), tiny_sampler(0)).score(PROMPTS, candidates)
    assert {j.score for group in judged for j in group} == {0.0}


def test_odd_number_of_candidates_is_scored_in_order(tiny_sampler, candidates):
    """Regression: the official code loses the last response when their number is odd."""
    judge = ImplicitJudge(tiny_sampler(0), tiny_sampler(1))
    together = judge.score(PROMPTS, candidates)[0]
    alone = [judge.score(PROMPTS[:1], [[sample]])[0][0].score for sample in candidates[0]]
    assert [j.score for j in together] == pytest.approx(alone, abs=1e-5)


def test_longer_than_the_context(tiny_sampler, word_template):
    samples = text_samples(PROMPTS[0], ["a " * 130, "a"], word_template)
    [judged] = ImplicitJudge(tiny_sampler(0), tiny_sampler(1)).score(PROMPTS[:1], [samples])
    assert judged[0].invalid == "longer than the context"
    assert judged[1].score is not None


def test_infinite_reward_is_invalid(candidates):
    class Certain:
        context = 128

        def score(self, prompts, completions, progress):
            return [[torch.tensor([-math.inf]) for _ in group] for group in completions]

    [[judgement, *_], *_] = ImplicitJudge(Certain(), None).score(PROMPTS, candidates)
    assert (judgement.score, judgement.invalid) == (None, "not finite")


def drawn(sampler, n=2):
    """Candidates of `sampler` as a round stores them, in its round 3."""
    ids = [[5, 6, 7], [8, 9]]
    outputs = sampler.generate(ids, SamplingParams(n=n, temperature=0.7, top_k=5, max_tokens=6))
    return [
        [
            Sample(
                prompt=prompt, prompt_ids=tuple(o.prompt_token_ids), response=c.text,
                response_ids=tuple(c.token_ids), logprobs=tuple(c.logprobs),
                finish_reason=c.finish_reason, index=c.index, seed=c.seed, round=3,
            )
            for c in o.outputs
        ]
        for prompt, o in zip(PROMPTS, outputs, strict=False)
    ]  # fmt: skip


class Counting:
    """Scores as `sampler` does, and remembers what."""

    def __init__(self, sampler):
        self.sampler, self.context, self.scored = sampler, sampler.context, []

    def score(self, prompts, completions, progress=""):
        self.scored += [tuple(ids) for group in completions for ids in group]
        return self.sampler.score(prompts, completions, progress)


def test_what_the_policy_drew_is_not_scored_again(tiny_sampler):
    """Tempered and cut draws too: a sample keeps the log-probs of the model itself."""
    policy, init = Counting(tiny_sampler(0)), tiny_sampler(1)
    groups = drawn(policy.sampler)
    own = ImplicitJudge(policy, init, own_round=3).score(PROMPTS[:2], groups)
    assert policy.scored == []
    scored = ImplicitJudge(policy, init).score(PROMPTS[:2], groups)
    assert len(policy.scored) == 4
    for group, ours, theirs in zip(groups, own, scored, strict=True):
        for sample, a, b in zip(group, ours, theirs, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-4)
            truth = log_prob(policy.sampler, sample) - log_prob(init, sample)
            assert a.score == pytest.approx(truth, abs=1e-4)


def test_what_another_drew_is_scored(tiny_sampler):
    """Of another round; with an EOS put behind it; or given, without log-probs."""
    policy, init = Counting(tiny_sampler(0)), tiny_sampler(1)
    [[own, other], [given, forced]] = drawn(policy.sampler)
    other = replace(other, round=0, logprobs=tuple(-9.0 for _ in other.logprobs))
    given, forced = (
        replace(given, logprobs=()), replace(forced, response_ids=(*forced.response_ids, 4))
    )  # fmt: skip
    groups = [[own, other], [given, forced]]
    mixed = ImplicitJudge(policy, init, own_round=3).score(PROMPTS[:2], groups)
    assert policy.scored == [s.response_ids for s in (other, given, forced)]
    for group, verdicts in zip(groups, mixed, strict=True):
        for sample, judged in zip(group, verdicts, strict=True):
            truth = log_prob(policy.sampler, sample) - log_prob(init, sample)
            assert judged.score == pytest.approx(truth, abs=1e-4)
