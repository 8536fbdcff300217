"""Distillation: the pass, its losses, teachers, students and training."""
