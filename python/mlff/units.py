"""Unit conversions. Inside mlff everything is in eV, Angstrom and elementary charges.

Values follow the 2019 SI (exact constants e, N_A, k_B), as in CODATA 2018.
"""

KJ_PER_MOL_PER_EV = 96.48533212331002  # e * N_A / 1000
KCAL_PER_MOL_PER_EV = KJ_PER_MOL_PER_EV / 4.184  # thermochemical calorie
ANGSTROM_PER_NM = 10.0
COULOMB_EV_ANGSTROM = 14.399645478425668  # e^2 / (4 pi epsilon_0), in eV Angstrom
BOHR_ANGSTROM = 0.529177210903
