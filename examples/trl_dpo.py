"""TRL's DPO on packed batches: its trainer's arguments, another class.

python examples/trl_dpo.py MODEL PAIRS.jsonl OUT    # rows of prompt, chosen, rejected
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from srlm_fast.integrations.trl import SrlmDPOConfig, SrlmDPOTrainer

folder, pairs, out = sys.argv[1:]
trainer = SrlmDPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder),
    args=SrlmDPOConfig(output_dir=out, per_device_train_batch_size=4, max_length=512, bf16=False),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
    processing_class=AutoTokenizer.from_pretrained(folder),
)
trainer.train()
trainer.save_model(out)
