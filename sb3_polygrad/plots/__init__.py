"""Figures, drawn from the files that the benchmarks write and from nothing else."""
