"""MoE designs side by side under one budget: ``unimoe compare``."""
