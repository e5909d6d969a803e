"""I-LoRA: see README.md."""
