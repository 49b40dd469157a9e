"""`python -m splice`: the same as the program `splice`."""

from __future__ import annotations

from splice.cli.main import main

if __name__ == "__main__":
    main()
