"""From dense FFNs to experts, one way a file."""
