"""Processes that are killed (SIGKILL) at a moment drawn by chance, while they save an adapter or merge one on disk."""


def kill_often(*a): ...
