"""Many samples of each prompt, and their scores under another model.

python examples/sample_and_score.py MODEL [OTHER_MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from srlm_fast import Sampler, SamplingParams

if len(sys.argv) not in (2, 3):
    sys.exit(__doc__)
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
sampler = Sampler(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
print("backend:", sampler.backend)

prompts = ["The sea is", "Once upon a time"]
outputs = sampler.generate(prompts, SamplingParams(n=4, temperature=0.8, max_tokens=32, seed=1))
for output in outputs:
    for completion in output.outputs:
        print(f"{completion.cumulative_logprob:8.2f}  {completion.finish_reason:6}", end="  ")
        print(repr(completion.text))

other = Sampler(AutoModelForCausalLM.from_pretrained(sys.argv[-1]), tokenizer)
ids = [output.prompt_token_ids for output in outputs]
completions = [[c.token_ids for c in output.outputs] for output in outputs]
for output, group in zip(outputs, other.score(ids, completions), strict=True):
    change = [
        float(logp.sum()) - c.cumulative_logprob
        for c, logp in zip(output.outputs, group, strict=True)
    ]
    print("log-prob under the other model, less its own:", [round(x, 2) for x in change])
