"""vLLM in a process of its own, under the Python of an environment that has it.

PYTHON benchmarks/vllm_worker.py MODEL_FOLDER OPTIONS

Speaks lines of JSON: writes {"version": ...} when it is ready, then answers every
{"prompts": [[id]], "params": {...}} with {"seconds": ..., "tokens": [[[id]]]}, the tokens of every
sample of every prompt. Imports nothing of this repository. OPTIONS are those of vllm.LLM.
"""

import json
import os
import sys
from time import perf_counter


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to stdout, which is for answers alone
    import vllm

    folder, options = sys.argv[1:]
    engine = vllm.LLM(model=folder, skip_tokenizer_init=True, **json.loads(options))
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        params = vllm.SamplingParams(detokenize=False, **asked["params"])
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        start = perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = perf_counter() - start
        tokens = [[list(sample.token_ids) for sample in output.outputs] for output in outputs]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
