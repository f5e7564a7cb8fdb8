"""PaiNN (Schuett, Unke, Gastegger, Equivariant message passing for the prediction of tensorial properties and molecular
spectra, ICML 2021, arXiv:2102.03150): the readable reference, the model that is trained, and its checkpoint file.

The operations live in filter.py, message.py, update.py, readout.py and repulsion.py, each beside its analytic gradient.
:class:`PaiNN` strings the forward functions together, so autograd works through it (training needs second derivatives);
:func:`energy_and_gradient` strings the analytic gradients together, which is what every compiled backend executes.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .core import NO_GRADE
from .extrapolation import Extrapolation
from .files import replacing
from .filter import CUTOFF_FUNCTIONS, RADIAL_BASES, gaussian_rows, radial_basis
from .message import (
    message,
    message_backward,
    message_first,
    message_first_backward,
    message_first_weights,
    source_features,
    source_features_backward,
)
from .readout import readout, readout_backward
from .repulsion import repulsion, switched, untrained_radius, zbl_constants
from .update import update, update_backward

CHECKPOINT_VERSION = 1
DOUBLE = ("shift", "gaussians", "repulsion_radius")  # tensors of a model that are kept in float64


@dataclass(frozen=True)
class PaiNNConfig:
    """Hyper-parameters of the model.

    Attributes:
        species: chemical symbols that the model knows, in the order of its tables.
        features: number F of channels, a multiple of 16.
        layers: number of message and update layers.
        n_radial: number K of radial functions.
        cutoff: radius of a message in Angstrom.
        norm_epsilon: the length of a vector p is sqrt(p^2 + epsilon) (update.py). Where symmetry makes vectors vanish, as it does in a
            perfect crystal, a length has a kink, and the potential with it: epsilon rounds it off. SchNetPack has 1e-8.
        repulsion: at short range nuclei repel each other and the network is switched off (repulsion.py).
        radial_basis: "bessel" or "gaussian" (filter.py).
        cutoff_function: "polynomial" or "cosine" (filter.py).
    """

    species: List[str] = field(default_factory=lambda: ["H", "C", "O"])
    features: int = 128
    layers: int = 3
    n_radial: int = 20
    cutoff: float = 5.0
    norm_epsilon: float = 1e-2
    repulsion: bool = True
    radial_basis: str = "bessel"
    cutoff_function: str = "polynomial"

    def __post_init__(self):
        unknown = [x for x in self.species if NUMBER_OF_SYMBOL.get(x, 0) < 1]
        if unknown or not self.species or len(set(self.species)) != len(self.species):
            raise ValueError(f"PaiNNConfig.species must be distinct chemical symbols, got {self.species}")
        if self.features < 16 or self.features % 16:
            raise ValueError(f"PaiNNConfig.features must be a positive multiple of 16, got {self.features}")
        if self.layers < 1 or self.n_radial < 1 or not (self.cutoff > 0 and self.norm_epsilon > 0):
            raise ValueError(f"PaiNNConfig needs layers >= 1, n_radial >= 1, cutoff > 0 and norm_epsilon > 0, got {self}")
        for name, known in (("radial_basis", RADIAL_BASES), ("cutoff_function", CUTOFF_FUNCTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"PaiNNConfig.{name} must be {' or '.join(known)}, got {getattr(self, name)!r}")

    @property
    def atomic_numbers(self) -> List[int]:
        return [NUMBER_OF_SYMBOL[x] for x in self.species]


def _dense(n_in: int, *n_out: int) -> nn.Parameter:
    w = torch.empty(n_in, *n_out)
    nn.init.xavier_uniform_(w if n_out else w.view(-1, 1))
    return nn.Parameter(w)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class PaiNN(nn.Module):
    """The energy model. Weights multiply from the right (x @ w), so w has the shape [in, out].

    Attributes:
        gaussians: [n_radial + 1, 2] float64, the Gaussians of the radial basis (filter.gaussian_rows), which are not trained; None if
            it is of Bessel functions.
        repulsion_radius: [S, S] float64 in Angstrom, symmetric: where the network ends and the repulsion of nuclei begins (repulsion.py).
            Zeros without repulsion.
        extrapolation: parameters of the extrapolation grade (extrapolation.py), which are fitted after the weights; None without.
    """

    def __init__(self, config: PaiNNConfig):
        super().__init__()
        self.config = config
        f, k, s = config.features, config.n_radial, len(config.species)
        self.embedding = nn.Parameter(torch.randn(s, f))
        self.layers = nn.ModuleList()
        for _ in range(config.layers):
            layer = nn.Module()
            layer.source = nn.ParameterDict({"w1": _dense(f, f), "b1": _zeros(f), "w2": _dense(f, 3 * f), "b2": _zeros(3 * f)})
            layer.filter = _dense(k + 1, 3 * f)
            layer.update = nn.ParameterDict(
                {"vu": _dense(f, 2 * f), "w1": _dense(2 * f, f), "b1": _zeros(f), "w2": _dense(f, 3 * f), "b2": _zeros(3 * f)}
            )
            self.layers.append(layer)
        self.readout = nn.ParameterDict({"w1": _dense(f, f // 2), "b1": _zeros(f // 2), "w2": _dense(f // 2), "b2": _zeros()})
        self.register_buffer("shift", torch.zeros(s, dtype=torch.float64))
        self.register_buffer("gaussians", gaussian_rows(config.cutoff, k) if config.radial_basis == "gaussian" else None)
        numbers = torch.tensor(config.atomic_numbers)
        radius = untrained_radius(numbers)
        self.register_buffer("repulsion_radius", radius if config.repulsion else torch.zeros_like(radius))
        self.register_buffer("zbl_constants", zbl_constants(numbers), persistent=False)
        index_of_number = torch.full((120,), -1, dtype=torch.long)
        index_of_number[config.atomic_numbers] = torch.arange(s)
        self.register_buffer("index_of_number", index_of_number, persistent=False)
        self.extrapolation: Optional[Extrapolation] = None

    @property
    def pair_table(self) -> Tensor:
        """Constants [S, S, 3] of the repulsion, float64, as repulsion.repulsion takes them."""
        return torch.cat([self.zbl_constants, self.repulsion_radius.unsqueeze(-1)], dim=-1).to(torch.float64)

    def short_range(self, species: Tensor, edges: Tensor) -> Tensor:
        """Rows [E, 3] of :attr:`pair_table` for the elements of each edge."""
        return self.pair_table[species[edges[0]], species[edges[1]]]

    def species_index(self, atomic_numbers: Tensor) -> Tensor:
        """Indices [N] into config.species. Raises ValueError for an element that the model does not know.

        Compiled code does not look (a GPU would have to wait for it): whoever compiles has made sure.
        """
        index = self.index_of_number[atomic_numbers]
        if not torch.compiler.is_compiling() and bool((index < 0).any()):
            unknown = sorted(set(atomic_numbers[index < 0].tolist()))
            raise ValueError(f"the model knows the elements {' '.join(self.config.species)}; got atomic numbers {unknown}")
        return index

    def scalar_features(self, atomic_numbers: Tensor, edges: Tensor, edge_vectors: Tensor) -> Tensor:
        """Scalar features [N, F] after the last layer; arguments as in :meth:`forward`."""
        config, dtype = self.config, self.embedding.dtype
        species = self.species_index(atomic_numbers)
        edge_vectors = edge_vectors.to(torch.float64)
        d64 = torch.linalg.vector_norm(edge_vectors, dim=-1)
        unit = (edge_vectors / d64.unsqueeze(-1)).to(dtype)
        basis, slope = radial_basis(d64.to(dtype), config.cutoff, config.cutoff_function, config.n_radial, self.gaussians)
        if config.repulsion:
            basis, _ = switched(basis, slope, d64, self.short_range(species, edges)[:, 2])
        for index, layer in enumerate(self.layers):
            if index == 0:
                x_species = source_features(self.embedding, **layer.source)
                q_s, q_v = message_first_weights(x_species, layer.filter)
                s, v = message_first(self.embedding, q_s, q_v, species, edges, unit, basis)
            else:
                s, v = message(source_features(s, **layer.source), v, s, edges, unit, basis, layer.filter)
            s, v = update(s, v, **layer.update, epsilon=config.norm_epsilon)
        return s

    def forward(self, atomic_numbers: Tensor, edges: Tensor, edge_vectors: Tensor) -> Tensor:
        """Atomic energies.

        Args:
            atomic_numbers: [N] integers.
            edges: [2, E]; row 0 the destination i, row 1 the source j; both directions of every pair within the cutoff.
            edge_vectors: [E, 3] in Angstrom, r_ij = x_j + shift - x_i. Pairs beyond the cutoff contribute exactly nothing.

        Returns:
            energies [N] in eV, float64, shifts and repulsion included.
        """
        species = self.species_index(atomic_numbers)
        s = self.scalar_features(atomic_numbers, edges, edge_vectors)
        energy = readout(s, **self.readout).to(torch.float64) + self.shift[species].to(torch.float64)
        if self.config.repulsion:
            d64 = torch.linalg.vector_norm(edge_vectors.to(torch.float64), dim=-1)
            pair_energy, _ = repulsion(d64, self.short_range(species, edges))
            energy = energy.index_add(0, edges[0], pair_energy)
        return energy

    def extrapolation_grade(self, atomic_numbers: Tensor, edges: Tensor, edge_vectors: Tensor) -> Tensor:
        """Extrapolation grades [N] (extrapolation.py); arguments as in :meth:`forward`. ValueError for a model without."""
        if self.extrapolation is None:
            raise ValueError(NO_GRADE)
        return self.extrapolation(self.scalar_features(atomic_numbers, edges, edge_vectors), self.species_index(atomic_numbers))


def energy_and_gradient(model: PaiNN, atomic_numbers: Tensor, edges: Tensor, edge_vectors: Tensor) -> Tuple[Tensor, Tensor]:
    """Energies and the gradient with respect to the edge vectors, without autograd.

    Arguments as in :meth:`PaiNN.forward`.

    Returns:
        energies [N] in eV (float64) and g [E, 3] = dE/dr_ij in eV/Angstrom (float64).
    """
    config, dtype = model.config, model.embedding.dtype
    species = model.species_index(atomic_numbers)
    edge_vectors = edge_vectors.to(torch.float64)
    d64 = torch.linalg.vector_norm(edge_vectors, dim=-1)
    unit64 = edge_vectors / d64.unsqueeze(-1)
    unit, d = unit64.to(dtype), d64.to(dtype)
    basis, slope = radial_basis(d, config.cutoff, config.cutoff_function, config.n_radial, model.gaussians)
    if config.repulsion:
        pair = model.short_range(species, edges)
        basis, slope = switched(basis, slope, d64, pair[:, 2])
    inputs: List[Tuple[Tensor, ...]] = []
    q_s = q_v = s = v = torch.empty(0)
    for index, layer in enumerate(model.layers):
        if index == 0:
            q_s, q_v = message_first_weights(source_features(model.embedding, **layer.source), layer.filter)
            s_mid, v_mid = message_first(model.embedding, q_s, q_v, species, edges, unit, basis)
            inputs.append((s_mid, v_mid))
        else:
            x = source_features(s, **layer.source)
            s_mid, v_mid = message(x, v, s, edges, unit, basis, layer.filter)
            inputs.append((s_mid, v_mid, x, v, s))
        s, v = update(s_mid, v_mid, **layer.update, epsilon=config.norm_epsilon)
    energy, gradient = readout(s, **model.readout).to(torch.float64) + model.shift[species].to(torch.float64), torch.zeros_like(unit64)
    if config.repulsion:
        pair_energy, pair_slope = repulsion(d64, pair)
        energy, gradient = energy.index_add(0, edges[0], pair_energy), pair_slope.unsqueeze(-1) * unit64

    r = model.readout
    g_s, g_v = readout_backward(s, r["w1"], r["b1"], r["w2"]), torch.zeros_like(v)
    for index in range(config.layers - 1, -1, -1):
        layer = model.layers[index]
        g_s, g_v = update_backward(g_s, g_v, *inputs[index][:2], **layer.update, epsilon=config.norm_epsilon)
        if index == 0:
            g_edge = message_first_backward(g_s, g_v, q_s, q_v, species, edges, unit, d, basis, slope)
        else:
            _, _, x, v_in, s_in = inputs[index]
            g_x, g_v, g_edge = message_backward(g_s, g_v, x, v_in, edges, unit, d, basis, slope, layer.filter)
            w = layer.source
            g_s = g_s + source_features_backward(g_x, s_in, w["w1"], w["b1"], w["w2"])
        gradient = gradient + g_edge.to(torch.float64)
    return energy, gradient


def forces_and_virial(gradient: Tensor, edges: Tensor, edge_vectors: Tensor, n_atoms: int) -> Tuple[Tensor, Tensor]:
    """Forces and virial from the gradient with respect to the edge vectors.

    Returns:
        forces [N, 3] in eV/Angstrom and the virial [3, 3] = -sum r_ij (x) dE/dr_ij in eV: positive pressure pushes
        outwards, stress by ASE's convention is -virial / volume.
    """
    forces = torch.zeros((n_atoms, 3), dtype=gradient.dtype, device=gradient.device)
    forces = forces.index_add(0, edges[0], gradient).index_add(0, edges[1], -gradient)
    virial = -edge_vectors.to(gradient.dtype).t() @ gradient
    return forces, 0.5 * (virial + virial.t())


def save_checkpoint(model: PaiNN, path) -> None:
    """Writes weights (float32, those of DOUBLE float64) and configuration to a safetensors file, whole or not at all (OSError)."""
    dtypes = dict.fromkeys(DOUBLE, torch.float64)
    tensors = {k: t.detach().cpu().to(dtypes.get(k, torch.float32)).contiguous() for k, t in model.state_dict().items()}
    header = {"architecture": "painn", "version": CHECKPOINT_VERSION, "config": asdict(model.config)}
    with replacing(path) as unfinished:
        save_file(tensors, str(unfinished), metadata={"mlff": json.dumps(header)})


def load_checkpoint(path) -> PaiNN:
    """Reads a checkpoint of :func:`save_checkpoint`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an mlff checkpoint, another architecture or version, or weights of other shapes than the
            configuration asks for.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(str(path), framework="pt") as f:
            header = json.loads((f.metadata() or {})["mlff"])
            tensors: Dict[str, Tensor] = {k: f.get_tensor(k) for k in f.keys()}
    except Exception as e:
        raise ValueError(f"{path} is not an mlff checkpoint (safetensors with an 'mlff' header): {e}") from e
    if header.get("architecture") != "painn" or header.get("version") != CHECKPOINT_VERSION:
        raise ValueError(
            f"{path}: expected architecture painn, version {CHECKPOINT_VERSION}; got {header.get('architecture')}, {header.get('version')}"
        )
    try:
        missing = {f.name for f in fields(PaiNNConfig)} - set(header["config"])
        if missing:  # a default would be another model
            raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
        model = PaiNN(PaiNNConfig(**header["config"]))
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: the configuration is not one of PaiNNConfig: {e}") from e
    try:
        if any(name.startswith("extrapolation.") for name in tensors):
            names = ("projection", "environments", "calibration")
            model.extrapolation = Extrapolation(*(tensors[f"extrapolation.{name}"] for name in names))
            model.extrapolation.check(len(model.config.species), model.config.features)
        model.load_state_dict(tensors)
    except (KeyError, RuntimeError) as e:
        reasons = " ".join(str(e).split())
        raise ValueError(f"{path}: the weights do not fit the configuration {header['config']}: {reasons}") from e
    return model


def read_record(checkpoint) -> Dict:
    """The record beside a checkpoint or a file of labels (same name, ending .json); empty if there is none."""
    record = Path(checkpoint).with_suffix(".json")
    return json.loads(record.read_text()) if record.is_file() else {}
