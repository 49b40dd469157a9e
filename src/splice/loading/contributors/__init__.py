"""What an adapter consists of, one file for each kind of thing; `laying_out.py` asks them in turn."""
