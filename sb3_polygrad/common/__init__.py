"""Trajectories, their buffer, and the small stateful pieces that need nothing but tensors."""
