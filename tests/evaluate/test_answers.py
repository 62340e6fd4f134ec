import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from srlm_fast.data.jsonl import read_rows
from srlm_fast.data.template import ChatTemplate
from srlm_fast.evaluate.answers import MT_BENCH_TEMPERATURES, Question, answer, main
from srlm_fast.model.weights import save_model
from srlm_fast.sampler import Sampler
from srlm_fast.sandbox.model import new_model
from srlm_fast.sandbox.tokenizer import make_tokenizer

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["sort these words : fig", "reverse fig"]},
    {"question_id": 111, "category": "math", "turns": ["repeat these words : jam egg", "swap"]},
    {"question_id": 0, "category": "a new one", "turns": ["rotate these words : nut"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder of the sandbox's kind, untrained, that likes words better than the end."""
    tokenizer = make_tokenizer()
    path = tmp_path_factory.mktemp("model") / "M3"
    model = new_model(tokenizer, seed=0)
    model.config.tie_word_embeddings = False
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    head[tokenizer.all_special_ids] = 0.0
    model.lm_head.weight = torch.nn.Parameter(0.2 * head)
    save_model(model, tokenizer, path)
    return path


@pytest.fixture
def run(folder, tmp_path):
    """run(format, questions, *words): the command line on these questions; gives the out file."""

    def command(kind, questions, *words, name="M3"):
        file = tmp_path / ("questions.json" if kind == "alpaca_eval" else "questions.jsonl")
        lines = [json.dumps(row) for row in questions]
        file.write_text("\n".join(lines) if kind == "mt_bench" else f"[{','.join(lines)}]")
        out = tmp_path / "answers" / f"{name}.{'json' if kind == 'alpaca_eval' else 'jsonl'}"
        files = ["--model", str(folder), "--questions", str(file), "--out", str(out)]
        return main([kind, *files, "--max_new_tokens", "8", *words]), out

    return command


def greedy_by_transformers(folder, turns, limit):
    """The conversation, written with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    talk, replies = [], []
    for turn in turns:
        talk.append({"role": "user", "content": turn})
        ids = tokenizer.apply_chat_template(
            talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=limit, do_sample=False)
        replies.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
        talk.append({"role": "assistant", "content": replies[-1]})
    return replies


def test_each_turn_is_asked_after_the_reply_to_the_one_before(folder, run):
    status, out = run("mt_bench", QUESTIONS, "--temperature", "0")
    assert status == 0
    for row, question in zip(read_rows(out), QUESTIONS, strict=True):
        expected = greedy_by_transformers(folder, question["turns"], 8)
        assert row["choices"] == [{"index": 0, "turns": expected}]
        assert all(expected), "a reply without words tells nothing"


def test_categories_have_fastchats_temperatures(folder, run):
    """Greedy where it says 0, and drawn by the seed elsewhere."""
    assert MT_BENCH_TEMPERATURES["math"] == 0.0 and MT_BENCH_TEMPERATURES["writing"] == 0.7
    turns = {}
    for seed in ("1", "2"):
        _, out = run("mt_bench", QUESTIONS, "--seed", seed)
        turns[seed] = {row["question_id"]: row["choices"][0]["turns"] for row in read_rows(out)}
    assert turns["1"][111] == turns["2"][111]
    assert turns["1"][111] == greedy_by_transformers(folder, QUESTIONS[1]["turns"], 8)
    assert turns["1"][81] != turns["2"][81] and turns["1"][0] != turns["2"][0]


def test_alpaca_eval_rows_keep_the_instruction_and_its_dataset(run):
    questions = [
        {"instruction": "sort these words : fig", "dataset": "helpful_base", "output": "theirs"},
        {"instruction": "swap these words : jam egg"},
    ]
    status, out = run("alpaca_eval", questions)
    rows = json.loads(out.read_text())
    assert status == 0 and [r["instruction"] for r in rows] == [q["instruction"] for q in questions]
    assert [r["dataset"] for r in rows] == ["helpful_base", "alpaca_eval"]
    assert {r["generator"] for r in rows} == {"M3"}
    assert all(r["output"] == r["output"].strip() != "theirs" for r in rows)


def test_a_full_context_gives_an_empty_reply_and_says_so(folder, caplog):
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder)
    template = ChatTemplate(tokenizer)
    sampler = Sampler(model, tokenizer)
    words = " fig" * sampler.context
    questions = [Question((f"sort{words}", "swap"), 0.0, {}), Question(("swap : fig",), 0.0, {})]
    long, short = answer(sampler, template, questions, max_new_tokens=10**6)
    assert long == ["", ""] and len(short) == 1
    assert "turn 1: 1 replies are empty" in caplog.text


@pytest.mark.parametrize(
    ("questions", "words", "message"),
    [
        ([], (), "has no questions"),
        ([{"question_id": 1, "category": "math"}], (), "no usable 'turns'"),
        ([{"question_id": 1, "category": "math", "turns": []}], (), "no usable 'turns'"),
        ([{"category": "math", "turns": ["a"]}], (), "no usable 'question_id'"),
        (QUESTIONS, ("--top_p", "2"), "top_p must be in"),
        (QUESTIONS, ("--max_new_tokens", "-1"), "max_tokens must be at least 1"),
        (QUESTIONS, ("--device", "tpu"), "unknown device"),
        (QUESTIONS, ("--model", "no/such/folder"), "does not exist"),
        (QUESTIONS, ("--questions", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (QUESTIONS, ("--out", f"{__file__}/x.jsonl"), "File exists"),
    ],
)
def test_mistakes_are_one_line(run, capsys, questions, words, message):
    status, out = run("mt_bench", questions, *words)
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1
    assert not out.exists()


def test_fastchat_reads_the_answers(run):
    """Its own reader and checks, where it is installed: what it does before it asks a judge."""
    common = pytest.importorskip("fastchat.llm_judge.common")
    matches = pytest.importorskip("fastchat.llm_judge.gen_judgment")
    _, out = run("mt_bench", QUESTIONS[:2])
    questions = common.load_questions(str(out.parents[1] / "questions.jsonl"), None, None)
    answers = common.load_model_answers(str(out.parent))
    common.check_data(questions, answers, {}, ["M3"], {})
    judge = common.Judge("a judge", {}, multi_turn=True)
    (first, second) = matches.make_match_single(
        questions, ["M3"], answers, judge, None, multi_turn=True
    )
    for match, row in zip((first, second), read_rows(out), strict=True):
        assert match.model == row["model_id"] == "M3"
        assert match.answer["choices"][0]["turns"] == row["choices"][0]["turns"]


def test_alpaca_eval_compares_the_outputs(run, tmp_path, monkeypatch):
    """Its own evaluation, where it is installed, with longer answers winning in GPT-4's place."""
    alpaca_eval = pytest.importorskip("alpaca_eval")
    questions = [{"instruction": f"sort these words : {w}"} for w in ("fig", "jam egg", "nut tea")]
    _, ours = run("alpaca_eval", questions)
    _, theirs = run("alpaca_eval", questions, "--seed", "1", "--temperature", "3", name="M2")

    def longest(prompts, **options):
        tasks = [prompt.split("## Task:")[1] for prompt in prompts]
        sides = [re.split(r"\n\n### .*\n?", task)[2:4] for task in tasks]
        said = ["Output (a)" if len(a) > len(b) else "Output (b)" for a, b in sides]
        ones = [1.0] * len(said)
        return {"completions": said, "price_per_example": ones, "time_per_example": ones}

    monkeypatch.setattr("alpaca_eval.decoders.openai.openai_completions", longest)
    board, judged = alpaca_eval.evaluate(
        model_outputs=ours, reference_outputs=theirs, annotators_config="test",
        precomputed_leaderboard=None, output_path=None, fn_metric="get_winrate",
        sort_by="win_rate", is_return_instead_of_print=True, caching_path=None,
    )  # fmt: skip
    texts = [json.loads(path.read_text()) for path in (ours, theirs)]
    lengths = [[len(row["output"]) for row in rows] for rows in texts]
    wins = sum(a > b for a, b in zip(*lengths, strict=True))
    assert len(judged) == 3 and board.index.tolist() == ["M3"]
    assert board.loc["M3", "win_rate"] == pytest.approx(100 * wins / 3)
    assert board.loc["M3", "avg_length"] == sum(lengths[0]) // 3
