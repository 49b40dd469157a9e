"""OFT: its config, its layers, and its record."""
