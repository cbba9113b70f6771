"""Upcycling of dense FFNs to experts, one method a file."""
