"""TRL's DPO on packed batches: its trainer's arguments, another class.

python examples/trl_dpo.py MODEL PAIRS.jsonl OUT    # rows of prompt, chosen, rejected
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from srlm_fast.integrations.trl import SrlmDPOConfig, SrlmDPOTrainer

if len(sys.argv) != 4:
    sys.exit(__doc__)
folder, pairs, out = sys.argv[1:]
trainer = SrlmDPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder),
    args=SrlmDPOConfig(
        output_dir=out,
        per_device_train_batch_size=4,
        max_length=512,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
    processing_class=AutoTokenizer.from_pretrained(folder),
)
trainer.train()
trainer.save_model(out)
