"""The split, training that repeats and resumes bit for bit, and one clear error for every bad configuration."""

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write
from labels import sampled, with_labels
from safetensors.torch import save_file
from structures import ethanol, water_dimer

from mlff.painn import PaiNN, PaiNNConfig, load_checkpoint, save_checkpoint
from mlff.train import config
from mlff.train.config import FitConfig, read_config
from mlff.train.data import Graphs, Pool, batches, collate, element_shifts, graph, make_graphs, read_frames, shortest_distances, split
from mlff.train.fit import errors, fit, mean_terms, predict, training_terms
from mlff.train.frames import rounded, save
from mlff.train.run import train

# ---- data --------------------------------------------------------------------------------------------------------------


def test_split_keeps_groups_whole_and_in_place(labelled):
    frames = read_frames([labelled], "trajectory")
    sides = split(frames, "trajectory", 0.3, 0.3, seed=3)
    assert all(sides) and sorted(sum(sides, [])) == list(range(25))
    names = [{frames[k].info["trajectory"] for k in side} for side in sides]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    part = split(frames[:12], "trajectory", 0.3, 0.3, seed=3)  # more data move no group
    assert [set(side) for side in part] == [{k for k in side if k < 12} for side in sides]
    assert split(frames, "trajectory", 0.0, 0.3, seed=3)[2] == sides[2]  # nor does a validation set what is held out
    with pytest.raises(ValueError, match=r"expected some validation data, which have a share of 1e-09, got none of 13 groups info\['trajectory'\]"):
        split(frames, "trajectory", 1e-9, 0.3, seed=3)


def test_shifts_reproduce_energies_of_a_composition():
    frames = []
    for atoms in (water_dimer(), ethanol(), water_dimer() + ethanol()):
        counts = [np.sum(atoms.numbers == z) for z in (1, 6, 8)]
        frames.append(with_labels(atoms, energy=float(np.dot(counts, [-13.6, -1030.0, -2040.0]))))
    shifts = element_shifts(frames, [1, 6, 8]).numpy()
    for atoms in frames:
        total = sum(shifts[[1, 6, 8].index(z)] for z in atoms.numbers)
        assert total == pytest.approx(atoms.get_potential_energy(), rel=1e-9)
    with pytest.raises(ValueError, match="expected only atomic numbers"):
        element_shifts(frames, [1, 8])


def test_batches_hold_every_graph_once(labelled):
    graphs = [graph(atoms, 5.0, k) for k, atoms in enumerate(read_frames([labelled], "trajectory"))]
    groups = batches(graphs, max_edges=200, generator=torch.Generator().manual_seed(1))
    assert sorted(sum(groups, [])) == list(range(25))
    assert all(len(g) == 1 or sum(graphs[k].edges.shape[1] for k in g) <= 200 for g in groups)
    batch = collate([graphs[k] for k in (3, 24, 0)])
    assert batch.n_atoms.tolist() == [len(graphs[k].atomic_numbers) for k in (3, 24, 0)]
    assert batch.has_stress.tolist() == [False, True, False]
    assert torch.equal(batch.structure[batch.edges[0]], batch.edge_structure)
    assert torch.equal(batch.structure[batch.edges[1]], batch.edge_structure)


def test_shortest_distances(labelled):
    """By hand of two structures, through a periodic image too; two elements that never meet have the cutoff."""
    frames = [
        with_labels(Atoms("HHO", positions=[[0, 0, 0], [0, 0, 0.8], [0, 0, 2.0]]), energy=0.0, forces=np.zeros((3, 3))),
        with_labels(Atoms("OC", positions=[[0, 0, 0], [0, 0, 4.0]], cell=[9, 9, 5.5], pbc=True), energy=0.0, forces=np.zeros((2, 3))),
    ]
    index = PaiNN(PaiNNConfig(species=["O", "C", "H"], features=16)).index_of_number
    shortest = shortest_distances(make_graphs(frames, 5.0), index, 5.0)
    expected = torch.tensor([[5.0, 1.5, 1.2], [1.5, 5.0, 5.0], [1.2, 5.0, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(shortest, expected, rtol=0, atol=1e-12)


def test_graphs_of_many_molecules_are_those_of_each(labelled):
    """Also of periodic frames, of one atom and of one beyond all others."""
    frames = read_frames([labelled], "trajectory")
    for numbers, positions in (([8], np.zeros((1, 3))), ([1, 1, 8], np.diag([9.0, 0.5, 20.0]))):
        frames.append(with_labels(Atoms(numbers, positions), energy=1.0, forces=np.ones((len(numbers), 3))))
    for k, (made, atoms) in enumerate(zip(make_graphs(frames, 5.0), frames, strict=True)):
        for f in fields(Graphs):
            ours, expected = getattr(made, f.name), getattr(graph(atoms, 5.0, k), f.name)
            assert ours.dtype == expected.dtype and torch.equal(ours, expected), (k, f.name)


def test_compact_files_are_data(labelled, tmp_path):
    frames = [with_labels(rounded(atoms), **atoms.calc.results) for atoms in read_frames([labelled], "trajectory")]
    save(tmp_path / "frames.npz", frames)
    again = read_frames([tmp_path / "frames.npz"], "trajectory")
    for a, b in zip(frames, again, strict=True):
        assert np.array_equal(a.numbers, b.numbers) and a.info["trajectory"] == b.info["trajectory"]
        np.testing.assert_allclose(a.calc.results["forces"], b.calc.results["forces"], atol=1e-4)
    (tmp_path / "frames.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="frames.npz: expected structures in a format that ASE reads"):
        read_frames([tmp_path / "frames.npz"], "trajectory")


def test_batches_of_one_size_are_worth_what_their_structures_are(data):
    frames, graphs = data
    pool, model = Pool(graphs, 300, 5.0, "cpu"), new_model(frames)
    order = pool.batches(torch.Generator().manual_seed(1))
    assert sorted(sum(order, [])) == list(range(25))
    shapes = set()
    for members in order:
        batch = pool.batch(members)
        shapes.add(tuple(tuple(getattr(batch, f.name).shape) for f in fields(Graphs)))
        expected = collate([graphs[k] for k in members])
        assert batch.index[: len(members)].tolist() == members and batch.n_atoms[len(members) :].eq(0).all()
        torch.testing.assert_close(training_terms(model, batch), training_terms(model, expected), rtol=1e-6, atol=1e-9)
        energy, forces, _ = predict(model, batch)
        assert torch.isfinite(energy).all() and forces[len(expected.forces) :].eq(0).all()
    assert len(shapes) == 1


@pytest.mark.gpu
def test_a_step_as_a_cuda_graph(data, tmp_path):
    """Compiled and launched as one graph, training takes the steps of plain PyTorch, and resumes."""
    frames, graphs = data
    settings = {"steps": 24, "max_edges": 2000, "warmup": 5, "ema_decay": 0.5, "report_every": 12}
    state, results = tmp_path / "state.pt", {}
    for compile in (False, True):
        _, results[compile] = fit(new_model(frames), graphs, FitConfig(**settings, compile=compile), "cuda")
    for ours, expected in zip(results[True], results[False], strict=True):
        assert ours.training == pytest.approx(expected.training, rel=1e-2) and ours.learning_rate == expected.learning_rate
    config = FitConfig(**settings, compile=True)
    with pytest.raises(Interrupted):
        fit(new_model(frames), graphs, config, "cuda", (), state, None, interrupt_at(12))
    _, resumed = fit(new_model(frames), graphs, config, "cuda", (), state)
    assert resumed[-1].training == pytest.approx(results[True][-1].training, rel=1e-2)


# ---- fit ---------------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_at(step: int):
    def report(_, curves):
        if curves[-1].step == step:
            raise Interrupted

    return report


def new_model(frames):
    torch.manual_seed(0)
    model = PaiNN(PaiNNConfig(features=16, layers=2, n_radial=8))
    model.shift.copy_(element_shifts(frames, model.config.atomic_numbers))
    return model


@pytest.fixture(scope="module")
def data(labelled):
    frames = read_frames([labelled], "trajectory")
    return frames, [graph(atoms, 5.0, k) for k, atoms in enumerate(frames)]


def same_weights(a: PaiNN, b: PaiNN) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_training_learns_repeats_and_resumes(data, tmp_path):
    frames, graphs = data
    config = FitConfig(steps=40, max_edges=400, warmup=5, seed=4, ema_decay=0.9, report_every=20)
    kinds, state = [atoms.info["kind"] for atoms in frames], tmp_path / "state.pt"
    before = errors(new_model(frames), graphs, kinds, 400, "cpu")
    whole, curves = fit(new_model(frames), graphs, config, "cpu")
    assert errors(whole, graphs, kinds, 400, "cpu")["all"]["force_meV_A_mae"] < 0.7 * before["all"]["force_meV_A_mae"]
    assert [point.step for point in curves] == [20, 40] and curves[1].loss < curves[0].loss
    with pytest.raises(Interrupted):
        fit(new_model(frames), graphs, config, "cpu", (), state, None, interrupt_at(20))
    resumed, curves_again = fit(new_model(frames), graphs, config, "cpu", (), state)
    assert curves_again == curves and same_weights(resumed, whole)
    assert same_weights(fit(new_model(frames), graphs, config, "cpu")[0], whole)
    other = config.model_copy(update={"seed": 5})
    assert not same_weights(fit(new_model(frames), graphs, other, "cpu")[0], whole)


def test_early_stop_keeps_the_best_weights_and_resumes(data, tmp_path):
    frames, graphs = data
    training, validation = graphs[:2], graphs[4:8]  # few to train on: it soon learns them by heart
    config = FitConfig(steps=400, max_edges=400, warmup=1, learning_rate=2e-2, ema_decay=0.5, report_every=3, patience=2)
    whole, curves = fit(new_model(frames), training, config, "cpu", validation)
    losses = [point.loss for point in curves]
    best = losses.index(min(losses))
    assert curves[-1].step < 400 and len(curves) == best + 3
    kept = np.dot(mean_terms(whole, validation, 400, "cpu"), [5.0, 1.0, 1.0])
    assert kept == pytest.approx(min(losses), rel=1e-6)
    state = tmp_path / "state.pt"
    for step in (curves[best].step, curves[-1].step):  # the last finds nothing left to do
        state.unlink(missing_ok=True)
        with pytest.raises(Interrupted):
            fit(new_model(frames), training, config, "cpu", validation, state, None, interrupt_at(step))
        resumed, curves_again = fit(new_model(frames), training, config, "cpu", validation, state)
        assert curves_again == curves and same_weights(resumed, whole)


def test_validation_terms_do_not_depend_on_batches(data):
    frames, graphs = data
    model = new_model(frames)
    np.testing.assert_allclose(mean_terms(model, graphs, 100, "cpu"), mean_terms(model, graphs, 10**6, "cpu"), rtol=1e-5)


def test_a_state_of_another_run_is_refused(data, tmp_path):
    frames, graphs = data
    config, state = FitConfig(steps=2, report_every=2), tmp_path / "state.pt"
    fit(new_model(frames), graphs, config, "cpu", (), state, {"data": {"sha256": "abc"}})
    other = config.model_copy(update={"steps": 4})
    with pytest.raises(ValueError, match="another run: data.sha256 was abc, is xyz; fit.steps was 2, is 4. .*remove the file"):
        fit(new_model(frames), graphs, other, "cpu", (), state, {"data": {"sha256": "xyz"}})
    state.write_text("no state")
    with pytest.raises(ValueError, match="state.pt is not the state of a training run"):
        fit(new_model(frames), graphs, config, "cpu", (), state)


def test_a_full_disk_leaves_the_last_state_and_checkpoint(data, tmp_path, monkeypatch):
    frames, graphs = data
    config, state = FitConfig(steps=4, report_every=2), tmp_path / "state.pt"
    whole, _ = fit(new_model(frames), graphs, config, "cpu")
    with pytest.raises(Interrupted):
        fit(new_model(frames), graphs, config, "cpu", (), state, None, interrupt_at(2))
    before = state.read_bytes()
    (tmp_path / "state.pt.tmp").symlink_to("/dev/full")  # every write fails for want of space
    with pytest.raises(OSError, match="state.pt could not be written, what was there is unchanged"):
        fit(new_model(frames), graphs, config, "cpu", (), state)
    assert state.read_bytes() == before
    assert same_weights(fit(new_model(frames), graphs, config, "cpu", (), state)[0], whole)  # there is space again

    path = tmp_path / "student.safetensors"
    save_checkpoint(whole, path)
    before = path.read_bytes()

    def full(tensors, file, metadata):
        with open(file, "wb") as f:
            f.write(b"half a checkpoint")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("mlff.painn.save_file", full)
    with pytest.raises(OSError, match="student.safetensors could not be written, what was there is unchanged"):
        save_checkpoint(new_model(frames), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_a_loss_that_is_not_finite_ends_the_training(data):
    frames, graphs = data
    config = FitConfig(steps=40, learning_rate=1e30, clip=1e30, warmup=0, report_every=10)
    with pytest.raises(FloatingPointError, match="not finite at step 10: .*lower fit.learning_rate"):
        fit(new_model(frames), graphs, config, "cpu")


# ---- the whole of it ---------------------------------------------------------------------------------------------------

CONFIG = """
data: {files: [sampled.extxyz], teacher: "ase.calculators.lj:LennardJones", split_by: trajectory, validation: 0.2, held_out: 0.2,
  teacher_options: {sigma: 1.0, epsilon: 0.01, rc: 4.0}, max_force: 1e9}
model: {features: 16, layers: 1, n_radial: 8}
fit: {steps: 20, max_edges: 400, warmup: 2, learning_rate: 2e-3, ema_decay: 0.9, report_every: 5, seed: 3}
"""


def folder_with(path, text=CONFIG):
    path.mkdir(exist_ok=True)
    write(path / "sampled.extxyz", sampled(), format="extxyz")
    (path / "student.yaml").write_text(text)
    return path / "student.yaml"


def test_train_from_structures_to_a_checkpoint(tmp_path, monkeypatch):
    whole, parts = folder_with(tmp_path / "whole"), folder_with(tmp_path / "parts")
    record = train(whole, "cpu")
    names = sorted(p.name for p in whole.parent.iterdir())
    labels = ["sampled.extxyz", "sampled.lennardjones.extxyz", "sampled.lennardjones.json"]
    assert names == [*labels, "student.json", "student.png", "student.safetensors", "student.state.pt", "student.yaml"]
    model = load_checkpoint(whole.with_suffix(".safetensors"))
    assert model.config.species == ["H", "C", "O"] and model.config.features == 16
    assert record == json.loads(whole.with_suffix(".json").read_text())
    assert record["teacher"]["name"] == "LennardJones" and record["fit"]["steps_done"] == 20
    assert record["data"]["training"] + record["data"]["validation"] + record["data"]["held_out"] == 25
    assert record["held_out_errors"]["all"]["structures"] == record["data"]["held_out"] > 0
    assert whole.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    frames = read_frames([whole.with_name("sampled.lennardjones.extxyz")], "trajectory")
    training = [frames[k] for k in split(frames, "trajectory", 0.2, 0.2, seed=3)[0]]
    shortest = shortest_distances(make_graphs(training, 5.0), model.index_of_number, 5.0)
    assert torch.equal(model.repulsion_radius, shortest)
    assert record["repulsion_radius_A"]["H-O"] == pytest.approx(shortest[0, 2].item(), abs=1e-4)

    from mlff.train import run

    monkeypatch.setattr(run, "plot", lambda curves, path: interrupt_at(10)(None, curves))
    with pytest.raises(Interrupted):
        train(parts, "cpu")
    monkeypatch.setattr(run, "plot", lambda curves, path: None)
    monkeypatch.setattr(run, "label_file", lambda source, target, *_: json.loads(target.with_suffix(".json").read_text()))
    again = train(parts, "cpu")
    assert parts.with_suffix(".safetensors").read_bytes() == whole.with_suffix(".safetensors").read_bytes()
    again["fit"]["seconds"], again["date"] = record["fit"]["seconds"], record["date"]
    assert again == record
    assert train(parts, "cpu")["fit"]["seconds"] == json.loads(parts.with_suffix(".json").read_text())["fit"]["seconds"]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("steps: 20", "step: 20", "unknown key fit.step, expected one of steps, max_edges, learning_rate"),
        ("data:", "train: 1\ndata:", "unknown key train, expected one of card, data, start, model, fit"),
        ("features: 16", "species: H", r"model.species: .*valid (list|array), got 'H'"),
        ("steps: 20", 'steps: "20"', "fit.steps: .*valid integer, got '20'"),
        ("steps: 20", "steps: 0", "fit.steps: .*greater than or equal to 1, got 0"),
        ("steps: 20", "steps: 20, steps: 30", 'found duplicate key "steps"'),
        ("split_by: trajectory, ", "", "expected the key data.split_by"),
        ("held_out: 0.2", "held_out: 0.9", "nothing is left to train on"),
        ("validation: 0.2", "validation: 0", "patience needs validation data"),
        ("[sampled.extxyz]", "[]", "data.files: .*at least 1"),
        ("model:", "start: a.safetensors\nmodel:", "expected start or model, got both"),
        (CONFIG, "- words", "valid dictionary|object"),
        (CONFIG, "data: {", "is not a YAML file of settings"),
        (CONFIG, "words " * 9999, r"[^\0]{100,700} \.\.\.$"),
    ],
)
def test_wrong_configurations(old, new, message, tmp_path):
    path, text = tmp_path / "student.yaml", CONFIG.replace("seed: 3", "seed: 3, patience: 2")
    path.write_text(new if old == CONFIG else text.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"(?s)student.yaml.*" + message):
        read_config(path)
    path.write_text(text)
    assert read_config(path).fit.learning_rate == 2e-3
    with pytest.raises(FileNotFoundError, match="none.yaml: no such configuration"):
        read_config(tmp_path / "none.yaml")


def test_configurations_of_the_documentation(tmp_path):
    root = Path(__file__).parents[1]
    (tmp_path / "readme.yaml").write_text(re.search(r"```yaml\n(.*?)```", (root / "README.md").read_text(), re.S)[1])
    (tmp_path / "config.yaml").write_text(re.search(r"\n    data:\n.*?\n\n", config.__doc__, re.S)[0])
    assert read_config(tmp_path / "config.yaml").fit.steps == 4000
    for path in [tmp_path / "readme.yaml", *root.glob("examples/train/*/*.yaml")]:
        assert read_config(path).data.files


def test_wrong_runs(tmp_path, labelled):
    path = folder_with(tmp_path, CONFIG.replace("features: 16", "species: [H, O], features: 16"))
    with pytest.raises(ValueError, match="expected only atomic numbers|the data hold C, but model.species has only H O"):
        train(path, "cpu")
    folder_with(tmp_path, CONFIG.replace("max_force: 1e9", "max_force: 1e-9"))
    with pytest.raises(ValueError, match="nothing is left to train on, with data.max_force = 1e-09 eV/A: 0 frames .*, 25 left out"):
        train(path, "cpu")
    start = re.sub(r"model:.*\n", "start: other.safetensors\n", CONFIG)
    folder_with(tmp_path, start)
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*other.safetensors"):
        train(path, "cpu")
    header = {"architecture": "schnet", "version": 1, "config": {}}
    save_file({"w": torch.zeros(1)}, str(tmp_path / "other.safetensors"), metadata={"mlff": json.dumps(header)})
    with pytest.raises(ValueError, match="expected architecture painn, version 1; got schnet"):
        train(path, "cpu")
    save_checkpoint(PaiNN(PaiNNConfig(species=["H", "O"], features=16, layers=1)), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="the data hold C, but .*other.safetensors has only H O"):
        train(path, "cpu")
    path.write_text(CONFIG.replace("[sampled.extxyz]", "[sampled.extxyz, sampled.xyz]"))
    with pytest.raises(ValueError, match="expected distinct files of labels"):
        train(path, "cpu")
    (tmp_path / "student.extxyz").write_bytes(labelled.read_bytes())
    path.write_text("data: {files: [student.extxyz], split_by: trajectory}")
    with pytest.raises(ValueError, match="would be one file"):
        train(path, "cpu")
    for name in "ab":
        (tmp_path / f"{name}.extxyz").write_bytes(labelled.read_bytes())
        (tmp_path / f"{name}.json").write_text(json.dumps({"teacher": {"name": name}}))
    path.write_text("data: {files: [a.extxyz, b.extxyz], split_by: trajectory}")
    with pytest.raises(ValueError, match="expected one teacher for all files, got .*'a'.* and .*'b'"):
        train(path, "cpu")
