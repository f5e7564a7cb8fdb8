"""One set of checks for every engine, against the float64 reference."""

import numpy as np
import pytest
from ase import Atoms
from engines import ENGINES, params
from machine_code import architectures
from reference import ROUNDING, random_model, reference
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from structures import STRUCTURES, structure

from mlff import torchscript
from mlff.export import build_payload

ENERGY = 1e-6  # eV/atom
FORCE = 1e-5  # eV/Angstrom
EDGE = 5e-6  # Angstrom, of an edge vector: GPUs give float32


def rotated(name: str, sign: float = 1.0) -> Atoms:
    """Open boundaries only: LAMMPS and OpenMM want lower triangular cells."""
    atoms = structure(name)
    atoms.positions = sign * atoms.positions @ Rotation.random(random_state=5).as_matrix().T
    return atoms


def permuted(name: str) -> Atoms:
    atoms = structure(name)
    return atoms[np.random.default_rng(5).permutation(len(atoms))]


CASES = {
    **{name: structure(name) for name in STRUCTURES},
    "ethanol rotated": rotated("ethanol"),
    "mixed_elements reflected": rotated("mixed_elements", -1.0),
    "triclinic permuted": permuted("triclinic"),
    "water_box permuted": permuted("water_box"),
}
CASES = {name.replace(" ", "-"): atoms for name, atoms in CASES.items()}


@pytest.fixture(scope="module", params=[(16, 1), (32, 3)], ids=lambda p: f"features{p[0]}-layers{p[1]}")
def parity_model(request):
    return random_model(*request.param)


@pytest.fixture(scope="module")
def expected(parity_model):
    return {name: reference(parity_model, atoms) for name, atoms in CASES.items()}


@pytest.fixture(scope="module")
def model_pt(parity_model, tmp_path_factory):
    """The file that a user has: every engine reads this one."""
    path = tmp_path_factory.mktemp("parity") / "model.pt"
    torchscript.save(build_payload(parity_model, {"teacher": "random weights, for tests"}, architectures()), path)
    return path


@pytest.fixture(scope="module")
def difference_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("differences") / "model.pt"
    path.write_bytes(build_payload(random_model(32, 3), {}, architectures()))
    return path


@pytest.fixture(scope="module", params=params(ENGINES))
def measured(request, model_pt, tmp_path_factory):
    """Results of one engine for all structures that it can express, and the reasons for the others."""
    engine = ENGINES[request.param]
    engine.require()
    reasons = {name: engine.cannot(atoms) for name, atoms in CASES.items()}
    if engine.only:
        reasons.update({name: f"runs {', '.join(engine.only)} alone, to save time" for name in CASES if name not in engine.only})
    can = {name: atoms for name, atoms in CASES.items() if reasons[name] is None}
    return engine.run(model_pt, can, tmp_path_factory.mktemp(request.param)), reasons


def assert_same_edges(found, wanted) -> None:
    """Each edge of one is an edge of the other, whatever the order."""
    a, b = (np.column_stack([1e3 * np.asarray(edges).T, np.asarray(vectors)]).reshape(-1, 5) for edges, vectors in (found, wanted))
    assert len(a) == len(b)
    if len(a):
        distances, partners = cKDTree(b).query(a)
        assert distances.max() < EDGE and len(set(partners.tolist())) == len(b)


@pytest.mark.parametrize("name", CASES)
def test_parity(measured, expected, name):
    """Edges first: where they differ nothing else can agree. Then the energy, that of the atoms, forces, virial."""
    results, reasons = measured
    if reasons[name]:
        pytest.skip(f"the engine {reasons[name]}")
    found, wanted = results[name], expected[name]
    n = len(wanted.energies)
    if found.edges is not None:
        assert_same_edges(found.edges, (wanted.neighbors.edges, wanted.neighbors.vectors))
    assert abs(found.energy - wanted.energy) <= ENERGY * n
    if found.energies is not None:
        np.testing.assert_allclose(found.energies, wanted.energies, atol=10 * ENERGY, rtol=0)
        assert found.energies.sum() == pytest.approx(found.energy, rel=1e-12)
    tolerance = FORCE + ROUNDING * np.abs(wanted.forces).max(initial=0)
    np.testing.assert_allclose(found.forces, wanted.forces, atol=tolerance, rtol=0)
    if found.virial is not None:
        np.testing.assert_allclose(found.virial, wanted.virial, atol=tolerance * n, rtol=0)


@pytest.mark.parametrize("engine", params(name for name in ENGINES if "-ranks" not in name))
def test_forces_are_finite_differences_of_the_engine_s_own_energy(engine, difference_file, tmp_path):
    """Fourth order with steps of 0.01 Angstrom: single precision leaves an energy noise of about 1e-6 eV, so 1e-4 eV/Angstrom."""
    ENGINES[engine].require()
    step, weights, cases = 0.01, {1: 8 / 12, -1: -8 / 12, 2: -1 / 12, -2: 1 / 12}, {}
    for name in ("ethanol", "triclinic"):
        direction = np.random.default_rng(0).normal(size=(len(structure(name)), 3))
        direction /= np.linalg.norm(direction)
        for factor in (0, *weights):
            cases[f"{name}{factor}"] = structure(name)
            cases[f"{name}{factor}"].positions += factor * step * direction
        cases[name] = direction
    directions = {name: cases.pop(name) for name in ("ethanol", "triclinic")}
    results = ENGINES[engine].run(difference_file, cases, tmp_path)
    for name, direction in directions.items():
        slope = sum(weight * results[f"{name}{factor}"].energy for factor, weight in weights.items()) / step
        assert -slope == pytest.approx((results[f"{name}0"].forces * direction).sum(), abs=5e-4)
