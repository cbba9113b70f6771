"""Auxiliary losses of routing, one a file."""
