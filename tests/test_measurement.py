"""What every suite of mlff validate measures with: errors of averages, runs that resume, reweighting."""

import json
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.md.langevinbaoab import LangevinBAOAB
from toys import Broken, Spring, job

from mlff.validate import Settings, measurement
from mlff.validate.measurement import Breakdown, Job, block_error, drift, dynamics, relax


def test_the_error_of_a_drift_holds_the_slope():
    rng, times = np.random.default_rng(0), np.linspace(0, 10, 5000)
    noise = lambda: np.convolve(rng.normal(size=len(times) + 24), np.ones(25) / 5, mode="valid")  # noqa: E731
    walk = lambda: np.cumsum(rng.normal(0, 0.01, len(times)))  # noqa: E731
    for disturb, largest in ((noise, 0.2), (walk, 0.6)):  # correlated over 25 values, and without end
        found = np.array([drift(times, 0.03 * times + disturb()) for _ in range(60)])
        assert (abs(found[:, 0] - 0.03) < 2 * found[:, 1]).sum() >= 50
        assert np.median(found[:, 1]) < largest and abs(found[:, 0].mean() - 0.03) < 0.1


def test_block_error_counts_correlated_values_once():
    rng = np.random.default_rng(0)
    series = [np.repeat(rng.normal(size=100), 50) for _ in range(40)]  # 100 independent values each: 0.1
    assert np.mean([block_error(x) for x in series]) == pytest.approx(0.1, rel=0.2)
    assert np.isnan(block_error(np.arange(5)))


def test_an_interrupted_run_of_dynamics_gives_the_same_bits():
    def run(state, stop=None):
        def save(state):
            kept.update(state)
            if stop and int(state["run.done"]) >= stop:
                raise KeyboardInterrupt

        kept, atoms = {}, bulk("Cu", cubic=True)
        here = job(EMT(), "Cu", state=dict(state), save=save)
        if not state:
            measurement.thermalize(atoms, 300, here.rng(0))
        make = lambda a, rng: LangevinBAOAB(  # noqa: E731
            a, 0.5 * units.fs, temperature_K=300, externalstress=0.0, hydrostatic=True, T_tau=50, P_tau=100, P_mass=1e3, rng=rng
        )
        try:
            return dynamics(here, atoms, make, 0.6, 0.01, 300)
        except KeyboardInterrupt:
            return kept

    whole, resumed = run({}), run(run({}, stop=500))
    assert len(whole.times) == 60 and whole.times[-1] == 0.6
    for name in ("positions", "cells", "temperatures", "energies"):
        assert np.array_equal(getattr(whole, name), getattr(resumed, name)), name


def test_an_explosion_and_a_runaway_relaxation_are_breakdowns():
    atoms = bulk("Cu", cubic=True)
    measurement.thermalize(atoms, 30000, np.random.default_rng(0))
    with pytest.raises(Breakdown, match="K instead of 300 K"):
        dynamics(job(EMT(), "Cu"), atoms, lambda a, rng: LangevinBAOAB(a, units.fs), 0.1, 0.01, 300)
    with pytest.raises(Breakdown):
        dynamics(job(Broken(), "Cu"), bulk("Cu", cubic=True), lambda a, rng: LangevinBAOAB(a, units.fs), 0.1, 0.01, 300)
    with pytest.raises(Breakdown, match="left a force"):
        relax(Atoms("H2", [[0, 0, 0], [0, 0, 3]]), job(Spring(), "H"), steps=1)


def test_a_measurement_goes_on_with_the_part_it_was_in(tmp_path):
    calls = []

    def part(name, fail=False):
        def run(here):
            calls.append(name)
            if fail:
                raise KeyboardInterrupt
            return {"value": np.float64(1.5), "array": np.array([1.0, np.nan])}

        return run

    path, source = tmp_path / "new" / "a.json", {"name": "EMT"}
    with pytest.raises(KeyboardInterrupt):
        measurement.measure({"a": part("a"), "b": part("b", fail=True)}, "water", job(EMT(), "H"), source, path)
    data = measurement.measure({"a": part("a"), "b": part("b")}, "water", job(EMT(), "H"), source, path)
    assert calls == ["a", "b", "b"] and data["parts"]["a"] == {"value": 1.5, "array": [1.0, None]}
    assert json.loads(path.read_text()) == data == measurement.load(path, "water")
    for changed in ({"source": {"name": "LJ"}}, {"species": ["O"]}):
        here, new = job(EMT(), *changed.get("species", ["H"])), changed.get("source", source)
        with pytest.raises(ValueError, match=f"expected a measurement with {next(iter(changed))}"):
            measurement.measure({}, "water", here, new, path)
    with pytest.raises(ValueError, match="holds a reference for the suite water, expected crystal"):
        measurement.load(path, "crystal")


# ---- reweighting -------------------------------------------------------------------------------------------------------


def bond_lengths(k: float, spread: float, count: int) -> measurement.Trajectory:
    """A bond along x in the ensemble of a spring of this constant, 0.05 ps between samples."""
    rng, zeros = np.random.default_rng(0), np.zeros(count)
    positions = np.zeros((count, 2, 3))
    positions[:, 1, 0] = 1.0 + spread * rng.normal(size=count)
    return measurement.Trajectory(0.05 * np.arange(1, count + 1), positions, np.zeros((count, 3, 3)), zeros, zeros)


def test_reweighting_gives_averages_of_another_spring():
    kT = units.kB * 300.0
    run = bond_lengths(20.0, np.sqrt(kT / 20.0), 8000)
    kept = []
    here = Job(Spring(20.0), ["O", "H"], Settings(), target=Spring(30.0), save=lambda state: kept.append(dict(state)))
    samples, average, about = measurement.ensemble(here, Atoms("OH"), run, 2000, 300.0)
    assert samples[0] == 2000 and samples[1] == 2002 and about["frames"] == 3000 and not about["first_order"]  # every 0.1 ps
    squares = (run.positions[samples, 1, 0] - 1.0) ** 2
    value, error = measurement.jackknife(lambda which: average(squares, which), 3000, blocks=20)
    assert abs(value - kT / 30.0) < 3 * error < 0.15 * kT / 30.0  # and kT / 20 is far outside
    # of w = exp(-a x^2 / 2) with a = 10 / 20 in units of the variance: (1 + 2 a)^(1/2) / (1 + a)
    assert about["effective"] / 3000 == pytest.approx(np.sqrt(2.0) / 1.5, abs=0.02)
    assert about["spread"] == pytest.approx(0.5 / 2 * np.sqrt(2.0), rel=0.1)
    equal = measurement.ensemble(job(Spring(20.0), "O", "H"), Atoms("OH"), run, 2000, 300.0)
    assert len(equal[0]) == 6000 and equal[1](run.positions[2000:], np.arange(6000)) == pytest.approx(run.positions[2000:].mean(0))

    class Silent(Spring):
        def calculate(self, *arguments, **keywords):
            raise AssertionError("asked again")

    resumed = Job(Silent(20.0), ["O", "H"], Settings(), target=Silent(30.0), state=kept[-1])
    again = measurement.ensemble(resumed, Atoms("OH"), run, 2000, 300.0)
    assert again[2] == about and again[1](squares, np.arange(3000)) == value


def test_weights_of_first_order_do_not_mind_the_size_of_a_system():
    """Many springs that are all 10 % stiffer than those sampled: <x^2> is 1 / 1.1 of what it was, and 1 - 0.1 to first order."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 400))
    difference = 0.1 / 2 * (x**2).sum(1)
    assert 1 / (measurement.weights(difference) ** 2).sum() < 0.2 * 4000
    found, error = measurement.jackknife(
        lambda which: np.average((x[which] ** 2).mean(1), weights=measurement.weights(difference[which], first_order=True)),
        4000,
        blocks=20,
    )
    assert abs(found - 0.9) < 3 * error < 0.01
    for first_order in (False, True):
        shifted = measurement.weights(difference - 1e4, first_order)
        assert shifted == pytest.approx(measurement.weights(difference, first_order)) and shifted.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "r0, count, why", [(1.2, 4000, "expected 0.4 at most for 2 atoms; take a better"), (1.001, 90, "got 45; take a longer")]
)
def test_reweighting_that_says_nothing_is_refused(r0, count, why):
    run = bond_lengths(20.0, np.sqrt(units.kB * 300.0 / 20.0), count)
    here = Job(Spring(20.0), ["O", "H"], Settings(), target=Spring(20.0, r0))
    with pytest.raises(Breakdown, match=f"^reweighting: .*{why}"):
        measurement.ensemble(here, Atoms("OH"), run, 0, 300.0)
    with pytest.raises(Breakdown, match="not finite"):
        measurement.ensemble(replace(here, target=Spring(np.nan), state={}), Atoms("OH"), run, 0, 300.0)


def test_jackknife_counts_correlated_values_once():
    rng, errors = np.random.default_rng(0), []
    for _ in range(40):
        series = np.repeat(rng.normal(1.0, 1.0, size=100), 50)
        value, error = measurement.jackknife(lambda which: [series[which].mean(), series[which].mean() ** 2], 5000)
        errors.append(error)
        assert value[0] == series.mean() and error[0] == pytest.approx(block_error(series))
    assert np.mean(errors, axis=0) == pytest.approx([0.1, 0.2], rel=0.25)
    assert np.isnan(measurement.jackknife(lambda which: 1.0, 9)[1])
