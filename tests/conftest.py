"""Fixtures for all tests. Structures come from structures.py, models and their float64 results from reference.py."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Callable

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: without a GPU Triton's kernels are interpreted

from fake_plan import model_parts
from reference import random_model

from mlff import core
from mlff.painn import PaiNN

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", params=[(16, 1), (16, 2), (32, 3)], ids=lambda p: f"features{p[0]}-layers{p[1]}")
def model(request) -> PaiNN:
    """Random float32 models with one, two and three layers; a test that takes this fixture runs for each."""
    return random_model(*request.param)


@pytest.fixture(scope="session")
def save_payload(tmp_path_factory) -> Callable[[PaiNN], Path]:
    """Writes a model to a bare payload file, once per model, and returns the path."""
    from mlff.export import build_payload

    folder, paths = tmp_path_factory.mktemp("payloads"), {}

    def save(model: PaiNN) -> Path:
        if id(model) not in paths:
            path = folder / f"model{len(paths)}.mlff"
            path.write_bytes(build_payload(model, {"teacher": "random weights, for tests"}))
            paths[id(model)] = (path, model)  # holding the model keeps its id taken
        return paths[id(model)][0]

    return save


@pytest.fixture(scope="session")
def model_file(model, save_payload) -> Path:
    """The file of the model of the fixture ``model``."""
    return save_payload(model)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """25 frames of 13 trajectories with the labels of a Lennard-Jones calculator; sampled.extxyz beside holds them without."""
    from ase.io import write
    from labels import lennard_jones, sampled

    from mlff.train.label import label_file

    folder = tmp_path_factory.mktemp("labels")
    write(folder / "sampled.extxyz", sampled(), format="extxyz")
    record = label_file(folder / "sampled.extxyz", folder / "labelled.extxyz", lennard_jones(), max_force=1e9)
    assert record["labelled"] == 25 and record["left_out"] == 0
    return folder / "labelled.extxyz"


@pytest.fixture(scope="session")
def parts():
    """Of a model for the stand-in for a GPU, for fake_plan.packed."""
    return model_parts()


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("fake") / "fake_cuda.so"
    source = Path(__file__).parent / "cpp" / "fake_cuda.cpp"
    subprocess.run([compiler, "-std=c++20", "-O1", "-shared", "-fPIC", source, "-o", path], check=True)
    return path


@pytest.fixture
def fresh_core(tmp_path, monkeypatch):
    """A copy of the core that has not opened a driver yet, and that finds none."""
    shutil.copy(core.library_path("libmlff.so"), tmp_path)
    monkeypatch.setenv("MLFF_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("MLFF_CUDA_DRIVER", str(tmp_path / "none.so"))


@pytest.fixture
def fake(fresh_core, fake_library, monkeypatch, tmp_path):
    """The stand-in, and a function that reads its counters. A copy for each test, so that they begin at zero."""
    path = tmp_path / "fake_cuda.so"
    shutil.copy(fake_library, path)
    monkeypatch.setenv("MLFF_CUDA_DRIVER", str(path))
    library = ctypes.CDLL(str(path))
    library.fake_counter.restype = ctypes.c_long
    yield lambda name: library.fake_counter(name.encode())
    assert library.fake_counter(b"contexts") == 0, "a context was left current"
