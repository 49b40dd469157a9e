"""The methods that act on a model's inputs instead of its layers: one file each, found by `methods.registry`."""
