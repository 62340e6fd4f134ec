import math

import pytest
import torch

from srlm_fast.data.records import user
from srlm_fast.judge.base import text_samples
from srlm_fast.judge.implicit import ImplicitJudge

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
