"""Distillation. run.py holds the whole of `mlff train`: labels (label.py) of a teacher (teachers.py), batches of graphs (data.py),
the fit of a student (fit.py), and what its configuration file may say (config.py)."""

MAX_FORCE = 30.0  # eV/Angstrom: a teacher's labels above it are left out, unless asked for
