"""X-LoRA: its config, its classifier and its record."""
