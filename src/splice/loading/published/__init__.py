"""Adapters as people published them: how each is read, if there is one way to, and only one."""
