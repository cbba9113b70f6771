"""What to do with a trained mixture of experts: smaller, faster, and what that costs."""
