"""Sizes of the inputs of the tests of single operations."""

CUTOFF = 3.0
N_RADIAL = 5
FEATURES = 8
SPECIES = 3
