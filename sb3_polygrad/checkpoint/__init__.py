"""Saving a run and resuming it: functions on a model, and the files they write."""
