"""Experts: what the rows of a Routing go through, one kind a file."""
