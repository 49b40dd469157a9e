"""How other programs write LoRA adapters: one file for each of them, and what several of them need."""
