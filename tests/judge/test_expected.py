import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from srlm_fast.config import JudgeConfig
from srlm_fast.data.records import user
from srlm_fast.data.template import ChatTemplate
from srlm_fast.errors import UserError
from srlm_fast.judge.base import text_samples
from srlm_fast.judge.expected import ExpectedJudge
from srlm_fast.judge.judge_prompt import load_judge_prompt

CONFIG = JudgeConfig(kind="expected", prompt="sandbox")


class FixedSampler:
    """Gives the same six probabilities after every prompt."""

    def __init__(self, probs):
        self.logprobs = torch.tensor(probs).log()
        self.asked = []

    def next_logprobs(self, prompts, token_ids):
        assert len(token_ids) == 6
        self.asked += prompts
        return self.logprobs.expand(len(prompts), 6)


def judge_fixed(char_template, probs, context=10_000):
    return ExpectedJudge(FixedSampler(probs), char_template, CONFIG, context=context)


def test_expectation_over_the_digits(char_template, make_sample):
    judge = judge_fixed(char_template, [0.0, 0.0, 0.0, 0.1, 0.3, 0.0])
    [[judgement]] = judge.score([user("q")], [[make_sample("r")]])
    assert judgement.score == pytest.approx((3 * 0.1 + 4 * 0.3) / 0.4)
    [vote] = judgement.votes
    assert vote.score == judgement.score
    assert "p(4)=0.3000" in vote.text and "mass=0.4000" in vote.text
    assert bytes(judge.sampler.asked[0]).decode().endswith("Score: ")


def test_no_mass_is_no_judgement(char_template, make_sample):
    judge = judge_fixed(char_template, [0.001] * 6)
    [[judgement]] = judge.score([user("q")], [[make_sample("r")]])
    assert (judgement.score, judgement.invalid) == (None, "no mass on digits")
    assert "mass=0.0060" in judgement.votes[0].text


def test_nan_is_no_judgement(char_template, make_sample):
    judge = judge_fixed(char_template, [math.nan] * 6)
    assert judge.score([user("q")], [[make_sample("r")]])[0][0].score is None


def test_too_long(char_template, make_sample):
    request = load_judge_prompt("sandbox").fill(user("q"), "r")
    fits = len(char_template.encode_prompt(request, prefill="Score: "))
    judge = judge_fixed(char_template, [0.1] * 6, context=fits)
    [judged] = judge.score([user("q")], [[make_sample("rr"), make_sample("r")]])
    assert [j.invalid for j in judged] == ["judge prompt too long", None]
    assert judged[1].score == pytest.approx(2.5)


def test_equals_the_softmax_of_the_model(tiny_sampler, word_template):
    sampler = tiny_sampler(0)
    judge = ExpectedJudge(sampler, word_template, CONFIG, context=128)
    prompts = [user("sort these a b"), user("sort these c d a")]
    candidates = [text_samples(p, ["a b", "yes"], word_template) for p in prompts]
    judged = judge.score(prompts, candidates)
    digits = word_template.tokenizer.convert_tokens_to_ids(list("012345"))
    for prompt, group, judgements in zip(prompts, candidates, judged, strict=True):
        for sample, judgement in zip(group, judgements, strict=True):
            text = judge.prompt.fill(prompt, sample.response)
            ids = torch.tensor([word_template.encode_prompt(text, prefill="Score:")])
            p = sampler.model(ids).logits[0, -1].double().softmax(-1)[digits]
            expected = (p * torch.arange(6)).sum() / p.sum()
            assert judgement.score == pytest.approx(expected.item(), abs=1e-5)


def byte_tokenizer(wrap_tokenizer, merge_space):
    """Byte-level BPE; with `merge_space` a space and a digit are one token, else two."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {c: i for i, c in enumerate(sorted(alphabet))}
    merges = [("Ġ", d) for d in "012345"] if merge_space else []
    vocab |= {"".join(m): len(vocab) + i for i, m in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap_tokenizer(tokenizer)


@pytest.mark.parametrize(("merge_space", "stem", "digit"), [(True, ":", "Ġ3"), (False, "Ġ", "3")])
def test_space_and_digit_as_one_token_or_two(wrap_tokenizer, merge_space, stem, digit):
    tokenizer = byte_tokenizer(wrap_tokenizer, merge_space)
    judge = ExpectedJudge(None, ChatTemplate(tokenizer), CONFIG, context=1024)
    assert tokenizer.convert_ids_to_tokens(judge.digit_ids[3]) == digit
    assert tokenizer.convert_ids_to_tokens(judge._encode(user("x"))[-1]) == stem


def test_digits_that_are_no_tokens_are_refused(wrap_tokenizer):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "Score:": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="digits 0 to 5"):
        ExpectedJudge(None, ChatTemplate(wrap_tokenizer(tokenizer)), CONFIG, context=64)
