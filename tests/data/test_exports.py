from __future__ import annotations

from srlm_fast.data.exports import alpaca_eval_rows
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
