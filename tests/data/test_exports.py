from __future__ import annotations

from srlm_fast.data.exports import alpaca_eval_rows, mt_bench_row
from srlm_fast.data.records import Message, Sample, user


def test_alpaca_eval_rows():
    prompt = (Message("system", "s"), *user("Why?"))
    samples = [Sample(prompt, (1,), f"r{i}", (2,), (-1.0,), "stop", i, 0, 1) for i in range(2)]
    rows = alpaca_eval_rows(samples, generator="M2")
    assert [row["output"] for row in rows] == ["r0", "r1"]
    assert rows[0] == {
        "instruction": "Why?",
        "output": "r0",
        "generator": "M2",
        "dataset": "srlm_fast",
        "datasplit": "eval",
    }


def test_mt_bench_rows():
    """What FastChat's reader and judges take from a line."""
    row = mt_bench_row(81, ["one", "two"], "M2")
    assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (row["question_id"], row["model_id"]) == (81, "M2")
    assert row["choices"][0]["turns"][1] == "two" and row["tstamp"] > 0
    others = [mt_bench_row(82, ["one", "two"], "M2"), mt_bench_row(81, ["one", "two"], "M3")]
    assert len({r["answer_id"] for r in [row, *others]}) == 3
    assert row["answer_id"] == mt_bench_row(81, ["one", "two"], "M2")["answer_id"]
