"""The GPU kernels as the plan runs them: every stage against the plain PyTorch functions in float64, then whole models.

Under Triton's interpreter on a machine without a GPU, compiled on one with.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from plan_runner import PlanRunner
from reference import SCHNETPACK, random_model, reference
from structures import structure

pytest.importorskip("triton", reason="Triton is not installed")

from mlff import plan  # noqa: E402
from mlff.export import cuda_tensors, plan_tensors  # noqa: E402
from mlff.filter import radial_basis  # noqa: E402
from mlff.message import (  # noqa: E402
    message, message_backward, message_first, message_first_weights, source_features, source_features_backward,
)
from mlff.plan import SMALL_ROWS, cuda_plan  # noqa: E402
from mlff.readout import readout, readout_backward  # noqa: E402
from mlff.repulsion import repulsion, switched  # noqa: E402
from mlff.update import update, update_backward  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RELATIVE = 3e-6  # of the largest number of an array: float32 with a few hundred terms


def runner(model, atoms, search="dense", schedule=0, starts=None, n_local=None, **capacities):
    m64 = copy.deepcopy(model).double()
    r = PlanRunner(cuda_plan(model.config), {**plan_tensors(m64), **cuda_tensors(m64)}, model.config.cutoff, DEVICE, search, schedule)
    known = model.config.atomic_numbers
    species = [known.index(z) if z in known else -1 for z in atoms.numbers]
    r.set_atoms(species, n_local=n_local, starts=starts, **{"edge_capacity": 64, "candidate_capacity": 512, **capacities})
    return r


def close(found, expected, name):
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE * max(1e-3, np.abs(expected).max(initial=0)), err_msg=name)


@pytest.mark.parametrize("name, schedule, settings", [
    ("ethanol", 0, {}),
    ("small_cell", 1, {}),
    ("pressed", 0, {"n_radial": 8}),
    ("ethanol", 1, SCHNETPACK),
    ("small_cell", 0, {**SCHNETPACK, "radial_basis": "bessel", "n_radial": 20}),
    ("ethanol", 0, {"radial_basis": "gaussian", "n_radial": 40}),
], ids=["ethanol", "small_cell", "pressed", "gaussian-cosine", "bessel-cosine", "gaussian-polynomial"])  # fmt: skip
def test_every_stage(name, schedule, settings, monkeypatch):
    small = dataclasses.replace(plan.SMALL, units=16)  # so that 32 hidden units are those of several programs
    monkeypatch.setattr(plan, "SMALL", small)
    model, atoms = random_model(32, 3 if not settings else 2, **settings), structure(name)
    config, n, f = model.config, len(structure(name)), 32
    r = runner(model, atoms, schedule=schedule)
    r.compute(atoms.positions, atoms.cell.array, atoms.pbc)  # once before, so that nothing depends on buffers being zero
    a = r.arrays
    buffer = lambda key: a[key].cpu().double()[:n]  # noqa: E731
    gradient = lambda values: values / plan.GRADIENT_SCALE  # noqa: E731
    m = copy.deepcopy(model).double()
    r.run(r.dict["search"]["dense"])

    count, cap = a["edge_count"].cpu()[:n].long(), r.scalars["edge_capacity"]
    i = torch.repeat_interleave(torch.arange(n), count)
    e = i * cap + torch.cat([torch.arange(c) for c in count])
    j = a["neighbors"].cpu()[e].long()
    edges = torch.stack([i, j])
    unit, d = a["geometry"].cpu().double()[e, :3], a["distance"].cpu()[e]
    species = m.species_index(torch.from_numpy(atoms.numbers))
    basis, slope = radial_basis(d, config.cutoff, config.cutoff_function, config.n_radial, m.gaussians)
    if config.repulsion:
        basis, slope = switched(basis, slope, d, m.short_range(species, edges)[:, 2])
    reverse = a["slot"].cpu()[j * r.scalars["candidate_capacity"] + a["reverse"].cpu()[e].long()].long() + j * cap
    at = {int(x): k for k, x in enumerate(e)}
    reverse = torch.tensor([at[int(x)] for x in reverse])

    def halves(key):
        both = a[key].cpu().double()[e]
        block = both.shape[1] // 2
        return (both[:, :block] + both[:, block:])[:, : config.n_radial + 1]

    close(halves("basis"), basis, "pairs_radial")
    close(halves("slope"), slope, "pairs_radial")
    energy, derivative = torch.zeros_like(d), torch.zeros_like(d)
    if config.repulsion:
        energy, derivative = repulsion(d, m.short_range(species, edges))
    close(buffer("repulsion_energy"), torch.zeros(n, dtype=torch.float64).index_add(0, i, energy), "pairs_radial")
    close(a["repulsion_slope"].cpu()[e], derivative, "pairs_radial")

    def check_hidden(h, slope, kernel):
        sigmoid = torch.sigmoid(h)
        if "merged" not in kernel:
            close(buffer("hidden"), h * sigmoid, kernel)
        close(buffer(slope), sigmoid * (1 + h * (1 - sigmoid)), kernel)

    def terms(key, number, units):
        return a[key].cpu().double().flatten()[: n * number * units].reshape(n, number, units)

    def parts(key, blocks):  # what merged kernels leave to be added up, in rows that may be shorter than the buffer's
        number = plan.hidden_parts(small, f)
        return a[key].cpu().double().flatten()[: n * number * blocks * f].reshape(n, number, blocks * f)

    first = m.layers[0]
    q_s, q_v = message_first_weights(source_features(m.embedding, **first.source), first.filter)
    states, x, layer, seen, in_layer = [], {}, 0, set(), None
    g_s = g_v = None
    pair = torch.zeros(len(e), 4, dtype=torch.float64)
    for stage in r.dict["schedules"][schedule]["stages"]:
        if stage["pass"] == "energy" or stage["kernel"] == "exchange":
            continue
        r.run([stage])
        kernel = stage["kernel"].split(".")[0]
        seen.add(kernel)
        if kernel in ("message_first", "message_first_merged", "message"):
            if kernel != "message":
                in_layer = message_first(m.embedding, q_s, q_v, species, edges, unit, basis)
            else:
                in_layer = message(x[layer], v, s, edges, unit, basis, m.layers[layer].filter)
            close(buffer("s_mid"), in_layer[0], kernel)
            close(buffer("v_mid"), in_layer[1].reshape(n, -1), kernel)
            states.append(in_layer)
        if kernel in ("message_first", "message_first_merged", "update_mix", "update_mix_merged"):
            p, q = torch.chunk(in_layer[1] @ m.layers[layer].update["vu"], 2, dim=-1)
            close(buffer(f"pq{layer}"), torch.cat([p, q], 2).reshape(n, -1), kernel)
            if "merged" in kernel:
                norm = torch.sqrt((p**2).sum(1) + m.config.norm_epsilon)
                w1 = m.layers[layer].update["w1"]
                close(terms("update_terms", 2, f).sum(1), in_layer[0] @ w1[:f] + norm @ w1[f:], kernel)
        if kernel in ("update_hidden", "update_merged"):
            weight = m.layers[layer].update
            norm = torch.sqrt((torch.chunk(in_layer[1] @ weight["vu"], 2, dim=-1)[0] ** 2).sum(1) + m.config.norm_epsilon)
            check_hidden(torch.cat([in_layer[0], norm], 1) @ weight["w1"] + weight["b1"], f"slope{layer}", kernel)
        if kernel in ("source_hidden", "source_merged"):
            weight = m.layers[layer].source
            check_hidden(s @ weight["w1"] + weight["b1"], f"source_slope{layer}", kernel)
        if kernel in ("update", "update_merged"):
            s, v = update(*in_layer, **m.layers[layer].update, epsilon=m.config.norm_epsilon)
            close(buffer(f"s{layer % 2}"), s, kernel)
            layer += 1
            if layer < config.layers:
                close(buffer(f"v{layer}"), v.reshape(n, -1), kernel)
            if kernel == "update_merged":
                w1 = m.layers[layer].source["w1"] if layer < config.layers else m.readout["w1"]
                close(terms("next_terms", 1, w1.shape[1]).sum(1), s @ w1, kernel)
        if kernel in ("source_features", "source_merged"):
            x[layer] = source_features(s, **m.layers[layer].source)
            sent = torch.cat([x[layer][:, : 2 * f], (x[layer][:, None, 2 * f:] * v).reshape(n, -1)], 1)
            close(buffer(f"x{layer}"), sent, kernel)
            states.append((s, v))
        if kernel in ("readout", "readout_merged_backward"):
            ro = m.readout
            close(buffer("row_energy"), readout(s, **ro) + m.shift[species] + buffer("repulsion_energy"), kernel)
            g_s, g_v = readout_backward(s, ro["w1"], ro["b1"], ro["w2"]), torch.zeros_like(v)
            close(gradient(buffer("g0"))[:, :f], g_s, kernel)
            layer -= 1
        if kernel == "update_backward":
            g_s, g_v = update_backward(g_s, g_v, *states.pop(), **m.layers[layer].update, epsilon=m.config.norm_epsilon)
            close(gradient(buffer("g1"))[:, :f], g_s, kernel)
        elif kernel in ("update_merged_backward", "readout_merged_backward"):
            past = g_s
            g_s, g_v = update_backward(g_s, g_v, *states.pop(), **m.layers[layer].update, epsilon=m.config.norm_epsilon)
            close(gradient(parts("g_pq", 2))[..., :f].sum(1), g_s - past, kernel)
        elif kernel in ("update_mix_backward", "update_mix_merged_backward"):
            close(gradient(buffer("g1"))[:, :f], g_s, kernel)
            close(gradient(buffer("g1"))[:, f:], g_v.reshape(n, -1), kernel)
        elif kernel == "message_backward":
            s, v = states.pop()
            w = m.layers[layer].filter
            g_x, new_g_v, _ = message_backward(g_s, g_v, x[layer], v, edges, unit, d, basis, slope, w)
            close(gradient(buffer("g_x")), g_x, kernel)
            close(gradient(buffer("g0"))[:, f:], new_g_v.reshape(n, -1), kernel)
            # dE/dd and dE/du of each edge i <- j; the kernel keeps that of the reverse edge, with the unit vector reversed
            g_m = torch.cat([g_s[i], (unit[:, :, None] * g_v[i]).sum(1), (v[j] * g_v[i]).sum(1)], 1)
            g_d = (g_m * x[layer][j] * (slope @ w)).sum(1)
            g_u = (g_v[i] * (x[layer][j] * (basis @ w))[:, None, f : 2 * f]).sum(2)
            pair += torch.cat([g_d[:, None], -g_u], 1)[reverse]
            close(gradient(a["pair_gradient"].cpu().double())[e].reshape(len(e), -1, 4).sum(1), pair, kernel)
            g_v = new_g_v
        elif kernel == "source_hidden_backward":
            w = m.layers[layer].source
            close(gradient(buffer("g_hidden")).reshape(n, 3, -1).sum(1), g_x @ w["w2"].T, kernel)
        elif kernel == "source_features_backward":
            w = m.layers[layer].source
            g_s = g_s + source_features_backward(g_x, s, w["w1"], w["b1"], w["w2"])
            close(gradient(buffer("g0"))[:, :f], g_s, kernel)
            layer -= 1
        elif kernel == "source_merged_backward":
            w = m.layers[layer].source
            g_s = g_s + source_features_backward(g_x, s, w["w1"], w["b1"], w["w2"])
            close(gradient(parts("g_hidden", 1)).sum(1), g_s, kernel)
            layer -= 1
    merged = "" if schedule else "_merged"
    assert seen >= {f"update_mix{merged}_backward", f"message_first{merged}_backward", "edge_gradient", "forces", "total"}


def check(out, expected, n, relative=1e-5):
    """The bar of the GPU backend: forces within 1e-5 of the largest, in float32."""
    assert not out["status"][3:8].any()
    np.testing.assert_allclose(out["atom_energy"], expected.energies, atol=5e-6, rtol=0)
    np.testing.assert_allclose(out["forces"], expected.forces, atol=relative * max(1, np.abs(expected.forces).max()), rtol=0)
    np.testing.assert_allclose(out["virials"][0], expected.virial[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]], atol=1e-5 * n, rtol=0)
    assert out["energies"][0] == pytest.approx(expected.energy, abs=1e-6 * n)


# The interpreter takes seconds for each; the larger ones are for a GPU.
CASES = ["isolated_atom", "single_atom", "slab"] + (["triclinic", "mixed_elements", "water_box", "dense_cluster"] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("search, schedule, features, layers", [
    ("dense", 0, 48, 2), ("list", 0, 16, 1), ("list", 1, 16, 1),  # padded to 64 and 32 features
])  # fmt: skip
def test_whole_model(name, features, layers, search, schedule):
    model, atoms = random_model(features, layers), structure(name)
    r = runner(model, atoms, search, schedule, edge_capacity=128, candidate_capacity=2048 if search == "dense" else 256)
    check(r.compute(atoms.positions, atoms.cell.array, atoms.pbc), reference(model, atoms), len(atoms))


@pytest.mark.parametrize("search, schedule", [("dense", 0), ("list", 0), ("list", 1)])
def test_nothing_beyond_an_array_counts(search, schedule):
    """Sixteen atoms with fifteen neighbours each fill every array of atoms and edges to its end, behind which nothing is a number."""
    sites = 1.7 * np.stack(np.meshgrid(*map(np.arange, (2, 2, 4)), indexing="ij"), -1).reshape(-1, 3)
    atoms = Atoms("COHH" * 4, sites + np.random.default_rng(0).normal(0, 0.05, sites.shape))
    model = random_model(16, 2, cutoff=6.5)
    capacities = {"edge_capacity": 16, "candidate_capacity": 16 if search == "dense" else 32, "extra_rows": 0}
    check(runner(model, atoms, search, schedule, **capacities).compute(atoms.positions), reference(model, atoms), 16)


def test_settings_of_schnetpack():
    model, atoms = random_model(16, 2, **SCHNETPACK), structure("ethanol")
    check(runner(model, atoms, "list", 1).compute(atoms.positions), reference(model, atoms), len(atoms))


def test_energy_alone():
    model, atoms = random_model(16, 2), structure("ethanol")
    r = runner(model, atoms)
    r.arrays["forces"].fill_(7)
    out = r.compute(atoms.positions, backward=False)
    assert out["energies"][0] == pytest.approx(reference(model, atoms).energy, abs=1e-6 * len(atoms))
    assert (out["forces"] == 7).all()


def test_ignored_atoms_and_shuffled_rows():
    model, atoms = random_model(16, 2), structure("ethanol")
    order = np.random.default_rng(0).permutation(len(atoms))
    shuffled = atoms[order]
    shuffled.append("Xe")  # an element that the model does not know: species -1
    shuffled.positions[-1] = [0.5, 0.5, 0.5]
    expected = reference(model, atoms)
    out = runner(model, shuffled).compute(shuffled.positions)
    np.testing.assert_allclose(out["forces"][:-1], expected.forces[order], atol=1e-5)
    assert out["atom_energy"][-1] == 0 and (out["forces"][-1] == 0).all()


def test_batch_of_structures():
    model = random_model(16, 2)
    names = ("ethanol", "small_cell", "single_atom", "water_dimer")
    batch = [structure(name) for name in names]
    joined = batch[0] + batch[1] + batch[2] + batch[3]
    starts = np.cumsum([0] + [len(a) for a in batch])
    r = runner(model, joined, starts=starts)
    out = r.compute(joined.positions, np.stack([a.cell.array for a in batch]), np.stack([a.pbc for a in batch]))
    for b, atoms in enumerate(batch):
        expected, mine = reference(model, atoms), slice(starts[b], starts[b + 1])
        assert out["energies"][b] == pytest.approx(expected.energy, abs=1e-6 * len(atoms))
        np.testing.assert_allclose(out["forces"][mine], expected.forces, atol=1e-5)
        np.testing.assert_allclose(out["virials"][b], expected.virial[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]], atol=1e-5 * len(atoms))


def test_schedules_cover_every_size():
    def small(model):
        schedules = cuda_plan(model.config).to_dict()["schedules"]
        assert [s["max_rows"] for s in schedules] == [SMALL_ROWS, None]
        return [s["kernel"] for s in schedules[0]["stages"] if s["kernel"] != "exchange" and s["pass"] != "energy"]

    assert len(small(random_model(16, 2))) == 15 and len(small(random_model(16, 3))) == 23
    kernels = small(random_model(160, 2))  # weights of so many features fit into no program with two products
    assert len(kernels) == 22 and not any("merged" in kernel for kernel in kernels)


def test_numbers_too_large_for_few_atoms():
    """Beyond the range of halves the kernels for few atoms give no numbers and say so; those for many atoms are not affected."""
    model, atoms = random_model(32, 1), structure("ethanol")
    with torch.no_grad():
        model.layers[0].update["b2"][:32] += 1e5  # so the scalar features that the readout multiplies
    out = runner(model, atoms, schedule=0).compute(atoms.positions)
    assert out["status"][7] > 0 and not np.isfinite(out["energies"]).any() and np.isnan(out["forces"]).any()
    out, expected = runner(model, atoms, schedule=1).compute(atoms.positions), reference(model, atoms)
    assert not out["status"][3:8].any()
    np.testing.assert_allclose(out["forces"], expected.forces, rtol=0, atol=1e-5 * np.abs(expected.forces).max())
