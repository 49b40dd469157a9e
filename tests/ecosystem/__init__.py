"""What other libraries and people's programs do with the name `peft`, run on splice: `python -m tests.ecosystem`.

In these tests `peft` is the shim. What the reference does is asked of it in a process of its own (`both.reference`).
"""
