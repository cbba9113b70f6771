"""Sets of plausible salient objects with scores of preference: PSOD beside a dense model."""
