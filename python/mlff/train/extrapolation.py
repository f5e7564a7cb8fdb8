"""Fits the extrapolation grade (mlff.extrapolation) of a student whose weights are done; the equations are there.

Environments and directions are those of the training data: clusterings by k-means and Fisher's discriminants in turn, each
clustering in the directions that the one before gave. The unit of the grade is a quantile of the training data's own distances.
The error of a force to be expected at a grade is fitted to data that the weights were not trained on, where there are some.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from ..extrapolation import Extrapolation, nearest
from ..painn import PaiNN
from .data import Graphs, batches, collate
from .fit import predict

DIRECTIONS = 32  # D
ENVIRONMENTS = 256  # K, of an element with enough data
LEAST_ATOMS = 20  # for each environment of an element with little data
MOST_ATOMS = 50_000  # of an element to fit with
QUANTILE = 0.995  # of the training data's distances, by element, where the grade is 1
UNKNOWN = 1000.0  # grade of an element without data
RIDGE = 0.01  # of the mean variance, added to W: directions that hardly vary mean nothing
ROUNDS, STEPS = 3, 10  # clusterings, and steps of k-means in each
BINS = 50  # of the calibration, with equally many atoms


def fit_extrapolation(model: PaiNN, training: list[Graphs], validation: list[Graphs], max_edges: int, device: str) -> Extrapolation:
    """The extrapolation grade of a student.

    Args:
        training: what the weights were fitted to.
        validation: labelled structures to calibrate with; none: the training data, whose errors are smaller than those of others.
        max_edges: of a batch.

    Returns:
        the parameters, on the device of the model; ``model`` is left as it is.
    """
    config = model.config
    s, species = _features(model, training, max_edges, device)
    directions = min(DIRECTIONS, config.features)
    projection = s.new_zeros(len(config.species), config.features, directions)
    environments = s.new_full((len(config.species), ENVIRONMENTS, directions), UNKNOWN / directions**0.5)
    for z in range(len(config.species)):
        own = s[species == z]
        if len(own) < 2:
            continue
        p, c = discriminants(own, directions)
        x = own @ p
        distances = (x - c[nearest(x, c)]).norm(dim=1).sort().values
        limit = distances[int(QUANTILE * (len(distances) - 1))].clamp(min=1e-6)
        projection[z] = p / limit
        environments[z] = torch.cat([c, c[-1:].expand(ENVIRONMENTS - len(c), -1)]) / limit
    grade = Extrapolation(projection.float(), environments.float(), torch.zeros(2, 1))
    data = validation or training
    s, species = _features(model, data, max_edges, device)
    grade.calibration = calibrate(grade(s.float(), species).cpu().numpy(), _force_errors(model, data, max_edges, device)).to(device)
    return grade


@torch.no_grad()
def grades(model: PaiNN, graphs: list[Graphs], max_edges: int, device: str) -> np.ndarray:
    """Grades [N] of all atoms of the structures, by a model that has them."""
    parts = [collate([graphs[k] for k in members]).to(device) for members in batches(graphs, max_edges)]
    return torch.cat([model.extrapolation_grade(b.atomic_numbers, b.edges, b.edge_vectors) for b in parts]).cpu().numpy()


def discriminants(s: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """Projection P [F, D] and environments c [K, D] of one element, of whose atoms s [N, F] are the features (float64, N > 1).

    The same for the same data in the same order.
    """
    generator = torch.Generator().manual_seed(0)
    s = s[torch.randperm(len(s), generator=generator)[:MOST_ATOMS].to(s.device)]
    k = min(ENVIRONMENTS, -(-len(s) // LEAST_ATOMS))
    x = s - s.mean(0)  # in random order: the first k are a random choice
    total = x.T @ x / len(x)
    values, vectors = torch.linalg.eigh(total)
    projection = (vectors / values.clamp(min=1e-12).sqrt())[:, -directions:]  # principal components, to begin with
    for _ in range(ROUNDS):
        y = x @ projection
        centres = y[:k]
        for _ in range(STEPS):
            member = nearest(y, centres)
            centres = _means(y, member, k)
        left = x - _means(x, member, k)[member]
        projection = _directions(total, left.T @ left / len(x), directions)
    return projection, (_means(s, member, k) @ projection)[member.unique()]


def calibrate(grade: np.ndarray, error: np.ndarray) -> Tensor:
    """Calibration [2, B] (mlff.extrapolation) of grades [N] and errors of forces [N] in eV/Angstrom.

    Means over bins with equally many atoms, and the nearest sequence that never falls (isotonic regression).
    """
    order = np.argsort(grade, kind="stable")
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    grades, errors = (np.array([values[part].mean() for part in bins]) for values in (grade.astype(float), error.astype(float)))
    return torch.tensor(np.stack([grades, isotonic_regression(errors, weights=[len(part) for part in bins]).x]))


def _directions(total: Tensor, within: Tensor, directions: int) -> Tensor:
    """[F, D] solutions u of total u = lambda within u with the largest lambda, normalised to u within u = 1."""
    size = len(within)
    least = (RIDGE * within.trace() / size).clamp(min=1e-12)
    values, vectors = torch.linalg.eigh(within + least * torch.eye(size, dtype=within.dtype, device=within.device))
    whiten = vectors / values.sqrt()
    return whiten @ torch.linalg.eigh(whiten.T @ total @ whiten).eigenvectors[:, -directions:]


def _means(x: Tensor, member: Tensor, k: int) -> Tensor:
    """Means [K, F] of the rows of x [N, F] by their member [N]; zero where a cluster has none."""
    count = torch.bincount(member, minlength=k).clamp(min=1).unsqueeze(1)
    return torch.zeros(k, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, member, x) / count


@torch.no_grad()
def _features(model: PaiNN, graphs: list[Graphs], max_edges: int, device: str) -> tuple[Tensor, Tensor]:
    """Scalar features [N, F], float64, and element indices [N] of all atoms."""
    s, species = [], []
    for members in batches(graphs, max_edges):
        batch = collate([graphs[k] for k in members]).to(device)
        s.append(model.scalar_features(batch.atomic_numbers, batch.edges, batch.edge_vectors).double())
        species.append(model.species_index(batch.atomic_numbers))
    return torch.cat(s), torch.cat(species)


@torch.no_grad()
def _force_errors(model: PaiNN, graphs: list[Graphs], max_edges: int, device: str) -> np.ndarray:
    """Lengths [N] of the differences from the labels, eV/Angstrom, in the order of _features."""
    errors = []
    for members in batches(graphs, max_edges):
        batch = collate([graphs[k] for k in members]).to(device)
        forces = predict(model, batch)[1]
        errors.append((forces - batch.forces).norm(dim=1).cpu().numpy())
    return np.concatenate(errors)
