"""SHiRA: its record, and functions that choose which entries of a weight it trains."""
