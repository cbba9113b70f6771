"""``unimoe demo``: the whole path on real weights, with its data and its report."""

from .run import demo

__all__ = ["demo"]
