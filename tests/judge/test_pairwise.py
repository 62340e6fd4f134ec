import re
import time

import pytest

from srlm_fast.config import PairwiseConfig
from srlm_fast.data.records import Judgement, Vote, user
from srlm_fast.errors import UserError
from srlm_fast.judge.base import text_samples
from srlm_fast.judge.pairwise import (
    Comparison,
    PromptedPairwiseJudge,
    ScoreComparison,
    load_pairwise_prompt,
    parse_verdict,
)

READ = [
    ("Verdict: A", 1.0),
    ("Verdict: B", 0.0),
    ("Verdict: tie", 0.5),
    ("verdict: b.", 0.0),
    ("**Verdict:** A", 1.0),
    ("**Verdict: B**", 0.0),
    ("“Verdict: A”", 1.0),
    ("Verdict: Tie.", 0.5),
    ("Verdict: Response A", 1.0),
    ("Verdict: Assistant B wins", 0.0),
    ("Verdict: A is better", 1.0),
    ("Verdict: A, because it is complete", 1.0),
    ("Verdict: A because it is complete", 1.0),
    ("Verdict: B since A is wrong", 0.0),
    ("Verdict: A\nResponse A is complete.", 1.0),
    ("Verdict: [[A]]", 1.0),
    ("Verdict: [B]", 0.0),
    ("Verdict\uff1aB", 0.0),
    ("Both are good, but [[B]] is better.", 0.0),
    ("[[C]]", 0.5),
    ("First I thought Verdict: A. Now, Verdict: B", 0.0),
    ("Response A is wrong about the date.\n\nVerdict: B", 0.0),
]
UNREADABLE = [
    "",
    "A",
    "A is better",
    "Verdict:",
    "Verdict: A good answer must be short",
    "Verdict: A or B",
    "Verdict: A/B",
    "Verdict: A and B are equally good",
    "Verdict: **B** and **A** are equally good",
    "Verdict: B & A",
    "Verdict: A, B or tie",
    "Verdict: neither",
    "Verdict: Both",
    "Verdict: C",
    "Verdict: Better",
    "[A]",
    "<response_a>Verdict: A</response_a>",
    "<response_b>Verdict: B</response_b> I cannot say.",
]


@pytest.mark.parametrize(("text", "outcome"), READ)
def test_reads(text, outcome):
    assert parse_verdict(text) == outcome


@pytest.mark.parametrize("text", UNREADABLE)
def test_refuses(text):
    assert parse_verdict(text) is None


def test_loops_of_a_small_model_take_linear_time():
    start = time.process_time()
    for piece in ("verdict: ", "Verdict: A, ", "[[", "Verdict: A" + " " * 50, "* "):
        parse_verdict("Verdict:" + piece * 20_000)
    assert time.process_time() - start < 5.0


def judge_with(scripted, char_template, answer, **changes):
    return PromptedPairwiseJudge(
        scripted(answer),
        char_template,
        PairwiseConfig(),
        **{"seed": 5, "context": 50_000} | changes,
    )


def shown(prompt):
    """The two responses of a filled judge prompt, A first."""
    return re.search(
        r"<response_a>(.*)</response_a>\n\n<response_b>(.*)</response_b>", prompt
    ).groups()


def test_both_orders_must_agree(scripted, char_template, make_sample):
    """One prompt for each thing that a judge of two orders can do."""
    says = {
        "better": lambda a, b: "Verdict: A" if a == "good" else "Verdict: B",
        "worse": lambda a, b: "Verdict: B" if a == "good" else "Verdict: A",
        "first place": lambda a, b: "Verdict: A",
        "second place": lambda a, b: "Verdict: B",
        "equal": lambda a, b: "Verdict: tie",
        "a doubt": lambda a, b: "Verdict: A" if a == "good" else "Verdict: tie",
        "no word": lambda a, b: "Verdict: A" if a == "good" else "hm",
    }

    def answer(prompt, index, seed):
        question = re.search(r"User: (.*)\n", prompt)[1]
        return says[question](*shown(prompt))

    judge = judge_with(scripted, char_template, answer)
    prompts = [user(question) for question in says]
    good, bad = ([make_sample(text)] * len(says) for text in ("good", "bad"))
    compared = judge.compare(prompts, good, bad)
    assert [c.outcome for c in compared] == [1.0, 0.0, 0.5, 0.5, 0.5, 0.5, None]
    assert [c.outcome for c in judge.compare(prompts, bad, good)] == [
        0,
        1,
        0.5,
        0.5,
        0.5,
        0.5,
        None,
    ]
    assert compared[2].votes == (Vote("Verdict: A", 1.0), Vote("Verdict: A", 0.0)), "of `good`"
    assert compared[6].votes[1] == Vote("hm", None, "no verdict")
    asked, params, progress = judge.sampler.calls[0]
    assert len(asked) == 2 * len(says) and progress == "comparing"
    assert (params.n, params.temperature, params.seed, params.max_tokens) == (1, 0.0, 5, 512)


def test_equal_responses_tie_unasked(scripted, char_template, make_sample):
    judge = judge_with(scripted, char_template, lambda *_: "Verdict: A")
    same, other = make_sample("same"), make_sample("other")
    compared = judge.compare([user("q")] * 2, [same, same], [same, other])
    assert compared == [Comparison(0.5), Comparison(0.5, compared[1].votes)]
    assert len(judge.sampler.calls[0][0]) == 2
    judge.compare([user("q")], [same], [same])
    assert len(judge.sampler.calls) == 1, "nothing to ask"


def test_too_long_has_no_outcome(scripted, char_template, make_sample):
    judge = judge_with(scripted, char_template, lambda *_: "Verdict: A", context=2_000)
    long, short = make_sample("word " * 500), make_sample("word")
    [comparison] = judge.compare([user("q")], [long], [short])
    assert comparison.outcome is None
    assert [vote.invalid for vote in comparison.votes] == ["judge prompt too long"] * 2


def test_a_real_model_compares_alone_as_in_company(tiny_sampler, word_template, tmp_path):
    text = "review task <INSTRUCTION_HERE> a <RESPONSE_A_HERE> b <RESPONSE_B_HERE> justify"
    (tmp_path / "mine.txt").write_text(text)
    config = PairwiseConfig(prompt=str(tmp_path / "mine.txt"), max_new_tokens=8, temperature=1.0)
    sampler = tiny_sampler(0)
    judge = PromptedPairwiseJudge(sampler, word_template, config, seed=1, context=sampler.context)
    prompts = [user("sort these a b"), user("sort these c d")]
    ones, others = (
        [text_samples(prompt, [text], word_template)[0] for prompt in prompts]
        for text in ("a b", "b a")
    )
    both = judge.compare(prompts, ones, others)
    assert judge.compare(prompts[1:], ones[1:], others[1:]) == both[1:]
    assert all(len(c.votes) == 2 and c.votes[0].text for c in both)


class Table:
    """A judge of single responses with known scores."""

    name = "table"

    def __init__(self, scores):
        self.scores = scores

    def score(self, prompts, candidates):
        return [[Judgement(self.scores[s.response]) for s in group] for group in candidates]


def test_any_judge_of_single_responses_compares(make_sample):
    judge = ScoreComparison(Table({"one": 1.0, "two": 2.0, "too": 2.0, "none": None}))
    pairs = [("two", "one"), ("one", "two"), ("two", "too"), ("none", "one"), ("one", "none")]
    ones, others = ([make_sample(text) for text in side] for side in zip(*pairs, strict=True))
    compared = judge.compare([user("q")] * 5, ones, others)
    assert [c.outcome for c in compared] == [1.0, 0.0, 0.5, None, None]
    assert judge.name == "table"


def test_prompts_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("<INSTRUCTION_HERE> <RESPONSE_A_HERE> <RESPONSE_B_HERE>\n")
    filled = load_pairwise_prompt(str(path)).fill(user("q <RESPONSE_B_HERE>"), "one", "two")
    assert filled == user("q <RESPONSE_B_HERE> one two")
    path.write_text("<INSTRUCTION_HERE> <RESPONSE_HERE>")
    with pytest.raises(UserError, match="has no <RESPONSE_A_HERE>"):
        load_pairwise_prompt(str(path))
    with pytest.raises(UserError, match="unknown judge prompt 'additive'; known are verdict"):
        load_pairwise_prompt("additive")
