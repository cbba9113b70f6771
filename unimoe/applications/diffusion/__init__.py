"""Diffusion transformers with mixtures of experts: ProMoE and Switch-DiT beside a dense model."""
