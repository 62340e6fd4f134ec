import statistics

from srlm_fast.data.records import user
from srlm_fast.judge.controls import LongestJudge, RandomJudge


def test_random_is_uniform_and_fixed_by_seed_prompt_and_response(make_sample):
    prompts = [user(f"question {i}") for i in range(50)]
    candidates = [[make_sample(f"answer {j}") for j in range(8)] for _ in prompts]
    judged = RandomJudge(3).score(prompts, candidates)
    scores = [j.score for group in judged for j in group]
    assert len(set(scores)) == 400
    assert 0 <= min(scores) < 0.2 and 4.8 < max(scores) < 5
    assert abs(statistics.mean(scores) - 2.5) < 0.3
    assert RandomJudge(3).score(prompts[7:8], [candidates[7][5:]]) == [judged[7][5:]]
    assert RandomJudge(4).score(prompts, candidates) != judged


def test_random_is_the_same_in_every_process(make_sample):
    [[judgement]] = RandomJudge(0).score([user("q")], [[make_sample("a")]])
    assert judgement.score == 4.77404907172627


def test_longest(make_sample):
    [judged] = LongestJudge().score([user("q")], [[make_sample("abc"), make_sample("a")]])
    assert [j.score for j in judged] == [4.0, 2.0]
