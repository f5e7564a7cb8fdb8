"""The commands ``mlff`` and ``mlff-export``.

Exit codes: 0 done, 1 it failed (one line on the error stream says why), 2 wrong usage.
"""

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from . import __version__, pretrained_names


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Optional[List[str]] = None) -> int:
    """``mlff COMMAND ...``; returns the exit code."""
    parser = _Parser(prog="mlff", description="Distilled force fields for LAMMPS, OpenMM and ASE: one file, three engines. Make a file with mlff-export.")
    parser.add_argument("--version", action="version", version=f"mlff {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    command = commands.add_parser("info", help="show what a model file holds")
    command.add_argument("model", type=Path, help="model file")
    command.add_argument("--check", action="store_true", help="also evaluate the file's reference structures and compare")
    command.set_defaults(run=_info)

    command = commands.add_parser("validate", help="compare a model with labelled structures")
    command.add_argument("model", type=Path, help="model file")
    command.add_argument("structures", type=Path, help="structures with energies and forces, any format that ASE reads (extxyz)")
    command.add_argument("--report", type=Path, default=Path("report.html"), help="HTML page to write (default: %(default)s)")
    command.set_defaults(run=_validate)

    command = commands.add_parser("env", help='shell commands that let LAMMPS find the pair style: eval "$(mlff env)"')
    command.set_defaults(run=_env)

    command = commands.add_parser("demo", help="run one file through LAMMPS, OpenMM and ASE and compare")
    command.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for its files (default: %(default)s)")
    command.add_argument("--steps", type=int, default=1000, help="steps of 0.5 fs of the NVE runs (default: %(default)s)")
    command.set_defaults(run=_demo)
    return _run(parser, arguments)


def export_main(arguments: Optional[List[str]] = None) -> int:
    """``mlff-export MODEL -o model.pt``; returns the exit code."""
    parser = _Parser(prog="mlff-export", description="Compile a force field into one file for LAMMPS, OpenMM and ASE.")
    parser.add_argument("--version", action="version", version=f"mlff {__version__}")
    parser.add_argument("model", help=f"a shipped model ({', '.join(pretrained_names()) or 'none'}) or the path of a checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write, for example model.pt")
    parser.add_argument(
        "--structure", type=Path, help="structure (PDB, XYZ ...) whose elements go into the file: openmmtorch.TorchForce(file) needs them"
    )
    parser.add_argument(
        "--portable", action="store_true", help="write plain TorchScript that runs without mlff's operator library, but slower"
    )
    parser.set_defaults(run=_export)
    return _run(parser, arguments)


def _run(parser: argparse.ArgumentParser, arguments: Optional[List[str]]) -> int:
    from ase.io.formats import UnknownFileTypeError

    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (OSError, ValueError, RuntimeError, ImportError, UnknownFileTypeError) as e:
        print(f"{parser.prog}: error: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# ---- the commands ------------------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> int:
    from .export import export

    if options.structure and not options.structure.is_file():
        raise FileNotFoundError(f"{options.structure}: no such structure file")
    path = export(options.model, options.output, structure=options.structure, portable=options.portable)
    print(f"wrote {path} ({_size(path.stat().st_size)})")
    return 0


def _info(options: argparse.Namespace) -> int:
    from rich.console import Console

    from . import payload

    data = payload.find(options.model)
    header, tensors = payload.unpack(data, str(options.model))
    console = Console()
    console.print(_table("Model", _model_rows(options.model, len(data), header, tensors)))
    if header.get("provenance"):
        console.print(_table("Training record", _flat(header["provenance"])))
    console.print(_reference_table(header, tensors))
    if options.check:
        from .core import Model

        energy, force = Model(options.model).self_check()
        console.print(f"self-check passed: energy within {energy:.1e} eV/atom, forces within {force:.1e} eV/Å of the stored values")
    return 0


def _model_rows(path: Path, size: int, header: Dict[str, Any], tensors: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    from ase.data import chemical_symbols

    weights = sum(t.size for name, t in tensors.items() if not name.startswith("reference."))
    yield "file", f"{path}, {_size(path.stat().st_size)}"
    yield "content", f"{_size(size)}, SHA-256 {header['sha256']}"
    yield "architecture", header["architecture"]
    yield "elements", " ".join(chemical_symbols[z] for z in header["atomic_numbers"])
    yield "cutoff", f"{header['cutoff']} Å"
    for key, value in header["config"].items():
        if key not in ("species", "cutoff"):
            yield key, str(value)
    yield "numbers", f"{weights} in {header['precision']}"
    yield "plans", ", ".join(f"{name} ({len(plan['stages'])} stages)" for name, plan in header["plans"].items())
    yield "written by", f"mlff {header['mlff_version']}"
    yield "TorchForce", _baked(path)


def _baked(path: Path) -> str:
    """What the TorchScript around the payload knows of a system."""
    import torch
    from ase.data import chemical_symbols

    from .torchscript import load_operator

    try:
        load_operator()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path))
    except (OSError, RuntimeError) as e:
        return f"cannot be opened as TorchScript: {str(e).splitlines()[0]}"
    if module.atomic_numbers is None:
        return "no elements inside (needs mlff-export --structure, or mlff.openmm.create_force)"
    counts = Counter(chemical_symbols[z] for z in module.atomic_numbers.tolist())
    indices = "" if module.indices is None else f", of which the model handles {len(module.indices)}"
    return f"{sum(counts.values())} atoms ({', '.join(f'{n} {s}' for s, n in sorted(counts.items()))}){indices}"


def _flat(value: Any, name: str = "") -> Iterator[Tuple[str, str]]:
    """Rows of nested JSON: dotted names and values."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        yield name, ", ".join(str(item) for item in value)
    elif value is not None:
        yield name, f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(title: str, rows: Any):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _reference_table(header: Dict[str, Any], tensors: Dict[str, Any]):
    from ase.symbols import Symbols
    from rich import box
    from rich.table import Table

    table = Table(title="Reference structures", title_justify="left", title_style="bold", box=box.SIMPLE)
    for column in ("name", "formula", "periodic", "energy, eV", "largest force, eV/Å"):
        table.add_column(column)
    for reference in header["references"]:
        value = {key: tensors[f"{reference['prefix']}.{key}"] for key in ("atomic_numbers", "pbc", "energy", "forces")}
        formula = Symbols(value["atomic_numbers"]).formula
        periodic = "".join(axis for axis, on in zip("xyz", value["pbc"]) if on) or "no"
        force = float(abs(value["forces"]).max()) if value["forces"].size else 0.0
        table.add_row(reference["name"], f"{formula:hill}", periodic, f"{float(value['energy'][0]):.6f}", f"{force:.4f}")
    return table


def _size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"


def _validate(options: argparse.Namespace) -> int:
    from .validate import validate

    if not options.structures.is_file():
        raise FileNotFoundError(f"{options.structures}: no such file of structures")
    validate(options.model, options.structures, report=options.report)
    return 0


def _env(options: argparse.Namespace) -> int:
    from .lammps import shell_environment

    print(shell_environment())
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo

    return demo(options.output, options.steps)


if __name__ == "__main__":
    sys.exit(main())
