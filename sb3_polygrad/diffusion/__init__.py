"""Diffusion on tensors and callables: schedule, process, guidance, sampler."""
