"""Quantization passes, and their mathematics as plain tensor functions."""
