"""Measurements: each command writes csv and json files that plots and pages are made from."""
