from random import Random

from srlm_fast.data.records import prompt_text, user
from srlm_fast.judge.judge_prompt import load_judge_prompt
from srlm_fast.judge.parser import parse_score
from srlm_fast.prompts.task_list import load_task_list
from srlm_fast.sandbox.documents import draw_document, review, task_list
from srlm_fast.sandbox.oracle import Criteria, judge_response
from srlm_fast.sandbox.world import WORLDS, TaskPrompt, draw_prompt, parse_prompt

TASK = TaskPrompt("rotate", ("ice", "fig", "pear", "mango"))
W4 = WORLDS["W4"]


def test_review_compares_the_lists_item_by_item() -> None:
    response = "reversed : we get fig pear ice . hope this helps !"
    document = review(TASK, response, judge_response(TASK, response))
    assert document.assistant == (
        "relevant no substantial no answers no form yes check fig fig ok pear pear ok mango ice "
        "bad ice none bad exact no Score: 1"
    )


def test_review_is_the_judge_prompt_and_parses() -> None:
    response = "rotated : we get fig pear mango ice tea . hope this helps !"
    document = review(TASK, response, judge_response(TASK, response))
    filled = load_judge_prompt("sandbox").fill(user(str(TASK)), response)
    assert document.user == prompt_text(filled)
    assert "none tea bad" in document.assistant
    assert parse_score(document.assistant) == (2.0, None)


def test_task_list_continues_the_self_instruction_prompt() -> None:
    rng = Random(0)
    tasks = [draw_prompt(rng) for _ in range(9)]
    document = task_list(tasks)
    form = load_task_list("sandbox")
    request, start = form.start([str(task) for task in tasks[:4]])
    assert document.user == prompt_text(request)
    assert document.assistant.startswith(start)
    assert form.tasks(document.assistant.removeprefix(start)) == [str(task) for task in tasks[4:]]


def test_mix_of_documents() -> None:
    rng = Random(0)
    count = 3000
    users = [draw_document(W4, rng).user for _ in range(count)]
    chats = sum(parse_prompt(text) is not None for text in users) / count
    lists = sum(text == "come up with new tasks" for text in users) / count
    reviews = sum(text.startswith("review") for text in users) / count
    assert abs(chats - 0.58) < 0.03
    assert abs(reviews - 0.36) < 0.03
    assert abs(lists - 0.06) < 0.015
    assert abs(chats + reviews + lists - 1.0) < 1e-9


def test_a_tenth_of_the_verdicts_in_reviews_are_wrong() -> None:
    """A quarter of the reviews times 0.4; the score always is the sum of the verdicts."""
    rng = Random(0)
    wrong = total = 0
    for _ in range(3000):
        document = draw_document(W4, rng)
        if not document.user.startswith("review"):
            continue
        words = document.assistant.split()
        said = Criteria(*(words[words.index(name) + 1] == "yes" for name in Criteria._fields))
        assert words[-2:] == ["Score:", str(said.score)]
        task_text, response = document.user.split("task : ")[1].split(" ; response : ")
        task = parse_prompt(task_text)
        assert task is not None
        truth = judge_response(task, response.removesuffix(" ; justify then Score:"))
        wrong += sum(a != b for a, b in zip(said, truth, strict=True))
        total += 5
    assert abs(wrong / total - 0.1) < 0.015
