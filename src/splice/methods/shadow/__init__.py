"""AdaLoRA: its layers, the budget of its ranks, and its record."""
