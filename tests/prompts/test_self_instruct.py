import re

import pytest

from srlm_fast.config import PromptsConfig
from srlm_fast.data.records import prompt_text, user
from srlm_fast.errors import UserError
from srlm_fast.prompts.self_instruct import new_prompts

SEEDS = [user(f"seed{i} alpha{i} beta{i} gamma{i} delta{i}") for i in range(12)]


def fresh(n):
    """A prompt unlike any other."""
    return f"new{n} one{n} two{n} three{n} four{n}"


def two_tasks(n, asked):
    return f" {fresh(2 * n)}\n10. {fresh(2 * n + 1)}"


@pytest.fixture
def create(scripted, char_template):
    """Runs new_prompts against a scripted sampler; gives texts, counts and the sampler."""

    def run(answer, num_prompts=8, *, seeds=SEEDS, seed=0, round=1, context=100_000, **options):
        keep = {k: options.pop(k) for k in ("earlier", "avoid", "is_valid") if k in options}
        sampler = scripted(answer, context)
        config = PromptsConfig(num_prompts=num_prompts, **options)
        prompts, counts = new_prompts(
            sampler, char_template, seeds, config, seed=seed, round=round, **keep
        )
        return [prompt_text(p) for p in prompts], counts, sampler

    return run


def shown(asked):
    return re.findall(r"^\d+\. (.*)$", asked.partition("\n<assistant>")[0], re.MULTILINE)


def test_stops_at_the_number_asked_for(create):
    texts, counts, sampler = create(two_tasks, num_prompts=7, max_new_tokens=99)
    assert texts == [fresh(n) for n in range(7)]
    assert counts == {"accepted": 7, "surplus": 7}
    assert sampler.batches[0][1].max_tokens == 99


def test_six_seeds_and_two_accepted_prompts_are_shown(create):
    texts, _, sampler = create(two_tasks, num_prompts=700)
    assert len(texts) == 700
    first, later = sampler.batches[0][0], sampler.asked[sampler.batches[0][0] :]
    seeds = {prompt_text(p) for p in SEEDS}
    for asked in sampler.asked[:first]:
        assert len(set(shown(asked))) == 8 and set(shown(asked)) <= seeds
    assert later
    for asked in later:
        assert len(set(shown(asked))) == 8
        assert len(seeds & set(shown(asked))) == 6
        assert set(shown(asked)) - seeds <= set(texts)
    assert len(set(sampler.asked)) > 0.9 * len(sampler.asked), "calls share demonstrations"


def test_sandbox_list_is_prefilled(create):
    texts, _, sampler = create(
        lambda n, asked: f" {fresh(n)} ; task : cut", num_prompts=3, template="sandbox"
    )
    assert texts == [fresh(n) for n in range(3)]
    prompt, _, prefill = sampler.asked[0].partition("\n<assistant>")
    assert prompt == "come up with new tasks"
    assert prefill.startswith("task : seed") and prefill.endswith(" ; task :")


def test_every_drop_has_its_reason(create):
    answers = [
        (f" {fresh(0)}\n10. {fresh(1)}", "length"),
        " too short",
        " Draw me a nice house\n10. Write a program that adds numbers\n11. ... and then four words",
        f" {fresh(0)}\n10. {prompt_text(SEEDS[3])}\n11. avoid this very prompt",
        " bad one two three four",
        f" {fresh(0)} more\n10.",
        f" {fresh(2)}",
    ]
    texts, counts, _ = create(
        lambda n, asked: answers[n] if n < len(answers) else "",
        num_prompts=7,
        max_calls=7,
        avoid=["avoid this  very prompt"],
        is_valid=lambda text: not text.startswith("bad"),
    )
    assert texts == [fresh(0), fresh(2)]
    assert counts == {
        "accepted": 2,
        "truncated": 2,
        "length": 1,
        "keyword": 1,
        "program": 1,
        "start": 1,
        "duplicate": 2,
        "malformed": 1,
        "similar": 1,
        "empty": 1,
    }


def test_a_list_that_was_cut_off_is_dropped_whole_or_but_for_its_last_task(create):
    """Self-Instruct drops it whole."""
    cut = (f" {fresh(0)}\n10. {fresh(1)}\n11. {fresh(2)}", "length")
    whole = f" {fresh(3)}"
    run = {"num_prompts": 4, "max_calls": 4}
    answers = [cut, whole, cut, cut]
    texts, counts, _ = create(lambda n, asked: answers[n], **run)
    assert (texts, counts) == ([fresh(3)], {"accepted": 1, "truncated": 9})
    texts, counts, _ = create(lambda n, asked: answers[n], keep_truncated=True, **run)
    assert texts == [fresh(0), fresh(1), fresh(3)]
    assert counts == {"accepted": 3, "truncated": 3, "duplicate": 4}


def test_a_numbered_list_is_stopped(create):
    """At item 16, as in Self-Instruct's code: eight are shown, and seven may come."""
    _, _, sampler = create(two_tasks)
    assert sampler.batches[0][1].stop == ("\n16.",)
    _, _, sampler = create(two_tasks, max_tasks=2, num_seed_demos=3)
    assert sampler.batches[0][1].stop == ("\n8.",)
    _, _, sampler = create(two_tasks, max_tasks=0)
    assert sampler.batches[0][1].stop == ()


def test_prompts_of_earlier_rounds_are_neither_repeated_nor_approached(create):
    answers = [fresh(0), fresh(0) + " more", fresh(1)]
    texts, counts, _ = create(
        lambda n, asked: " " + answers[n], num_prompts=3, max_calls=3, earlier=[fresh(0)]
    )
    assert texts == [fresh(1)]
    assert counts == {"accepted": 1, "duplicate": 1, "similar": 1}


def test_rouge_threshold_is_configurable(create):
    answers = [fresh(0), fresh(0) + " more"]
    run = {"num_prompts": 2, "max_calls": 2}
    texts, _, _ = create(lambda n, asked: " " + answers[n], rouge_l=0.95, **run)
    assert texts == answers


def test_fewer_than_asked_is_no_error(create):
    texts, counts, sampler = create(lambda n, asked: " " + fresh(n % 3), num_prompts=5)
    assert texts == [fresh(0), fresh(1), fresh(2)]
    assert len(sampler.asked) == 100, "twenty calls a prompt at most"
    assert counts == {"accepted": 3, "duplicate": 97}


def test_nothing_usable_is_an_error_that_says_why(create):
    with pytest.raises(UserError, match=r"in 4 calls \(length 4\)"):
        create(lambda n, asked: " no", max_calls=4)


def test_a_model_that_gives_nothing_is_given_up(create):
    with pytest.raises(UserError, match=r"in 544 calls \(truncated 544\).*keep_truncated"):
        create(lambda n, asked: (" one two three four five", "length"), num_prompts=10_000)


def test_no_seeds(create):
    with pytest.raises(UserError, match="seed prompts"):
        create(two_tasks, seeds=[])


def test_few_seeds_are_shown_once_each(create):
    _, _, sampler = create(two_tasks, num_prompts=1, seeds=SEEDS[:3])
    assert sorted(shown(sampler.asked[0])) == sorted(prompt_text(p) for p in SEEDS[:3])


def test_seeds_are_shown_on_one_line_and_long_ones_not_at_all(create):
    seeds = [user("five\nwords on   two lines"), user("word " * 151)]
    _, _, sampler = create(two_tasks, num_prompts=1, seeds=seeds)
    assert shown(sampler.asked[0]) == ["five words on two lines"]


def test_calls_that_do_not_fit_are_counted(create):
    long = user("word " * 140)
    room = len("".join(two_tasks(0, "")))
    texts, counts, sampler = create(
        two_tasks,
        num_prompts=20,
        seeds=[*SEEDS[:3], long],
        num_seed_demos=1,
        num_generated_demos=0,
        context=600 + room,
        max_new_tokens=room,
    )
    assert len(texts) == 20
    assert counts["call too long"] > 0
    assert not any("word word" in asked for asked in sampler.asked)


def test_context_without_room_is_an_error(create):
    with pytest.raises(
        UserError, match=r"in 20 calls \(call too long 20\).* context of 300 tokens"
    ):
        create(two_tasks, num_prompts=20, context=300, max_new_tokens=200)


def test_same_seed_same_calls(create):
    """Regression: elsewhere the list of demonstrations is a global that grows with every call."""
    runs = [create(two_tasks, num_prompts=40) for _ in range(2)]
    assert runs[0][2].asked == runs[1][2].asked
    assert runs[0][2].batches == runs[1][2].batches
    for change in ({"seed": 1}, {"round": 2}):
        other = create(two_tasks, num_prompts=40, **change)[2]
        assert other.asked[0] != runs[0][2].asked[0]
        assert other.batches[0][1].seed != runs[0][2].batches[0][1].seed
