"""Distillation: label structures with a teacher (label.py), batch them (data.py), fit a student (fit.py)."""
