"""Adapters into weights, and adapters into one adapter."""
