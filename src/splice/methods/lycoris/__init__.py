"""LoHa and LoKr: what they share, each with its record, and what their files show."""
