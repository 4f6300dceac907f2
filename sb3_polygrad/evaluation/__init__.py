"""Measurements of world models: what they imagine, against what the simulator does."""
