"""LoRA and its relatives: one record, the mathematics of each relative in a file of its own."""
