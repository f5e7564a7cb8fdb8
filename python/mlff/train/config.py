"""The configuration of a student: a YAML file, read by `mlff train`.

    data:
      files: [conformers.extxyz]     # relative to this file
      teacher: aimnet2               # leave out where the files are labelled
      split_by: molecule
      validation: 0.1
    model: {features: 64, layers: 2}
    fit: {steps: 4000, patience: 10}

Everything but `files` and `split_by` has a default. An unknown key, a wrong type and a key that is there twice are errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
except ImportError as e:
    raise ImportError(f"training needs packages that are not installed ({e}): pip install 'mlff[train]'") from e

from . import MAX_FORCE


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, and so are values of another type than the one that is written."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Structures, their teacher, and what is kept from training.

    Labels of a teacher are kept beside a file, as NAME.TEACHER.extxyz, and made once (label.py).
    """

    files: list[Path] = Field(min_length=1)
    teacher: Optional[str] = None  # see teachers.py; None: the files are labelled
    teacher_options: dict[str, Any] = {}
    max_force: float = Field(MAX_FORCE, gt=0)  # eV/Angstrom; the teacher's labels above it are left out
    split_by: str  # key of info that names the group of a frame: trajectory, molecule, scaffold ...
    validation: float = Field(0.0, ge=0, lt=1)  # share of the groups that choose the weights and end the training
    held_out: float = Field(0.1, ge=0, lt=1)  # share of the groups that is only ever used for the errors in the record


class ModelConfig(Section):
    """Hyper-parameters as in painn.PaiNNConfig."""

    species: Optional[list[str]] = None  # None: the elements of the data
    features: int = 128
    layers: int = 3
    n_radial: int = 20
    cutoff: float = 5.0
    norm_epsilon: float = 1e-2
    repulsion: bool = True
    radial_basis: str = "bessel"
    cutoff_function: str = "polynomial"


class FitConfig(Section):
    """How a student is fitted (fit.py)."""

    steps: int = Field(20000, ge=1)
    max_edges: int = Field(40000, ge=1)  # per batch
    learning_rate: float = Field(1e-3, gt=0)
    warmup: int = Field(500, ge=0)  # steps
    final_fraction: float = Field(0.01, ge=0, le=1)  # of the learning rate, at the end of the cosine
    weight_decay: float = Field(1e-6, ge=0)
    clip: float = Field(10.0, gt=0)  # norm of the gradient
    ema_decay: float = Field(0.999, ge=0, lt=1)
    energy_weight: float = Field(5.0, ge=0)
    force_weight: float = Field(1.0, ge=0)
    stress_weight: float = Field(1.0, ge=0)
    report_every: int = Field(1000, ge=1)  # steps; the state is saved then, and validation data are looked at
    patience: int = Field(0, ge=0)  # stop after so many reports without progress on the validation data; 0: never
    seed: int = 1  # of the split, the weights and the order of batches
    tf32: bool = False
    compile: bool = False


class CardConfig(Section):
    """What a user of the student must know; goes into its record, which `mlff info` prints."""

    purpose: str  # what it is for
    limits: str  # what it must not be used for
    license: str = "MIT"  # of the weights


class Config(Section):
    """One student. Output goes to NAME.safetensors beside the configuration file NAME.yaml, see run.py."""

    card: Optional[CardConfig] = None
    data: DataConfig
    start: Optional[Path] = None  # checkpoint to go on from, in place of random weights and of `model`
    model: Optional[ModelConfig] = None
    fit: FitConfig = FitConfig()


def read_config(path: Path) -> Config:
    """The configuration in a YAML file, with its paths made relative to the working directory.

    Raises ValueError that names every wrong key with what was expected and what came.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        content = YAML(typ="safe", pure=True).load(path)  # YAML 1.2: 1e-3 is a number, No an element; a key twice is an error
        text = json.dumps(content)
    except (YAMLError, UnicodeDecodeError, TypeError) as e:
        raise ValueError(f"{path} is not a YAML file of settings: {_short(e)}") from e
    try:
        config = Config.model_validate_json(text)
    except ValidationError as e:
        raise ValueError(f"{path}: " + "; ".join(_reason(error) for error in e.errors())) from None
    if config.start and config.model:
        raise ValueError(f"{path}: expected start or model, got both; start brings the model's settings along")
    if config.data.validation + config.data.held_out >= 1:
        raise ValueError(f"{path}: expected data.validation + data.held_out < 1, nothing is left to train on")
    if config.fit.patience and not config.data.validation:
        raise ValueError(f"{path}: fit.patience needs validation data, set data.validation, for example to 0.1")
    data = config.data.model_copy(update={"files": [path.parent / file for file in config.data.files]})
    return config.model_copy(update={"data": data, "start": config.start and path.parent / config.start})


def _reason(error: dict) -> str:
    """One wrong key in words."""
    key = ".".join(map(str, error["loc"])) or "the file"
    if error["type"] == "extra_forbidden":
        section: Any = Config
        for name in error["loc"][:-1]:
            section = {"card": CardConfig, "data": DataConfig, "model": ModelConfig, "fit": FitConfig}[name]
        return f"unknown key {key}, expected one of {', '.join(section.model_fields)}"
    if error["type"] == "missing":
        return f"expected the key {key}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {message}, got {_short(repr(error['input']))}"


def _short(text: object) -> str:
    """Not all of a file that is none of settings."""
    text = str(text)
    return text if len(text) <= 500 else f"{text[:500]} ..."
