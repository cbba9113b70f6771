"""Adaptation to a shifted domain by one unlabeled step: Meta-DMoE beside a dense model."""
