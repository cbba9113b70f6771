"""Fetch and convert the default models, sprites and photos: ``unimoe prepare`` and the cache it fills."""

from .cache import cache_folder, default_part, resolve_part
from .run import prepare

__all__ = ["cache_folder", "default_part", "prepare", "resolve_part"]
