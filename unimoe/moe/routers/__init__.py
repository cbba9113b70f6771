"""Routers: from token features to a Routing, one kind a file."""
