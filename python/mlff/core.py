"""The compiled core from Python: a thin binding over plugin/mlff.h with NumPy arrays in and out.

    system = System(Model("model.pt"))
    system.set_atoms(atoms.numbers)
    results = system.compute(atoms.positions, atoms.cell.array, atoms.pbc)   # {"energy": ..., "forces": ..., "virial": ...}

Units are Angstrom and eV. An edge vector is r_ij = x_j + shift - x_i for the centre i and its neighbour j; forces are -dE/dx;
virials have the components xx, yy, zz, xy, xz, yz and the sign with which positive pressure pushes outwards, so that the stress
by ASE's convention is -virial / volume.
"""

import ctypes
import json
import os
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

ABI_VERSION = 3
NO_GRADE = "the model has no extrapolation grade; `mlff train` fits one: run it again with this mlff, and export the student"
RESULTS = ("energy", "atom_energy", "forces", "virial", "atom_virial")  # of every model
GRADE = "extrapolation_grade"  # of models that have it


class MLFFError(RuntimeError):
    """The core refused a call; the message is one line that says what was wrong, what was expected and what to do."""


class MLFFFileError(MLFFError):
    """Missing, truncated, damaged, foreign or too new a model file."""


class MLFFInputError(MLFFError, ValueError):
    """Bad arguments: an unknown element, a wrong shape, NaN, a cell that cannot be."""


class MLFFResourceError(MLFFError):
    """Out of memory, or no such device."""


class MLFFExchangeError(MLFFError):
    """The exchange callback failed, or is needed and was not set."""


class MLFFInternalError(MLFFError):
    """A failed self-check, or a fault of mlff itself."""


_ERRORS = {1: MLFFFileError, 2: MLFFInputError, 3: MLFFResourceError, 4: MLFFExchangeError, 5: MLFFInternalError}


def library_path(name: str) -> Path:
    """Path of a compiled library: ``libmlff.so``, ``libmlff_torch.so`` or ``mlffplugin.so``.

    Looked for in the folder that the environment variable MLFF_LIBRARY_PATH names, else in the package (``mlff/lib``), else in
    ``build`` of the source tree.

    Raises:
        FileNotFoundError: it is in none of them; the message says how to get it.
    """
    package = Path(__file__).resolve().parent
    folders = [package / "lib", package.parents[1] / "build"]
    if os.environ.get("MLFF_LIBRARY_PATH"):
        folders = [Path(os.environ["MLFF_LIBRARY_PATH"])]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    places = " or ".join(str(folder) for folder in folders)
    raise FileNotFoundError(f"{name} is not in {places}; build it with `make build` or install the package with pip")


class _Results(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in (*RESULTS, GRADE)]


class DeviceArrays(ctypes.Structure):
    """``mlff_device_arrays`` of plugin/mlff.h: atoms that are on the GPU already, for :meth:`System.compute_device`."""

    _fields_ = [
        ("stream", c_void_p),
        ("is_double", c_int32),
        ("n_rows", c_int64),
        ("positions", c_void_p),
        ("atoms", c_void_p),
        ("box", c_void_p),
        ("length_unit", c_double),
        ("energy_unit", c_double),
        ("energy", c_void_p),
        ("forces", c_void_p),
    ]


_EXCHANGE = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(c_float), c_int32)

_SIGNATURES = {
    "mlff_abi_version": (c_int, []),
    "mlff_version": (c_char_p, []),
    "mlff_last_error": (c_char_p, []),
    "mlff_device_count": (c_int, [c_char_p, POINTER(c_int32)]),
    "mlff_model_load": (c_int, [c_char_p, POINTER(c_void_p)]),
    "mlff_model_load_memory": (c_int, [c_char_p, c_size_t, POINTER(c_void_p)]),
    "mlff_model_free": (None, [c_void_p]),
    "mlff_model_header": (c_char_p, [c_void_p]),
    "mlff_model_sha256": (c_char_p, [c_void_p]),
    "mlff_model_cutoff": (c_double, [c_void_p]),
    "mlff_model_n_species": (c_int32, [c_void_p]),
    "mlff_model_atomic_numbers": (POINTER(c_int32), [c_void_p]),
    "mlff_model_max_exchange_width": (c_int32, [c_void_p]),
    "mlff_model_has_extrapolation_grade": (c_int32, [c_void_p]),
    "mlff_model_self_check": (c_int, [c_void_p, c_char_p, POINTER(c_double), POINTER(c_double)]),
    "mlff_model_supports": (c_int, [c_void_p, c_char_p]),
    "mlff_system_create": (c_int, [c_void_p, c_char_p, POINTER(c_void_p)]),
    "mlff_system_free": (None, [c_void_p]),
    "mlff_system_set_threads": (c_int, [c_void_p, c_int32]),
    "mlff_system_set_atoms": (c_int, [c_void_p, c_int64, c_int64, c_void_p]),
    "mlff_system_set_images": (c_int, [c_void_p, c_void_p]),
    "mlff_system_set_neighbors": (c_int, [c_void_p, c_void_p, c_void_p]),
    "mlff_system_set_exchange": (c_int, [c_void_p, _EXCHANGE, c_void_p]),
    "mlff_system_set_structures": (c_int, [c_void_p, c_int32, c_void_p]),
    "mlff_system_compute": (c_int, [c_void_p, c_void_p, POINTER(_Results)]),
    "mlff_system_compute_periodic": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p, POINTER(_Results)]),
    "mlff_system_compute_batch": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p, POINTER(_Results)]),
    "mlff_system_compute_device": (c_int, [c_void_p, POINTER(DeviceArrays)]),
    "mlff_system_edges": (c_int, [c_void_p, POINTER(c_int64), c_void_p, c_void_p, c_void_p]),
    "mlff_system_bytes": (c_size_t, [c_void_p]),
}


@lru_cache(maxsize=None)
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.mlff_abi_version() != ABI_VERSION:
        raise MLFFResourceError(
            f"{path} has the interface {library.mlff_abi_version()}, this package needs {ABI_VERSION}; build both together"
        )
    return library


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise _ERRORS.get(status, MLFFInternalError)(library.mlff_last_error().decode(errors="replace"))


def _array(values, dtype, shape: Tuple[int, ...], name: str) -> np.ndarray:
    """A C-contiguous array of that dtype and shape (-1: any length)."""
    array = np.ascontiguousarray(values, dtype=dtype)
    if array.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, array.shape)):
        wanted = ", ".join("n" if n < 0 else str(n) for n in shape)
        raise MLFFInputError(f"{name} must have the shape ({wanted}), got {array.shape}")
    return array


def device_count(kind: str = "cuda") -> int:
    """Number of devices of that kind: of "cuda", the GPUs that the NVIDIA driver shows; 0 without a driver."""
    library, count = _load(library_path("libmlff.so")), c_int32()
    _check(library, library.mlff_device_count(kind.encode(), byref(count)))
    return count.value


class Model:
    """A loaded model file; immutable, and may be shared by threads and systems.

    Args:
        source: path of a model.pt or of a bare payload, or the bytes of either.

    Attributes:
        header: the payload's header (docs/file-format.md).
        sha256: 64 hexadecimal digits, the identity of the model.
        cutoff: radius in Angstrom.
        atomic_numbers: int32 [S], the elements that the model knows.
        has_extrapolation_grade: whether the file holds what the result ``extrapolation_grade`` is computed with.
        calibration: float64 [2, B], grades and the errors of a force in eV/Angstrom to be expected there (docs/extrapolation.md); None
            for a model without.
        max_exchange_width: largest number of features per atom that an exchange callback is called with; 0: it is never called.

    Raises:
        MLFFFileError: missing, truncated, damaged, foreign or too new a file.
        FileNotFoundError: the compiled library is missing.
    """

    def __init__(self, source: Union[str, os.PathLike, bytes]):
        self._library = _load(library_path("libmlff.so"))
        self._handle = c_void_p()
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
            status = self._library.mlff_model_load_memory(data, len(data), byref(self._handle))
        else:
            status = self._library.mlff_model_load(os.fsencode(source), byref(self._handle))
        _check(self._library, status)
        self.header: Dict[str, Any] = json.loads(self._library.mlff_model_header(self._handle).decode())
        self.sha256: str = self._library.mlff_model_sha256(self._handle).decode()
        self.cutoff: float = self._library.mlff_model_cutoff(self._handle)
        n_species = self._library.mlff_model_n_species(self._handle)
        self.atomic_numbers: np.ndarray = np.array(
            self._library.mlff_model_atomic_numbers(self._handle)[:n_species], dtype=np.int32
        )
        in_memory = isinstance(source, (bytes, bytearray, memoryview))
        self.calibration = self._read_calibration("model in memory" if in_memory else str(source))
        self.has_extrapolation_grade = bool(self._library.mlff_model_has_extrapolation_grade(self._handle))
        self.max_exchange_width: int = self._library.mlff_model_max_exchange_width(self._handle)

    def _read_calibration(self, name: str) -> Optional[np.ndarray]:
        known = self.header.get("extrapolation")
        if known is None:
            return None
        try:
            calibration = np.array([known["grade"], known["force_error_eV_A"]], dtype=float)
        except (KeyError, TypeError, ValueError):
            calibration = np.zeros(0)
        good = calibration.ndim == 2 and calibration.size > 0 and np.isfinite(calibration).all()
        if not good or (np.diff(calibration) < 0).any():
            raise MLFFFileError(f"{name}: the calibration of the extrapolation grade must be two lists of numbers that never fall")
        return calibration

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.mlff_model_free(self._handle)

    def species(self, atomic_numbers) -> np.ndarray:
        """Species indices int32 [n] of atomic numbers [n]; -1 stays -1, an atom that the model ignores.

        Raises:
            MLFFInputError: an element that the model does not know.
        """
        numbers = _array(atomic_numbers, np.int64, (-1,), "atomic_numbers")
        species = np.full(numbers.shape, -1, dtype=np.int32)
        for index, number in enumerate(self.atomic_numbers):
            species[numbers == number] = index
        unknown = sorted(set(numbers[(species < 0) & (numbers != -1)].tolist()))
        if unknown:
            raise MLFFInputError(
                f"the model knows the atomic numbers {self.atomic_numbers.tolist()}; the structure has {unknown} too"
            )
        return species

    def check_device(self, device: str) -> None:
        """Raises what ``System(model, device)`` would: MLFFResourceError for no driver, no such GPU or no machine code for it."""
        _check(self._library, self._library.mlff_model_supports(self._handle, device.encode()))

    def self_check(self, device: str = "cpu") -> Tuple[float, float]:
        """Evaluates the file's reference structures.

        Returns:
            largest deviations of the energy in eV/atom and of a force component in eV/Angstrom.

        Raises:
            MLFFInternalError: they exceed 1e-5 eV/atom or 1e-4 eV/Angstrom.
            MLFFFileError: the file holds no reference structures.
        """
        energy, force = c_double(), c_double()
        _check(self._library, self._library.mlff_model_self_check(self._handle, device.encode(), byref(energy), byref(force)))
        return energy.value, force.value


class Edges(NamedTuple):
    """Directed pairs within the cutoff, sorted by centre: centers and neighbors int32 [E], vectors float64 [E, 3] in Angstrom."""

    centers: np.ndarray
    neighbors: np.ndarray
    vectors: np.ndarray


class System:
    """One simulation with a model: atoms, neighbour list and workspace. Belongs to one thread at a time.

    Args:
        model: the model.
        device: "cpu", "cuda" (the first GPU) or "cuda:1" and so on. A GPU finds neighbours by itself: set_neighbors is for the CPU.
        threads: of the CPU backend; 0 is the OpenMP default. Results are reproducible bit for bit for a fixed number.

    Every method raises :class:`MLFFInputError` for bad arguments, :class:`MLFFResourceError` for want of memory or of the device;
    after an error the system can be used on.
    """

    def __init__(self, model: Model, device: str = "cpu", threads: int = 0):
        if not isinstance(threads, Integral):
            raise TypeError(f"threads: expected a whole number, got {threads!r}")
        self.model, self.device = model, device
        self._library = model._library
        self._handle = c_void_p()
        self._exchange: Any = _EXCHANGE()
        self._exchange_failure: Optional[BaseException] = None
        self._n_local = self._n_total = 0
        self._n_structures = 1
        self._neighbors_given = False
        _check(self._library, self._library.mlff_system_create(model._handle, device.encode(), byref(self._handle)))
        self._call("set_threads", threads)

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.mlff_system_free(self._handle)

    def _call(self, name: str, *arguments) -> None:
        try:
            _check(self._library, getattr(self._library, f"mlff_system_{name}")(self._handle, *arguments))
        except MLFFExchangeError as e:
            cause, self._exchange_failure = self._exchange_failure, None
            raise e from cause

    def set_atoms(self, atomic_numbers: Sequence[int], n_local: Optional[int] = None) -> None:
        """Sets the atoms and forgets the neighbour list.

        Args:
            atomic_numbers: [n_total]; -1 for an atom that the model must ignore.
            n_local: number of centres; the rows from n_local on are ghosts. All atoms if None.
        """
        species = self.model.species(atomic_numbers)
        n_local = len(species) if n_local is None else n_local
        self._call("set_atoms", n_local, len(species), species.ctypes.data)
        self._n_local, self._n_total, self._neighbors_given = n_local, len(species), False
        self._n_structures = 1

    def set_structures(self, starts: Sequence[int]) -> None:
        """Makes several structures of the atoms, for :meth:`compute_batch`.

        Args:
            starts: [n_structures + 1]; structure b has the atoms starts[b]:starts[b + 1]. Kept until set_atoms is called again.
        """
        starts = _array(starts, np.int64, (-1,), "starts")
        self._call("set_structures", len(starts) - 1, starts.ctypes.data)
        self._n_structures, self._neighbors_given = len(starts) - 1, False

    def set_images(self, originals: Sequence[int]) -> None:
        """Names the ghosts that are images of an earlier row: their features are read from there, and their results added there.

        Args:
            originals: [n_total], for each row the first row that is the same atom; kept until set_atoms is called again.
        """
        originals = _array(originals, np.int32, (self._n_total,), "originals")
        self._call("set_images", originals.ctypes.data)

    def set_neighbors(self, offsets: Sequence[int], neighbors: Sequence[int]) -> None:
        """Sets a full neighbour list, kept until set_neighbors or set_atoms is called again.

        Args:
            offsets: [n_local + 1]; the neighbours of atom i are neighbors[offsets[i]:offsets[i + 1]].
            neighbors: indices 0 .. n_total - 1. Both directions of every pair; entries beyond the cutoff are allowed.
        """
        offsets = _array(offsets, np.int64, (self._n_local + 1,), "offsets")
        neighbors = _array(neighbors, np.int32, (-1,), "neighbors")
        if offsets[-1] != len(neighbors):
            raise MLFFInputError(f"the last offset must be the number of neighbours, {len(neighbors)}, got {offsets[-1]}")
        self._call("set_neighbors", offsets.ctypes.data, neighbors.ctypes.data)
        self._neighbors_given = True

    def set_exchange(self, exchange: Optional[Callable[[np.ndarray], None]]) -> None:
        """Sets the function that fills the ghost rows of a feature table, float32 [n_total, width], from their owners' rows.

        A system with ghosts needs it if the model has more than one message layer. None removes it. If it raises an exception,
        the evaluation raises :class:`MLFFExchangeError` from it.
        """
        if exchange is None:
            callback = _EXCHANGE()
        else:

            def callback(_user, rows, width):
                try:
                    exchange(np.ctypeslib.as_array(rows, shape=(self._n_total, width)))
                except BaseException as e:  # must not travel through C
                    self._exchange_failure = e
                    return 1
                return 0

            callback = _EXCHANGE(callback)
        self._call("set_exchange", callback, None)
        self._exchange = callback  # the core holds a bare pointer to it

    def compute(self, positions, cell=None, pbc=None, want: Iterable[str] = ("energy", "forces", "virial")) -> Dict[str, Any]:
        """Evaluates the model, with the neighbours of set_neighbors if they are set, else with the core's own search.

        Args:
            positions: [n_total, 3] in Angstrom; may lie outside the cell.
            cell: [3, 3], rows are the cell vectors, or None.
            pbc: [3] periodic directions (or one for all), or None for none. Cell and pbc only without set_neighbors.
            want: names of results.

        Returns:
            of those wanted: energy (float, eV), atom_energy [n_local] in eV, forces [n_total, 3] in eV/Angstrom, virial [6] in
            eV, atom_virial [n_total, 6] in eV.

        Raises:
            MLFFExchangeError: an exchange was needed and not set, or failed.
        """
        results, pointers = self._results(want, (6,))
        positions = _array(positions, np.float64, (self._n_total, 3), "positions")
        if self._neighbors_given or (self.device != "cpu" and self._n_local < self._n_total):
            if cell is not None or pbc is not None:
                raise MLFFInputError("cell and pbc must be None when neighbours or ghosts are given: periodicity is in the ghosts")
            self._call("compute", positions.ctypes.data, byref(pointers))
        else:
            self._compute_in_cells("compute_periodic", positions, cell, pbc, (), "cell", pointers)
        if "energy" in results:
            results["energy"] = float(results["energy"][0])
        return results

    def compute_batch(
        self, positions, cells=None, pbcs=None, want: Iterable[str] = ("energy", "forces", "virial")
    ) -> Dict[str, Any]:
        """Evaluates the structures of set_structures: at once on a GPU, one after the other on the CPU.

        Args:
            positions: [n_total, 3] in Angstrom.
            cells: [n_structures, 3, 3], rows are the cell vectors, or None.
            pbcs: [n_structures, 3] periodic directions (or anything that broadcasts to it), or None for none.
            want: names of results.

        Returns:
            as :meth:`compute`, but energy [n_structures] and virial [n_structures, 6].
        """
        n = self._n_structures
        results, pointers = self._results(want, (n, 6))
        positions = _array(positions, np.float64, (self._n_total, 3), "positions")
        self._compute_in_cells("compute_batch", positions, cells, pbcs, (n,), "cells", pointers)
        return results

    def _compute_in_cells(self, function: str, positions, cells, pbcs, shape: Tuple[int, ...], name: str, pointers: _Results) -> None:
        """Calls a function that takes cells [*shape, 3, 3] and periodic directions [*shape, 3]; ``name`` is what errors call the cells."""
        cells = None if cells is None else _array(cells, np.float64, (*shape, 3, 3), name)
        pbcs = None if pbcs is None else np.array(np.broadcast_to(pbcs, (*shape, 3)), dtype=bool).astype(np.int32)
        self._call(
            function,
            positions.ctypes.data,
            None if cells is None else cells.ctypes.data,
            None if pbcs is None else pbcs.ctypes.data,
            byref(pointers),
        )

    def compute_device(self, arrays: DeviceArrays) -> None:
        """Evaluates atoms that are in the memory of the system's GPU (``mlff_system_compute_device`` of plugin/mlff.h)."""
        self._call("compute_device", byref(arrays))

    def _results(self, want: Iterable[str], virial: Tuple[int, ...]) -> Tuple[Dict[str, Any], _Results]:
        shapes = {
            "energy": virial[:-1] or (1,),
            "atom_energy": (self._n_local,),
            "forces": (self._n_total, 3),
            "virial": virial,
            "atom_virial": (self._n_total, 6),
            GRADE: (self._n_local,),
        }
        want = list(want)
        if any(name not in shapes for name in want):
            raise MLFFInputError(f"want must be names out of {', '.join(shapes)}; got {want}")
        results: Dict[str, Any] = {name: np.empty(shapes[name]) for name in want}
        return results, _Results(**{name: array.ctypes.data for name, array in results.items()})

    def edges(self) -> Edges:
        """The pairs of the last evaluation."""
        count = c_int64()
        self._call("edges", byref(count), None, None, None)
        n = count.value
        edges = Edges(np.empty(n, np.int32), np.empty(n, np.int32), np.empty((n, 3)))
        self._call("edges", None, *(array.ctypes.data for array in edges))
        return edges

    @property
    def bytes(self) -> int:
        """Bytes of workspace held."""
        return self._library.mlff_system_bytes(self._handle)
