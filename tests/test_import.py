"""Models of SchNetPack as checkpoints: the same energies and forces as by SchNetPack itself, and one clear line for what is none.

SchNetPack brings some fifty packages that nothing else of mlff needs, so it is not among those of the tests: install it to run these
(`pip install schnetpack`).
"""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
from ase import units
from reference import reference
from structures import structure
from test_cli import fails

from mlff import cli
from mlff import schnetpack as module
from mlff.ase import MLFFCalculator
from mlff.painn import load_checkpoint

CUTOFF = 5.0
REFERENCES = {"H": -13.6, "C": -1029.5, "O": -2041.3}


@pytest.fixture(scope="module")
def spk():
    try:
        return module._library()
    except ImportError as e:
        pytest.skip(str(e))


@pytest.fixture
def network(spk):
    """network(basis, ...): random weights, all biases too. Replaces outputs, postprocessors and input_modules as a whole."""

    def make(basis="gaussian", features=32, n_radial=20, outputs=None, postprocessors=None, input_modules=None, n_hidden=None, **settings):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if isinstance(basis, str):
                basis = {"gaussian": spk.nn.GaussianRBF, "bessel": spk.nn.BesselRBF, "centred": spk.nn.GaussianRBFCentered}[basis](n_radial, CUTOFF)
            settings = {"n_interactions": 2, "cutoff_fn": spk.nn.CosineCutoff(CUTOFF), **settings}
            representation = spk.representation.PaiNN(features, radial_basis=basis, **settings)
            modules = spk.atomistic
            model = spk.model.NeuralNetworkPotential(
                representation,
                [modules.PairwiseDistances()] if input_modules is None else input_modules,
                [modules.Atomwise(features, n_hidden=n_hidden, output_key="energy"), modules.Forces()] if outputs is None else outputs,
                [spk.transform.CastTo64()] if postprocessors is None else postprocessors,
            )
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):
                        parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def save(tmp_path):
    def write(model):
        torch.save(model, tmp_path / "best_model")
        return tmp_path / "best_model"

    return write


def offsets(spk, mean=None, references=None, **settings):
    p = spk.transform.AddOffsets("energy", add_mean=mean is not None, add_atomrefs=references is not None, **settings)
    if mean is not None:
        p.mean = torch.tensor([mean], dtype=torch.float64)
    if references is not None:
        p.atomref = torch.zeros(100, dtype=torch.float64)
        for symbol, energy in references.items():
            p.atomref[module.chemical_symbols.index(symbol)] = energy
    return p


def by_schnetpack(spk, model, atoms, length=1.0, exact=True):
    """Energy, forces and stress in the model's units, by SchNetPack in float64 with its own neighbours.

    exact: with the exact frequencies of Bessel functions in place of those in float32.
    """
    from schnetpack.interfaces import AtomsConverter

    model = copy.deepcopy(model).double()
    basis = model.representation.radial_basis
    if exact and hasattr(basis, "freqs"):
        basis.freqs = torch.arange(1, basis.n_rbf + 1, dtype=torch.float64) * math.pi / CUTOFF
    model.input_modules.insert(0, spk.atomistic.Strain())
    forces = model.output_modules[1]
    forces.calc_stress, forces.required_derivatives = True, [spk.properties.R, spk.properties.strain]
    model.model_outputs.append("stress")
    atoms = atoms.copy()
    if not atoms.pbc.any():
        atoms.set_cell(np.eye(3) * 100)  # whose volume is only divided by
    atoms.set_cell(atoms.cell.array / length, scale_atoms=True)
    convert = AtomsConverter(spk.transform.MatScipyNeighborList(CUTOFF), dtype=torch.float64)
    results = model(convert(atoms))
    energy, forces, stress = (results[key].detach().numpy() for key in ("energy", "forces", "stress"))
    return energy.item(), forces, stress[0]


def imported(path, *options):
    """The checkpoint that the command makes."""
    output = path.with_name("my.safetensors")
    assert cli.main(["import", "schnetpack", str(path), "-o", str(output), *options]) == 0
    return load_checkpoint(output)


KINDS = {
    "gaussian": {},
    "bessel": {"basis": "bessel"},
    "bessel, one layer": {"basis": "bessel", "n_interactions": 1},
    "centred": {"basis": "centred", "n_radial": 12},
    "50 Gaussians": {"n_radial": 50},
    "shared filters": {"shared_filters": True, "n_interactions": 3},
    "shared interactions": {"basis": "bessel", "shared_interactions": True, "n_interactions": 3},
    "30 features": {"features": 30},
    "12 hidden": {"n_hidden": 12},
    "epsilon": {"epsilon": 1e-3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_schnetpack(kind, spk, network, save):
    theirs = network(**KINDS[kind])
    model = imported(save(theirs), "--elements", "O,H,C")
    assert model.config.species == ["O", "H", "C"] and model.config.features == 32 and not model.config.repulsion
    for name in ("ethanol", "small_cell", "triclinic"):
        atoms = structure(name)
        energy, forces, stress = by_schnetpack(spk, theirs, atoms)
        ours = reference(model, atoms)
        largest = np.abs(forces).max()
        assert ours.energy == pytest.approx(energy, abs=1e-6)
        np.testing.assert_allclose(ours.forces, forces, rtol=0, atol=1e-6 * largest)
        if atoms.pbc.all():
            np.testing.assert_allclose(-ours.virial / atoms.get_volume(), stress, rtol=0, atol=1e-6 * np.abs(stress).max())
        energy, forces, _ = by_schnetpack(spk, theirs, atoms, exact=False)
        assert ours.energy == pytest.approx(energy, abs=1e-6 * len(atoms))
        np.testing.assert_allclose(ours.forces, forces, rtol=0, atol=3e-6 * largest)  # with frequencies in float32


def test_trained_gaussians(spk, network, save):
    basis = spk.nn.GaussianRBF(20, CUTOFF, trainable=True)
    basis.offsets.data += 0.1 * torch.rand(20)
    basis.widths.data *= 1 + 0.3 * torch.rand(20)
    theirs, atoms = network(basis), structure("ethanol")
    energy, forces, _ = by_schnetpack(spk, theirs, atoms)
    ours = reference(imported(save(theirs), "--elements", "H,C,O"), atoms)
    assert ours.energy == pytest.approx(energy, abs=1e-6)
    np.testing.assert_allclose(ours.forces, forces, rtol=0, atol=1e-6 * np.abs(forces).max())


def test_embedding_of_electron_configurations(spk, network, save):
    if not hasattr(spk.nn, "NuclearEmbedding"):
        pytest.skip("SchNetPack before 2.1 has none")
    theirs, atoms = network(nuclear_embedding=spk.nn.NuclearEmbedding(101, 32, zero_init=False)), structure("ethanol")
    ours = reference(imported(save(theirs), "--elements", "H,C,O"), atoms)
    assert ours.energy == pytest.approx(by_schnetpack(spk, theirs, atoms)[0], abs=1e-6)


@pytest.mark.parametrize("basis", ["gaussian", "bessel"])
def test_through_the_core(basis, spk, network, save, tmp_path):
    """The exported file, through ASE: the compiled kernels in single precision."""
    theirs = network(basis, postprocessors=[spk.transform.CastTo64(), offsets(spk, references=REFERENCES)])
    imported(save(theirs))
    assert cli.export_main([str(tmp_path / "my.safetensors"), "-o", str(tmp_path / "model.pt"), "--arch", "none"]) == 0
    for name in ("ethanol", "small_cell", "triclinic"):
        atoms = structure(name)
        atoms.calc = MLFFCalculator(tmp_path / "model.pt")
        energy, forces, stress = by_schnetpack(spk, theirs, atoms)
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-6 * len(atoms))
        np.testing.assert_allclose(atoms.get_forces(), forces, rtol=0, atol=1e-5)
        if atoms.pbc.all():
            np.testing.assert_allclose(atoms.get_stress(voigt=False), stress, rtol=0, atol=1e-6)


@pytest.mark.parametrize("basis", ["gaussian", "bessel"])
def test_units(basis, spk, network, save):
    """A cutoff of 5 bohr, energies in kcal/mol."""
    theirs = network(basis, postprocessors=[spk.transform.CastTo64(), offsets(spk, -100.0)])
    model = imported(save(theirs), "--elements", "H,C,O", "--energy-unit", "kcal/mol", "--length-unit", "Bohr")
    assert model.config.cutoff == pytest.approx(5 * units.Bohr)
    for name in ("ethanol", "triclinic"):
        atoms, kcal = structure(name), units.kcal / units.mol
        energy, forces, _ = by_schnetpack(spk, theirs, atoms, length=units.Bohr)
        ours = reference(model, atoms)
        assert ours.energy == pytest.approx(energy * kcal, abs=1e-6)
        np.testing.assert_allclose(ours.forces, forces * kcal / units.Bohr, rtol=0, atol=1e-6 * np.abs(ours.forces).max())


def test_offsets(spk, network, save):
    """Mean and references are added to all atoms; without post-processing none is."""
    steps = [spk.transform.CastTo64(), offsets(spk, -4.125, REFERENCES)]
    theirs, atoms = network(postprocessors=steps), structure("ethanol")
    with_, shifts = imported(save(theirs)), list(REFERENCES.values())
    assert with_.config.species == list(REFERENCES)  # those with a reference, by atomic number
    assert reference(with_, atoms).energy == pytest.approx(by_schnetpack(spk, theirs, atoms)[0], abs=1e-6)
    theirs.do_postprocessing = False
    without = imported(save(theirs), "--elements", "H,C,O")
    np.testing.assert_allclose((with_.shift - without.shift).numpy(), np.array(shifts) - 4.125, atol=1e-12)
    assert reference(without, atoms).energy == pytest.approx(by_schnetpack(spk, theirs, atoms)[0], abs=1e-6)


def test_record(spk, network, save, tmp_path, capsys):
    path = save(network())
    imported(path, "--elements", "H,O")
    assert "wrote" in (text := capsys.readouterr().out) and "H O" in text and "largest differences" in text
    record = json.loads((tmp_path / "my.json").read_text())["imported"]
    assert record["file"] == "best_model" and record["from"].startswith("SchNetPack 2.") and len(record["sha256"]) == 64
    assert max(record["largest_difference_of_energies"], record["largest_difference_of_forces"]) < 1e-10
    cli.export_main([str(tmp_path / "my.safetensors"), "-o", str(tmp_path / "model.pt"), "--arch", "none"])
    assert cli.main(["info", str(tmp_path / "model.pt"), "--check"]) == 0
    text = capsys.readouterr().out
    for words in ("SchNetPack 2.", "best_model", record["sha256"][:40], "gaussian", "cosine", "self-check passed"):
        assert words in text


def test_a_difference_is_refused(network, save, tmp_path, capsys, monkeypatch):
    """Something that convert does not know of: nothing is written."""
    path, convert = save(network()), module.convert

    def wrong(*arguments):
        model = convert(*arguments)
        model.layers[1].filter[3, 5] *= 1.001
        return model

    monkeypatch.setattr(module, "convert", wrong)
    text = fails(capsys, cli.main, "import", "schnetpack", path, "-o", tmp_path / "my.safetensors", "--elements", "H,O")
    assert "the checkpoint would differ by" in text and "expected at most 1e-06" in text
    monkeypatch.setattr(module, "compare", lambda *arguments: (0.0, float("nan")))
    assert "nan in forces" in fails(capsys, cli.main, "import", "schnetpack", path, "-o", tmp_path / "my.safetensors", "--elements", "H,O")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best_model"]


def dipole(spk):
    a = spk.atomistic
    return {"outputs": [a.Atomwise(32, output_key="energy"), a.Forces(), a.DipoleMoment(32, dipole_key="dipole")]}


def energies(**settings):
    return lambda spk: {"outputs": [spk.atomistic.Atomwise(32, output_key="energy", **settings), spk.atomistic.Forces()]}


BAD_NETWORKS = {
    "cutoff function": (lambda spk: {"cutoff_fn": spk.nn.MollifierCutoff(CUTOFF)}, "the cutoff function is MollifierCutoff, expected CosineCutoff"),
    "activation": (lambda spk: {"activation": spk.nn.shifted_softplus}, "activation of the context network is shifted_softplus, expected silu"),
    "activation of the output": (energies(activation=torch.tanh), "activation of the output network is tanh, expected silu"),
    "other cutoff of the basis": (lambda spk: {"basis": spk.nn.BesselRBF(20, 6.0)}, "for the cutoff 6, expected that of the cutoff function, 5"),
    "another output": (dipole, r"the model's outputs are Atomwise (energy) and Forces (forces) and DipoleMoment (dipole), expected Atomwise"),
    "no forces": (lambda spk: {"outputs": [spk.atomistic.Atomwise(32, output_key="energy")]}, "outputs are Atomwise (energy), expected"),
    "mean": (energies(aggregation_mode="avg"), "1 components and the aggregation avg, expected a sum"),
    "two components": (energies(n_out=2), "2 components and the aggregation sum, expected a sum"),
    "three layers": (energies(n_layers=3), "the output network has 3 layers, expected 2"),
    "wide": (energies(n_hidden=17), "the output network has 17 hidden units, expected at most 16"),
    "input module": (
        lambda spk: {"input_modules": [spk.atomistic.PairwiseDistances(), spk.atomistic.FilterShortRange(3.0)]},
        "the model has the input modules FilterShortRange, expected PairwiseDistances",
    ),
    "postprocessor": (
        lambda spk: {"postprocessors": [spk.transform.ScaleProperty("energy")]}, "the postprocessor is ScaleProperty, expected CastTo64 or"
    ),
    "intensive": (lambda spk: {"postprocessors": [offsets(spk, 1.0, is_extensive=False)]}, "(is_extensive=False)"),
    "offsets of something else": (
        lambda spk: {"postprocessors": [spk.transform.AddOffsets("gap", add_mean=True)]}, "the offsets of gap are not offsets of the energy"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_NETWORKS)
def test_bad_network(kind, spk, network, save, tmp_path, capsys):
    change, message = BAD_NETWORKS[kind]
    text = fails(capsys, cli.main, "import", "schnetpack", save(network(**change(spk))), "-o", tmp_path / "my.safetensors", "--elements", "H,O")
    assert "best_model: " in text and message in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best_model"]


def test_forces_of_another_energy(spk, network, save, tmp_path, capsys):
    model = network()
    model.output_modules[1].energy_key = "other"
    text = fails(capsys, cli.main, "import", "schnetpack", save(model), "-o", tmp_path / "my.safetensors", "--elements", "H,O")
    assert "the forces are not those of the output energy, but of other" in text


def test_charges_and_spins(spk, network, save, tmp_path, capsys):
    if not hasattr(spk.nn, "ElectronicEmbedding"):
        pytest.skip("SchNetPack before 2.1 has none")
    embedding = spk.nn.ElectronicEmbedding("total_charge", 32, is_charged=True)
    path = save(network(electronic_embeddings=[embedding]))
    assert "embeddings of charge or spin" in fails(capsys, cli.main, "import", "schnetpack", path, "-o", tmp_path / "a.safetensors")


@pytest.mark.parametrize("options, message", [
    ([], "name them, --elements H,C,O"),
    (["--elements", "H,Xx"], "distinct chemical symbols"),
    (["--elements", "H,H"], "distinct chemical symbols"),
    (["--elements", "H,Fm"], "no embedding or no atomic reference for all of H Fm"),
    (["--elements", "H", "--energy-unit", "erg"], "the unit of energy is 'erg', expected one of eV, Hartree, kcal/mol, kJ/mol"),
    (["--elements", "H", "--length-unit", "eV"], "the unit of length is 'eV', expected one of Ang, Bohr, nm"),
])  # fmt: skip
def test_bad_options(options, message, network, save, tmp_path, capsys):
    assert message in fails(capsys, cli.main, "import", "schnetpack", save(network()), "-o", tmp_path / "my.safetensors", *options)


def test_other_models(spk, save, tmp_path, capsys):
    representation = spk.representation.SchNet(32, 2, spk.nn.GaussianRBF(20, CUTOFF), spk.nn.CosineCutoff(CUTOFF))
    modules = spk.atomistic
    schnet = spk.model.NeuralNetworkPotential(representation, [modules.PairwiseDistances()], [modules.Atomwise(32), modules.Forces()], [])
    for thing, message in (
        (schnet, "the representation is SchNet, expected PaiNN"),
        (representation, "holds SchNet, expected NeuralNetworkPotential: the file best_model"),
        (schnet.state_dict(), "holds OrderedDict, expected NeuralNetworkPotential"),
    ):
        assert message in fails(capsys, cli.main, "import", "schnetpack", save(thing), "-o", tmp_path / "my.safetensors", "--elements", "H")
    (tmp_path / "best_model").write_text("no model here\n")
    text = fails(capsys, cli.main, "import", "schnetpack", tmp_path / "best_model", "-o", tmp_path / "my.safetensors", "--elements", "H")
    assert "cannot be read as a model of SchNetPack 2." in text


def test_bad_paths(tmp_path, capsys):
    path = tmp_path / "best_model"
    assert "no such model file" in fails(capsys, cli.main, "import", "schnetpack", path, "-o", tmp_path / "my.safetensors")
    path.write_bytes(b"")
    assert "does not exist" in fails(capsys, cli.main, "import", "schnetpack", path, "-o", tmp_path / "none" / "my.safetensors")
    assert "ends in .safetensors" in fails(capsys, cli.main, "import", "schnetpack", path, "-o", tmp_path / "my.json")


def test_without_schnetpack(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "schnetpack", None)
    (tmp_path / "best_model").write_bytes(b"")
    text = fails(capsys, cli.main, "import", "schnetpack", tmp_path / "best_model", "-o", tmp_path / "my.safetensors")
    assert text.endswith("pip install schnetpack")
