"""Many adapters on one model."""
