"""Extrapolation grade: how far an atom is from all that the model was trained on, in units of the farthest that is still usual.

    gamma_i = min_k | P_z s_i - c_zk |        z: element of atom i; s_i: its scalar features after the last layer

c_zk, k = 1 .. K, are the environments of element z in the training data: centres of a k-means clustering of P_z s. The rows of
P_z are the D directions in which environments differ most for how much an environment itself fluctuates: Fisher's linear
discriminants, the largest eigenvalues of C u = lambda W u, with C the covariance of the element's features and W that within the
environments (R. A. Fisher, Ann. Eugenics 7, 179, 1936). So the distance is Mahalanobis' to the nearest environment, as K. Lee et
al. (NeurIPS 2018, arXiv:1807.03888) use it with classes to find what a network was not trained for. P and c are scaled so that
gamma = 1 is what one in two hundred atoms of an element exceeds in the training data; as with the extrapolation grade of MTP and
ACE (E. V. Podryabinkin, A. V. Shapeev, Comput. Mater. Sci. 140, 171, 2017), above 1 a model extrapolates.
"""

import torch
from torch import Tensor, nn


class Extrapolation(nn.Module):
    """The parameters of the grade: buffers, which a checkpoint keeps.

    Attributes:
        projection: [S, F, D], P.
        environments: [S, K, D], c; an element with fewer has its last one several times.
        calibration: [2, B], float64: grades in ascending order, and the error of a force in eV/Angstrom (length of the difference from the
            teacher's) to be expected at each; it never falls. Linear in between, constant beyond.
    """

    def __init__(self, projection: Tensor, environments: Tensor, calibration: Tensor):
        super().__init__()
        self.register_buffer("projection", projection)
        self.register_buffer("environments", environments)
        self.register_buffer("calibration", calibration.to(torch.float64))

    def check(self, species: int, features: int) -> None:
        """Raises RuntimeError for shapes that do not fit a model of so many elements and features."""
        p, c, calibration = (tuple(t.shape) for t in (self.projection, self.environments, self.calibration))
        fits = len(p) == len(c) == 3 and p[:2] == (species, features) and c[0] == species and c[2] == p[2]
        if not fits or len(calibration) != 2 or calibration[0] != 2:
            raise RuntimeError(f"extrapolation: projection {p}, environments {c}, calibration {calibration} do not fit together")

    def forward(self, s: Tensor, species: Tensor) -> Tensor:
        """Grades [N] of scalar features s [N, F] and element indices [N]."""
        return extrapolation_grade(s, species, self.projection, self.environments)


def extrapolation_grade(s: Tensor, species: Tensor, projection: Tensor, environments: Tensor) -> Tensor:
    """Grades [N], no unit, for s [N, F] and element indices [N]; projection [S, F, D], environments [S, K, D]."""
    grade = torch.empty_like(s[:, 0])
    for z in range(len(projection)):
        rows = species == z
        x = s[rows] @ projection[z]
        grade[rows] = (x - environments[z][nearest(x, environments[z])]).norm(dim=1)
    return grade


def nearest(y: Tensor, centres: Tensor) -> Tensor:
    """Index [N] of the centre [K, D] that each row of y [N, D] is nearest to."""
    half = 0.5 * centres.square().sum(1)
    return torch.cat([(half - part @ centres.T).argmin(1) for part in y.split(4096)])
