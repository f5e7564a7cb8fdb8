"""The commands ``mlff`` and ``mlff-export``.

Exit codes: 0 done, 1 it failed (one line on the error stream says why) or a check did not pass, 2 wrong usage.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from . import __version__, pretrained_names
from .train import MAX_FORCE

SUITES = ("organics", "water", "crystal")  # of mlff.validate, which takes long to import


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

    command = commands.add_parser("validate", help="compare a model with labelled structures, and with its teacher")
    command.add_argument("model", type=Path, help="model file")
    command.add_argument(
        "structures", type=Path, nargs="?", help="structures with energies and forces, as ASE reads (default: the suite's)"
    )
    command.add_argument("--suite", choices=SUITES, help="also the physics of molecules, of liquid water, of a cubic crystal")
    command.add_argument("--teacher", help="compare with this teacher, which is measured first (names as in mlff label)")
    command.add_argument("--options", type=_options, default={}, help="keyword arguments of the teacher, as JSON")
    command.add_argument(
        "--reference", type=Path, help="file of mlff reference; with --teacher it is written (default: beside the report)"
    )
    command.add_argument("--device", default="cpu", help='"cpu", "cuda" or "cuda:N", of model and teacher (default: cpu)')
    _suite_settings(command)
    command.add_argument("--report", type=Path, help="HTML page to write, with its numbers as JSON beside it")
    command.set_defaults(run=_validate)

    command = commands.add_parser("reference", help="measure a suite of mlff validate with a teacher; resumable")
    command.add_argument("teacher", help="names as in mlff label")
    command.add_argument("--options", type=_options, default={}, help="keyword arguments of the teacher, as JSON")
    command.add_argument("--suite", choices=SUITES, required=True, help="what to measure")
    command.add_argument(
        "--reweight", type=Path, metavar="MODEL", help="water: the teacher's averages out of dynamics of this model, by reweighting"
    )
    command.add_argument("--elements", help="chemical symbols to look at, as in Mg,O (default: all that the teacher knows)")
    command.add_argument("--device", help='"cpu", "cuda" or "cuda:N" (default: the first GPU if there is one)')
    _suite_settings(command)
    command.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write, and to go on from")
    command.set_defaults(run=_reference)

    command = commands.add_parser("bench", help="time a model on this machine, by number of atoms")
    command.add_argument("model", type=Path, help="model file")
    command.add_argument("--output", type=Path, default=Path("bench-output"), help="folder for its files (default: %(default)s)")
    command.add_argument("--device", help='"cpu", "cuda" or "cuda:N" (default: the first GPU if there is one)')
    command.add_argument("--sizes", type=_numbers, metavar="LIST", help="numbers of atoms, as in 21,648 (default: 10 to many)")
    command.add_argument("--large", action="store_true", help="also a million atoms")
    command.add_argument("--peers", metavar="CHECKPOINT", help="also time PyTorch with this checkpoint, of which the file was made")
    command.add_argument("--seconds", type=_positive, default=1.0, help="for each measurement (default: %(default)s)")
    command.set_defaults(run=_bench)

    command = commands.add_parser("label", help="label structures with the energies, forces and stresses of a teacher")
    command.add_argument("structures", type=Path, help="structures, any format that ASE reads")
    command.add_argument("-o", "--output", type=Path, required=True, help="extxyz to write, with a record as JSON beside it")
    command.add_argument(
        "--teacher", required=True, help="aimnet2, chgnet, gfn2-xtb, sevennet, so3lr, or an ASE calculator as package.module:Class"
    )
    command.add_argument("--options", type=_options, default={}, help="keyword arguments of the teacher, as JSON")
    command.add_argument("--device", help='"cpu", "cuda" or "cuda:N" (default: the first GPU if there is one)')
    command.add_argument(
        "--max-force", type=_positive, default=MAX_FORCE, help="leave out frames pushed harder than this, eV/Å (default: %(default)s)"
    )
    command.add_argument("--index", default=":", help="frames to label as a Python slice, to share the work: 0::2 and 1::2")
    command.set_defaults(run=_label)

    command = commands.add_parser("train", help="distil a student, as a YAML file says")
    command.add_argument("config", type=Path, help="configuration; the student and its record are written beside it")
    command.add_argument("--device", help='"cpu", "cuda" or "cuda:N" (default: the first GPU if there is one)')
    command.set_defaults(run=_train)

    command = commands.add_parser("import", help="make a checkpoint for mlff-export out of a model of another program")
    command.add_argument("program", choices=("schnetpack",), help="SchNetPack 2, which must be installed: pip install schnetpack")
    command.add_argument("model", type=Path, help="its file best_model; it is a pickle, which may run any code: import only what you trust")
    command.add_argument("-o", "--output", type=Path, required=True, help="checkpoint to write (.safetensors), with a record as JSON beside it")
    command.add_argument("--elements", help="chemical symbols that it knows, as in H,C,O (default: those with an atomic reference in the model)")
    command.add_argument("--energy-unit", default="eV", help="of the model: eV, Hartree, kcal/mol or kJ/mol (default: %(default)s)")
    command.add_argument("--length-unit", default="Ang", help="of the model: Ang, Bohr or nm (default: %(default)s)")
    command.set_defaults(run=_import)

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
    parser.add_argument(
        "--arch", type=_architectures, metavar="LIST",
        help="GPUs that the file is for: compute capabilities, as in 80,90, or none (default: all, which takes about a minute)",
    )  # fmt: skip
    parser.set_defaults(run=_export)
    return _run(parser, arguments)


def _run(parser: argparse.ArgumentParser, arguments: Optional[List[str]]) -> int:
    from ase.io.formats import UnknownFileTypeError

    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (OSError, ValueError, RuntimeError, ImportError, ArithmeticError, UnknownFileTypeError) as e:
        print(f"{parser.prog}: error: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _suite_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quick", action="store_true", help="smallest sizes, seconds: shows that all runs, not how good it is")
    command.add_argument("--seed", type=int, default=0, help="of velocities, thermostats and displacements (default: %(default)s)")
    command.add_argument("--ps", type=_positive, help="length of each run of dynamics (default: organics 2, water 20, crystal 5)")
    command.add_argument("--cell", type=Path, help="unit cell of a cubic crystal (default: that of the elements)")


def _settings(options: argparse.Namespace) -> Any:
    from .validate import Settings

    if options.cell and not options.cell.is_file():
        raise FileNotFoundError(f"{options.cell}: no such file of a cell")
    return Settings(options.quick, options.seed, options.ps, str(options.cell) if options.cell else None)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero")
    return number


def _architectures(text: str) -> Tuple[int, ...]:
    """"80,90", or "none"; compute capabilities may have a point, as in 9.0."""
    from .compile import check_architectures

    if text == "none":
        return ()
    try:
        numbers = tuple(int(word.replace(".", "")) for word in text.split(","))
        check_architectures(numbers)
    except ValueError as e:
        wrong = f"{text!r} is neither a list of compute capabilities, as in 80,90, nor none"
        raise argparse.ArgumentTypeError(str(e) if "architecture" in str(e) else wrong) from None
    return numbers


def _numbers(text: str) -> List[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers above zero, as in 21,648")
    return numbers


def _options(text: str) -> Dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"""{text!r} is no JSON object, as in {{"long_range_cutoff": 12.0}}""")
    return options


# ---- the commands ------------------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from . import compile
    from .export import export

    if options.structure and not options.structure.is_file():
        raise FileNotFoundError(f"{options.structure}: no such structure file")
    if options.arch is None and not compile.available():
        print(f"Triton is not installed, so the file will serve CPUs only; for GPUs: {compile.HOW_TO_GET_TRITON}")
    start = time.perf_counter()
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("compiling for GPUs", total=None)
        path = export(
            options.model, options.output, structure=options.structure, portable=options.portable, architectures=options.arch,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    print(f"wrote {path} ({_size(path.stat().st_size)}, {time.perf_counter() - start:.1f} s)")
    return 0


def _info(options: argparse.Namespace) -> int:
    from rich.console import Console

    from . import payload

    data = payload.find(options.model)
    header, tensors = payload.unpack(data, str(options.model))
    console = Console()
    console.print(_table("Model", _model_rows(options.model, len(data), header, tensors)))
    for table in _record(header["provenance"]):
        console.print(table)
    columns = ("name", "formula", "periodic", "energy, eV", "largest force, eV/Å")
    console.print(_table("Reference structures", _reference_rows(header, tensors), columns))
    if options.check:
        from .core import Model

        energy, force = Model(options.model).self_check()
        console.print(f"self-check passed: energy within {energy:.1e} eV/atom, forces within {force:.1e} eV/Å of the stored values")
    return 0


def _model_rows(path: Path, size: int, header: Dict[str, Any], tensors: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    from ase.data import chemical_symbols

    weights = sum(t.size for name, t in tensors.items() if not name.startswith(("reference.", "gpu.", "cuda.")))
    yield "file", f"{path}, {_size(path.stat().st_size)}"
    yield "content", f"{_size(size)}, SHA-256 {header['sha256']}"
    yield "architecture", header["architecture"]
    yield "elements", " ".join(chemical_symbols[z] for z in header["atomic_numbers"])
    yield "cutoff", f"{header['cutoff']} Å"
    for key, value in header["config"].items():
        if key not in ("species", "cutoff"):
            yield key, str(value)
    yield "numbers", f"{weights} in {header['precision']}"
    yield "plans", ", ".join(header["plans"])
    yield "machine code", _machine_code(header["plans"], tensors)
    yield "extrapolation grade", _grade(header)
    yield "written by", f"mlff {header['mlff_version']}"
    yield "TorchForce", _baked(path, header["atomic_numbers"])


def _grade(header: Dict[str, Any]) -> str:
    known = header.get("extrapolation")
    if known is None:
        return "none"
    import numpy as np

    expected = ", ".join(f"{np.interp(x, known['grade'], known['force_error_eV_A']):.2f} at {x}" for x in (0.2, 0.5, 1.0))
    return f"yes; above 1 the model extrapolates; expected error of a force, eV/Å: {expected}"


def _machine_code(plans: Dict[str, Any], tensors: Dict[str, Any]) -> str:
    sizes: Dict[str, int] = {}
    for name, tensor in tensors.items():
        if name.startswith("cuda."):
            architecture = name.split(".")[1]
            sizes[architecture] = sizes.get(architecture, 0) + tensor.nbytes
    if not sizes:
        return "none: for CPUs only"
    return f"{len(plans['cuda']['kernels'])} kernels: " + ", ".join(f"{key} {_size(size)}" for key, size in sorted(sizes.items()))


def _baked(path: Path, known: Sequence[int]) -> str:
    """What the TorchScript around the payload knows of a system."""
    import torch
    from ase.symbols import Symbols

    from .torchscript import load_operator

    try:
        load_operator()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path))
    except (OSError, RuntimeError) as e:
        return f"cannot be opened as TorchScript: {str(e).splitlines()[0]}"
    if hasattr(module, "n_atoms"):  # portable.PortableModel
        kind, n_atoms, numbers = "portable, ", module.n_atoms, [known[k] for k in module.species.tolist()]
    elif module.atomic_numbers is None:
        kind, n_atoms, numbers = "", -1, []
    else:
        kind, n_atoms, numbers = "", len(module.atomic_numbers), module.atomic_numbers.tolist()
        numbers = numbers if module.indices is None else [numbers[k] for k in module.indices.tolist()]
    if n_atoms < 0:
        return f"{kind}no elements inside (needs mlff-export --structure, or mlff.openmm.create_force)"
    return f"{kind}{n_atoms} atoms, of which the model handles {Symbols(numbers).formula:hill}"


def _record(record: Dict[str, Any]) -> Iterator[Any]:
    """Tables of a training record: its plain entries, then each group; a group of groups (errors by kind) has a column for each name."""
    plain = {key: value for key, value in record.items() if not isinstance(value, dict)}
    groups = {"Training record": plain, **{f"Training record: {k}": v for k, v in record.items() if isinstance(v, dict)}}
    for title, group in groups.items():
        if group and all(isinstance(value, dict) for value in group.values()):
            names = list(dict.fromkeys(name for value in group.values() for name in value))
            rows = [(key, *(_line(value.get(name, ""), digits=3) for name in names)) for key, value in group.items()]
            yield _table(_plain(title), rows, ["", *map(_plain, names)])
        elif group:
            yield _table(_plain(title), [(_plain(key), _line(value)) for key, value in group.items() if value is not None])


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _line(value: Any, digits: int = 6) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_plain(key)} {_line(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_line(item) for item in value[:8]) + (f" ... {len(value)} in all" if len(value) > 8 else "")
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _table(title: str, rows: Any, columns: Sequence[str] = ("", "")) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=any(columns))
    table.add_column(columns[0], style="cyan", no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(value) for value in row))
    return table


def _reference_rows(header: Dict[str, Any], tensors: Dict[str, Any]) -> Iterator[Tuple[str, ...]]:
    from ase.symbols import Symbols

    for reference in header["references"]:
        numbers, pbc, energy, forces = (tensors[f"{reference['prefix']}.{key}"] for key in ("atomic_numbers", "pbc", "energy", "forces"))
        periodic = "".join(axis for axis, on in zip("xyz", pbc) if on) or "no"
        force = float(abs(forces).max()) if forces.size else 0.0
        yield reference["name"], f"{Symbols(numbers).formula:hill}", periodic, f"{float(energy[0]):.6f}", f"{force:.4f}"


def _size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"


def _validate(options: argparse.Namespace) -> int:
    from .train.teachers import load_teacher
    from .validate import validate

    if options.structures and not options.structures.is_file():
        raise FileNotFoundError(f"{options.structures}: no such file of structures")
    settings = _settings(options)
    teacher = load_teacher(options.teacher, options.device, **options.options) if options.teacher else None
    report = validate(
        options.model, options.structures, options.report, options.suite, teacher, options.reference, settings, options.device
    )
    return 0 if report.passed else 1


def _reference(options: argparse.Namespace) -> int:
    from .train.teachers import load_teacher
    from .validate import reference

    device = options.device or _first_device()
    teacher = load_teacher(options.teacher, device, **options.options)
    elements = options.elements.split(",") if options.elements else None
    data = reference(teacher, options.suite, options.output, _settings(options), elements, options.reweight, device)
    failed = {name: part["error"] for name, part in data["parts"].items() if "error" in part}
    print(f"wrote {options.output}" + "".join(f"; {name} failed: {why}" for name, why in failed.items()))
    return 1 if failed else 0


def _bench(options: argparse.Namespace) -> int:
    from .bench import bench

    bench(
        options.model, options.output, device=options.device, sizes=options.sizes, large=options.large, peers=options.peers,
        seconds=options.seconds,
    )  # fmt: skip
    return 0


def _label(options: argparse.Namespace) -> int:
    from .train.label import label_file, summary
    from .train.teachers import load_teacher

    teacher = load_teacher(options.teacher, options.device or _first_device(), **options.options)
    record = label_file(options.structures, options.output, teacher, options.max_force, options.index)
    print(f"wrote {options.output}: {summary(record)}")
    return 0


def _train(options: argparse.Namespace) -> int:
    from rich.console import Console

    from .train.run import train

    record = train(options.config, options.device or _first_device())
    for table in _record({"held_out_errors": record["held_out_errors"]}):
        Console().print(table)
    print(f"wrote {options.config.with_suffix('.safetensors')}, its record (.json) and its curves (.png)")
    return 0


def _import(options: argparse.Namespace) -> int:
    from .schnetpack import import_schnetpack

    elements = options.elements.split(",") if options.elements else None
    record = import_schnetpack(options.model, options.output, elements, options.energy_unit, options.length_unit)
    energy, force = (record["imported"][f"largest_difference_of_{what}"] for what in ("energies", "forces"))
    print(
        f"wrote {options.output} for {' '.join(record['model']['species'])}, and its record (.json); largest differences from SchNetPack in"
        f" float64, relative to the largest force: energies {energy:.1e}, forces {force:.1e}"
    )
    return 0


def _first_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _env(options: argparse.Namespace) -> int:
    from .lammps import environment

    variables = environment()
    programs = Path(sys.executable).parent  # lmp and mpiexec, where the environment is not activated
    if (programs / "lmp").exists() and shutil.which("lmp") != str(programs / "lmp"):
        variables["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo

    return demo(options.output, options.steps)


if __name__ == "__main__":
    sys.exit(main())
