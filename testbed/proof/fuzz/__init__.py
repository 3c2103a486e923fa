"""Broken inputs, by the million: whatever a stranger sends is refused in one clear line, or understood."""
