"""Calibration text, and the walk that shows a pass the inputs of every linear."""
