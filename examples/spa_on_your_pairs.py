"""SPA's label refinement on preference pairs of your own: DPO on half of them, then the rest, where
labels that the model suspects count less.

python examples/spa_on_your_pairs.py MODEL PAIRS.jsonl OUT    # rows of prompt, chosen, rejected
"""

import copy
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from srlm_fast import (
    ChatTemplate,
    Pair,
    PreferenceConfig,
    Refinement,
    read_preferences,
    train_preference,
)

if len(sys.argv) != 4:
    sys.exit(__doc__)
folder, source, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
template = ChatTemplate(tokenizer, "auto" if tokenizer.chat_template else "plain")

pairs = [
    Pair(
        prompt=row.prompt, prompt_ids=tuple(template.encode_prompt(row.prompt)),
        chosen=row.chosen, chosen_ids=tuple(template.encode_response(row.prompt, row.chosen)),
        rejected=row.rejected,
        rejected_ids=tuple(template.encode_response(row.prompt, row.rejected)),
        chosen_score=None, rejected_score=None, round=0,
    )
    for row in read_preferences(source)
]  # fmt: skip
if len(pairs) < 2:
    sys.exit(f"{source}: half of the pairs are trained on first, so there must be two or more")
config = PreferenceConfig(learning_rate=1e-5, per_device_train_batch_size=4, logging_steps=1)
seed, rest = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
for name, part, refine in (("DPO", seed, None), ("SPA", rest, Refinement(warmup_fraction=0.0))):
    summary = train_preference(
        model, copy.deepcopy(model), part, config, refine=refine, seed=0, pad_id=template.pad_id,
        log=lambda row: print({k: round(v, 4) for k, v in row.items()}),
    )  # fmt: skip
    print(name, {k: v for k, v in summary.items() if k != "flags"})
    if refine:
        print("suspected:", [i for i, flag in enumerate(summary["flags"]) if flag])
model.save_pretrained(out)
tokenizer.save_pretrained(out)
