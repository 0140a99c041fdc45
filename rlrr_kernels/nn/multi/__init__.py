"""Frozen layers that compute each sample of a batch with the adapter of its own task."""
