from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from srlm_fast.config import Config, EvaluateConfig
from srlm_fast.data.records import Judgement, Pair, Preference, RankedGroup, Vote, user
from srlm_fast.data.task import Task
from srlm_fast.evaluate.policy import evaluate_model
from srlm_fast.evaluate.table import result_rows

CONFIG = replace(
    Config(), evaluate=EvaluateConfig(num_prompts=2, num_samples=2, num_judge_groups=1)
)
PROMPTS = [user("one"), user("two"), user("three")]


class LengthJudge:
    """Scores a response by its length; cannot score empty ones."""

    name = "length"

    def score(self, prompts, candidates):
        assert [group[0].prompt for group in candidates] == list(prompts)
        return [[self._judge(s.response) for s in group] for group in candidates]

    def _judge(self, text):
        score = float(len(text)) if text else None
        return Judgement(score, (Vote(text, score, None if text else "empty"),))


@pytest.fixture
def model(make_sample):
    """model(sampled, greedy): a `draw` that gives these texts for every prompt."""

    def make(sampled, greedy="greedy"):
        def draw(prompts, *, n, temperature, top_p):
            if temperature:
                assert (n, temperature, top_p) == (2, 0.7, 0.9)
                texts = sampled
            else:
                texts = [greedy]
            samples = [
                replace(make_sample(t), prompt=p, index=i)
                for p in prompts
                for i, t in enumerate(texts)
            ]
            return samples, Counter({"prompt too long": 0})

        return draw

    return make


@pytest.fixture
def evaluate(make_sample):
    def as_samples(prompt, responses):
        return [replace(make_sample(r), prompt=prompt, index=i) for i, r in enumerate(responses)]

    def run(draw, task, **options):
        return evaluate_model(
            "M2", round=1, draw=draw, as_samples=as_samples, task=task, config=CONFIG, **options
        )

    return run


def letters(prompt, response):
    return {"a": int("a" in response), "b": int("b" in response)}


def test_oracle_scores_samples_and_greedy_of_the_first_prompts(evaluate, model):
    task = Task("toy", test_prompts=PROMPTS, oracle=letters)
    metrics, samples = evaluate(model(["ab", "a"], greedy="b"), task)
    assert [s.prompt for s in samples] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert (metrics["oracle_score"], metrics["greedy_oracle_score"]) == (1.5, 1.0)
    assert metrics["criteria"] == {"a": 1.0, "b": 0.5}
    assert metrics["mean_length"] == 1.5
    assert (metrics["name"], metrics["round"], metrics["test_prompts"]) == ("M2", 1, 2)
    assert metrics["test_prompts_dropped"] == {}
    for key in ("win_rates", "judge", "judge_score", "preference_accuracy", "label_accuracy"):
        assert metrics[key] is None, key


def test_win_rate_by_the_oracle_says_so(evaluate, model):
    task = Task("toy", test_prompts=PROMPTS, oracle=letters)
    _, before = evaluate(model(["a", "c"]), task)
    _, best = evaluate(model(["ab", "ab"]), task)
    opponents = {"SFT": before, "M1": best}
    metrics, _ = evaluate(model(["ab", "c"]), task, judge=LengthJudge(), opponents=opponents)
    wins = metrics["win_rates"]
    assert (wins["SFT"]["win"], wins["M1"]["lose"]) == (1.0, 1.0)
    assert wins["SFT"]["judged_by"] == "oracle"


def test_without_oracle_one_judge_scores_both_models(evaluate, model):
    task = Task("toy", test_prompts=PROMPTS)
    _, before = evaluate(model(["long answer", "x"]), task)
    opponents = {"M1": before}
    metrics, _ = evaluate(model(["y", "z"]), task, judge=LengthJudge(), opponents=opponents)
    assert (metrics["judge_score"], metrics["judge_se"]) == (1.0, 0.0)
    wins = metrics["win_rates"]["M1"]
    assert (wins["lose"], wins["judged_by"]) == (1.0, "length")
    assert metrics["oracle_score"] is metrics["greedy_oracle_score"] is metrics["criteria"] is None


class LongerWins:
    """A pairwise judge; it was asked in both orders and said the same."""

    name = "longer"

    def compare(self, prompts, ones, others):
        sides = zip(ones, others, strict=True)
        outcomes = [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b)))
                    for a, b in ((x.response, y.response) for x, y in sides)]  # fmt: skip
        return [SimpleNamespace(outcome=o, votes=(Vote("", o), Vote("", o))) for o in outcomes]


def test_a_pairwise_judge_compares_first_samples_with_every_opponent(evaluate, model):
    task = Task("toy", test_prompts=PROMPTS)
    _, sft = evaluate(model(["a", "a long second sample"]), task)
    _, m1 = evaluate(model(["long enough", "x"]), task)
    opponents = {"SFT": sft, "M1": m1}
    metrics, _ = evaluate(model(["abc", "y"]), task, pairwise=LongerWins(), opponents=opponents)
    duels = metrics["head_to_head"]
    assert (duels["SFT"]["win"], duels["M1"]["lose"], duels["M1"]["prompts"]) == (1.0, 1.0, 2)
    assert duels["SFT"]["judged_by"] == "longer" and metrics["win_rates"] is None
    assert evaluate(model(["abc", "y"]), task, opponents=opponents)[0]["head_to_head"] is None
    rows = dict(result_rows([metrics]))
    assert rows["head to head with M1: win/tie/lose"] == ["0%/0%/100%"]


def test_with_neither_oracle_nor_judge_there_is_no_winner(evaluate, model):
    task = Task("toy", test_prompts=PROMPTS)
    _, before = evaluate(model(["a", "b"]), task)
    metrics, _ = evaluate(model(["c", "d"]), task, opponents={"M1": before})
    assert metrics["win_rates"] is metrics["judged_by"] is metrics["judge_score"] is None
    assert metrics["mean_length"] == 1.0


def test_without_ranked_groups_the_judge_is_measured_on_the_gold_pairs(evaluate, model):
    pairs = [
        Preference(user("q"), "long one", "x"),
        Preference(user("r"), "x", "mid"),
        Preference(user("s"), "long", "even longer"),
    ]
    task = Task("toy", test_prompts=PROMPTS, test_pairs=pairs)
    judge = evaluate(model(["a", "b"]), task, judge=LengthJudge())[0]["judge"]
    assert judge["pairwise_accuracy"]["half"] == 1.0 and judge["pairs"] == 1, "num_judge_groups"
    assert (judge["length_bias"], judge["length_bias_of_ranks"]) == (1.0, 1.0)
    task = Task("toy", test_prompts=PROMPTS, test_pairs=pairs[1:])
    judge = evaluate(model(["a", "b"]), task, judge=LengthJudge())[0]["judge"]
    assert (judge["pairwise_accuracy"]["half"], judge["length_bias_of_ranks"]) == (0.0, -1.0)


@pytest.mark.parametrize(("name", "fives"), [("prompted", 1), ("scorer", 0), ("implicit", 0)])
def test_five_points_are_perfect_only_on_the_judges_scale(evaluate, model, name, fives):
    judge = LengthJudge()
    judge.name = name
    task = Task("toy", test_prompts=PROMPTS, oracle=letters)
    task = replace(task, judge_test=[RankedGroup(user("q"), ("12345", "1"), (0, 1))])
    found = evaluate(model(["a", "b"]), task, judge=judge)[0]["judge"]
    assert found["fives"] == fives


def test_judge_agreement_uses_the_first_groups_and_counts_the_unparsable(evaluate, model):
    groups = [
        RankedGroup(user("q"), ("long one", "mid", "x", ""), (0, 1, 2, 3)),
        RankedGroup(user("r"), ("x", "long one"), (0, 1)),
    ]
    task = Task("toy", test_prompts=PROMPTS, judge_test=groups)
    judge = evaluate(model(["a", "b"]), task, judge=LengthJudge())[0]["judge"]
    assert judge["judge"] == "length"
    assert (judge["prompts"], judge["pairs"], judge["unscored"]) == (1, 6, 1)
    assert judge["pairwise_accuracy"]["wrong"] == 0.5
    assert judge["pairwise_accuracy"]["drop"] == 1.0
    assert judge["parsed_share"] == 0.75
    assert judge["invalid"] == {"empty": 1}


def test_preference_accuracy_gives_a_tie_half_credit(evaluate, model):
    pairs = [Preference(user("q"), c, r) for c, r in [("long", "x"), ("aa", "bb"), ("x", "long")]]
    task = Task("toy", test_prompts=PROMPTS, test_pairs=pairs)
    metrics, _ = evaluate(model(["a", "b"]), task, implicit=LengthJudge())
    assert metrics["preference_accuracy"] == 0.5
    assert metrics["judge"] is None


def test_labels_of_the_training_pairs_are_checked_by_the_oracle(evaluate, model):
    pairs = [Pair(user("q"), (1,), c, (2,), "c", (3,), None, None, 1) for c in ("ab", "d")]
    task = Task("toy", test_prompts=PROMPTS, oracle=letters)
    metrics, _ = evaluate(model(["a", "b"]), task, pairs=pairs)
    assert metrics["label_accuracy"] == 1.0
    assert metrics["labels"]["equal"] == 0.5
