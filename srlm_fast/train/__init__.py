"""Training: supervised fine-tuning and preference optimisation on token ids."""
