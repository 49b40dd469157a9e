"""Cartridges: their keys and values, the prefill that these start from, and several of them as one."""
