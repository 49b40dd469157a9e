"""Merging adapters into the files of a base model, without ever holding the model."""
