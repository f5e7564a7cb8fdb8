"""Sizes of the inputs of the tests of single operations, and models in which operations are switched off."""

from ase import Atoms

from mlff.painn import PaiNN

CUTOFF = 3.0
N_RADIAL = 5
FEATURES = 8
SPECIES = 3


def without_update(model: PaiNN) -> PaiNN:
    """Update layers that change nothing."""
    for layer in model.layers:
        layer.update["w2"].zero_()
        layer.update["b2"].zero_()
    return model


def without_network(model: PaiNN) -> PaiNN:
    """A readout of nothing: what is left is the repulsion and the shifts."""
    model.readout["w2"].zero_()
    model.readout["b2"].zero_()
    model.shift.zero_()
    return model


def isolated_pairs(symbols: str, distances) -> Atoms:
    """Pairs of atoms at these distances, 30 Angstrom from each other."""
    atoms = Atoms()
    for k, d in enumerate(distances):
        atoms += Atoms(symbols, positions=[[30.0 * k, 0, 0], [30.0 * k + 0.6 * d, 0.8 * d, 0]])
    return atoms
