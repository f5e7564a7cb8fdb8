"""The CUDA backend with arrays of the caller that are on the GPU, on the stand-in for a GPU (fake_gpu.py)."""

import ctypes

import numpy as np
import pytest
from fake_gpu import assert_close, atoms_of, expected
from fake_plan import packed

from mlff.core import DeviceArrays, MLFFInputError, Model, System


@pytest.fixture
def model(parts, fake):
    return Model(packed(parts))


# ---- arrays on the GPU ------------------------------------------------------------------------------------------------


def device_arrays(positions, forces, energy, box=None, atoms=None, stream=None):
    def pointer(array):
        return None if array is None else array.ctypes.data

    return DeviceArrays(
        stream=stream, is_double=positions.dtype == np.float64, n_rows=len(positions), positions=pointer(positions),
        atoms=pointer(atoms), box=pointer(box), length_unit=10.0, energy_unit=96.0, energy=pointer(energy), forces=pointer(forces),
    )  # fmt: skip


@pytest.fixture
def gpu_array(fake, tmp_path):
    """Memory of the stand-in's device, as NumPy arrays. Its driver must be in use by a system."""
    library, context = ctypes.CDLL(str(tmp_path / "fake_cuda.so")), ctypes.c_void_p()
    library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)

    def make(values, dtype):
        values, pointer = np.asarray(values, dtype=dtype), ctypes.c_uint64()
        library.cuCtxPushCurrent_v2(context)
        assert library.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(values.nbytes)) == 0
        library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        array = np.ctypeslib.as_array((ctypes.c_byte * values.nbytes).from_address(pointer.value)).view(dtype).reshape(values.shape)
        array[...] = values
        return array

    make.library, make.context = library, context
    return make


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n, length, box", [(20, 8.0, False), (20, 6.0, True), (150, 9.0, True)], ids=["open", "dense", "list"])
def test_device_arrays(model, gpu_array, fake, dtype, n, length, box):
    numbers, positions = atoms_of(n, length)
    rows = np.random.default_rng(0).permutation(n + 7)[:n]  # of the caller's arrays
    spread = np.zeros((n + 7, 3))
    spread[rows] = positions / 10
    x, f, e = gpu_array(spread, dtype), gpu_array(np.full((n + 7, 3), 7), dtype), gpu_array([0], np.float64)
    cell = gpu_array(np.eye(3) * length / 10, dtype) if box else None
    system = System(model, device="cuda")
    system.set_atoms(numbers)
    arrays = device_arrays(x, f, e, cell, rows)
    for scale in (1.0, 0.55 if box else 1.0):  # the second needs more images, which only the device notices
        x[rows] = positions / 10 * scale
        if box:
            cell[...] = np.eye(3) * length / 10 * scale
        system.compute_device(arrays)
        wanted = expected(numbers, 10 * x[rows].astype(float), np.eye(3) * length * scale if box else None, box)
        tolerance = 1e-5 * 96 * np.abs(wanted["forces"]).max() * 10
        np.testing.assert_allclose(e[0], 96 * wanted["energy"], rtol=1e-5)
        np.testing.assert_allclose(f[rows], 960 * wanted["forces"], atol=tolerance)
        assert np.all(np.delete(f, rows, axis=0) == 7)
    uploads = fake("uploads")
    system.compute_device(arrays)
    assert fake("uploads") == uploads > 0
    arrays.forces, e[0] = None, 0.0  # the energy alone
    system.compute_device(arrays)
    np.testing.assert_allclose(e[0], 96 * wanted["energy"], rtol=1e-5)
    arrays.box = None
    system.compute_device(arrays)
    np.testing.assert_allclose(e[0], 96 * expected(numbers, 10 * x[rows].astype(float))["energy"], rtol=1e-5)
    f[...], e[0] = 7, 7.0
    assert_close(system.compute(positions), expected(numbers, positions))
    assert np.all(f == 7) and e[0] == 7  # are not in an evaluation of the host's arrays


def test_graphs_of_pointers_that_come_back(model, gpu_array, fake):
    """A caller that makes new arrays at every step, and one that has two sets of them in turn."""
    numbers, positions = atoms_of(30, 12.0)
    x, e, *forces = (gpu_array(v, np.float64) for v in (positions / 10, [0], *np.full((5, 30, 3), 7.0)))
    system = System(model, device="cuda")
    system.set_atoms(numbers)
    system.compute_device(device_arrays(x, forces[0], e))
    wanted = 960 * expected(numbers, positions)["forces"]
    steps = [(1, 0, 0), (1, 1, 1), (2, 0, 0), (3, 0, 0), (1, 0, 1), (3, 1, 1), (1, 0, 1), (3, 0, 1)]
    for which, captured, replayed in steps:
        captures, launches = fake("captures"), fake("graph_launches")
        system.compute_device(device_arrays(x, forces[which], e))
        assert (fake("captures") - captures, fake("graph_launches") - launches) == (captured, replayed)
        np.testing.assert_allclose(forces[which], wanted, atol=1e-3)
        forces[which][...] = 7
    assert np.all(forces[4] == 7)


def test_capture_by_the_caller(model, gpu_array, fake):
    """Captured once, replayed at other positions, also after the system has grown; NaN where it does not fit."""
    library, context, stream = gpu_array.library, gpu_array.context, ctypes.c_void_p()
    numbers, positions = atoms_of(30, 12.0)
    x, f, e = (gpu_array(v, np.float64) for v in (positions / 10, np.zeros((30, 3)), [0]))
    system = System(model, device="cuda")
    system.set_atoms(numbers)
    library.cuCtxPushCurrent_v2(context)
    try:
        assert library.cuStreamCreate(ctypes.byref(stream), 1) == 0
        arrays = device_arrays(x, f, e, stream=stream.value)
        graph = ctypes.c_void_p()

        def capture():
            library.cuStreamBeginCapture_v2(stream, 1)
            try:
                system.compute_device(arrays)
            finally:
                library.cuStreamEndCapture(stream, ctypes.byref(graph))

        with pytest.raises(MLFFInputError, match="evaluate once before capturing"):
            capture()
        system.compute_device(arrays)
        arrays.forces = None
        with pytest.raises(MLFFInputError, match="evaluate once before capturing"):
            capture()  # the kernels of the energy alone have not been loaded
        arrays.forces, overlapping = f.ctypes.data, fake("overlapping")
        capture()
        assert (fake("overlapping"), fake("graph_launches")) == (overlapping + 4, 0)  # of five kernels; no graph but the caller's

        def replay(scale):
            x[...] = positions / 10 * scale
            assert library.cuGraphLaunch(graph, None) == 0

        for scale in (1.0, 0.9, 1.1):
            replay(scale)
            wanted = expected(numbers, positions * scale)
            np.testing.assert_allclose(e[0], 96 * wanted["energy"], rtol=1e-6)
            np.testing.assert_allclose(f, 960 * wanted["forces"], atol=1e-2)
        x[1] = x[0]
        assert library.cuGraphLaunch(graph, None) == 0
        assert np.isnan(e[0]) and np.isnan(f).all()
        before = fake("used")
        more_numbers, more = atoms_of(200, 12.0)
        system.compute(positions / 2, np.eye(3) * 7, True)  # boxes are the captured graph's
        replay(1.0)
        np.testing.assert_allclose(e[0], 96 * expected(numbers, positions)["energy"], rtol=1e-6)
        system.set_atoms(more_numbers)
        assert_close(system.compute(more), expected(more_numbers, more))
        assert fake("used") > before
        replay(1.0)
        np.testing.assert_allclose(e[0], 96 * expected(numbers, positions)["energy"], rtol=1e-6)
    finally:
        library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def test_numbers_too_large_for_the_kernels_of_few_atoms(model, gpu_array, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_TOO_LARGE", "1")
    numbers, positions = atoms_of(20, 8.0)
    system = System(model, device="cuda")
    system.set_atoms(numbers)
    x, f, e = (gpu_array(a, np.float64) for a in (positions / 10, 0 * positions, [0]))
    wanted = expected(numbers, positions)
    for _ in range(2):
        system.compute_device(device_arrays(x, f, e))
        np.testing.assert_allclose(e[0], 96 * wanted["energy"], rtol=1e-5)
        np.testing.assert_allclose(f, 960 * wanted["forces"], rtol=0, atol=1e-3 * np.abs(wanted["forces"]).max())
        f[...], e[0] = 7, 7.0


def test_device_arrays_without_atoms(model, gpu_array):
    """A model for no atom of the caller's: nothing to compute, and the caller's forces stay."""
    system = System(model, device="cuda")
    system.set_atoms([])
    x, f, e = gpu_array(np.ones((3, 3)), np.float32), gpu_array(np.full((3, 3), 7), np.float32), gpu_array([5], np.float64)
    system.compute_device(device_arrays(x, f, e))
    assert e[0] == 0 and (f == 7).all()


def test_device_arrays_refused(model, gpu_array):
    numbers, positions = atoms_of(4, 6.0)
    system = System(model, device="cuda")
    system.set_atoms(numbers)
    x, f, e = gpu_array(positions, np.float32), gpu_array(positions, np.float32), gpu_array([0], np.float64)
    good = device_arrays(x, f, e)
    for field, value, match in (
        ("n_rows", 3, "arrays of 3 rows do not fit"), ("positions", None, "the positions of 4 atoms are needed"),
        ("positions", x.ctypes.data + 2, "aligned to the size of their numbers"),
        ("length_unit", 0.0, "length_unit and energy_unit must be positive"),
        ("forces", np.zeros(64).ctypes.data // 16 * 16, "forces must be in the memory of cuda:0"),
        ("atoms", np.array([0, 1, 2, 2]), "row 2 is listed twice"), ("atoms", np.array([0, 1, 2, 4]), r"atoms\[3\] is 4"),
        ("box", gpu_array(np.ones((3, 3)), np.float32), "cell is singular"),
    ):  # fmt: skip
        arrays = DeviceArrays.from_buffer_copy(good)
        setattr(arrays, field, value.ctypes.data if isinstance(value, np.ndarray) else value)
        with pytest.raises(MLFFInputError, match=match):
            system.compute_device(arrays)
    x[2] = np.nan
    with pytest.raises(MLFFInputError, match="the position of atom 2 is not finite"):
        system.compute_device(good)
    with pytest.raises(MLFFInputError, match="compute_device needs a system on a GPU"):
        System(model).compute_device(good)
