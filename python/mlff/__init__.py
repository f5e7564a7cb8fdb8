"""One distilled force field, one file, three engines: LAMMPS, OpenMM and ASE.

Importing the package is cheap: torch and the engines are imported by the modules that need them (``mlff.ase``,
``mlff.openmm``, ``mlff.lammps``, ``mlff.export``).
"""

from pathlib import Path
from typing import List

__version__ = "0.1.0"

_STUDENTS = Path(__file__).parent / "students"


def pretrained_names() -> List[str]:
    """Names of the shipped students."""
    return sorted(path.stem for path in _STUDENTS.glob("*.safetensors"))


def pretrained(name: str) -> Path:
    """Path of the checkpoint (safetensors) of a shipped student, e.g. ``mlff.pretrained("ethanol-water")``.

    Raises:
        ValueError: no student of that name; the message lists those that are shipped.
    """
    if name not in pretrained_names():
        raise ValueError(f"no shipped model is called {name!r}; there are: {', '.join(pretrained_names()) or 'none'}")
    return _STUDENTS / f"{name}.safetensors"
