"""Score a file of responses with the model as its own judge (LLM-as-a-Judge, 0 to 5).

python examples/judge_responses.py MODEL RESPONSES.jsonl    # rows of prompt and response
"""

import json
import sys
from itertools import groupby

from transformers import AutoModelForCausalLM, AutoTokenizer

from srlm_fast import (
    ChatTemplate,
    JudgeConfig,
    PromptedJudge,
    Sampler,
    context_length,
    read_rows,
    text_samples,
    user,
)

if len(sys.argv) != 3:
    sys.exit(__doc__)
folder, responses = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
template = ChatTemplate(tokenizer, "auto" if tokenizer.chat_template else "plain")
context = context_length(model)
judge = PromptedJudge(
    Sampler(model, tokenizer, eos_ids=template.eos_ids), template,
    JudgeConfig(num_samples=3, max_new_tokens=min(256, context // 4)), seed=0, context=context,
)  # fmt: skip

rows = read_rows(responses)
if any({"prompt", "response"} - row.keys() for row in rows):
    sys.exit(f"{responses}: every row needs a prompt and a response")
groups = [list(group) for _, group in groupby(rows, key=lambda row: row["prompt"])]
candidates = [
    text_samples(user(group[0]["prompt"]), [row["response"] for row in group], template)
    for group in groups
]
verdicts = judge.score([group[0].prompt for group in candidates], candidates)
for group, judged in zip(groups, verdicts, strict=True):
    for row, verdict in zip(group, judged, strict=True):
        votes = [vote.score for vote in verdict.votes]
        print(json.dumps({**row, "score": verdict.score, "votes": votes, "why": verdict.invalid}))
