"""Networks that denoise trajectories: plain functions of tensors."""
