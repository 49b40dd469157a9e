"""Many adapters at once: batches whose rows use different adapters."""
