"""Shared by all Lightning runs: checkpoints, resuming, sharding, progress, the training log."""
