"""What kernels do before previous_kernel() runs beside the kernel before (mlff/launch_triton.py), and no test of values would notice a
race: so the source of every kernel is read, in the order in which the plan runs them."""

import ast
import inspect
import textwrap

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from mlff.painn import PaiNNConfig  # noqa: E402
from mlff.plan import CUDA_SCALARS, cuda_plan  # noqa: E402

LOADS = {
    "load", "weights", "load_vector", "load_sum", "filter_weights", "load_fours", "box_row", "_failed", "load_mix", "moment_weights",
    "from_moments", "row_edges", "message_sums", "slope_edges", "load_neighbors", "load_numbers", "guess_positions", "settle_positions",
    "load_caller_cell", "bounds", "moment_rows", "of_element", "rows_of", "load_edges", "_virials_and_energies",
}  # fmt: skip
POINTERS = {  # first of the arguments, None: all; else one
    "store_hidden": 2, "load_mix": 2, "search_row": None, "radial_block": None, "store_row": None, "from_moments": None, "row_edges": None, "message_sums": None,
    "slope_edges": None, "_store_sums": None, "bounds": None, "of_element": None, "store_norms": 2, "store_energies": None,
    "_virials_and_energies": None,
}  # fmt: skip
STORES = {
    "store", "store_hidden", "store_halves", "search_row", "radial_block", "store_row", "message_gradients", "_store_sums", "_store_rows", "atomic_add",
    "atomic_max", "atomic_xchg", "store_norms", "store_energies", "_virials_and_energies",
}  # fmt: skip


def callee(node):
    return getattr(node.func, "attr", getattr(node.func, "id", None)) if isinstance(node, ast.Call) else None


class Accesses:
    """Parameters of a kernel that are read before it waits, and that it writes at all; whether it lets the next one start before it waits.
    constants: of its launch."""

    def __init__(self, function, constants=None):
        self.constants = constants or {}
        source = textwrap.dedent(inspect.getsource(getattr(function, "fn", function)))
        definition = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef))
        self.from_parameters = {a.arg: {a.arg} for a in definition.args.args}  # pointers derived from parameters
        self.early, self.written, self.early_stores = set(), set(), False
        self.starts_next = any(callee(n) == "next_kernel" for n in ast.walk(definition))
        self.waits = self.block(definition.body, True)

    def sources(self, *nodes):
        """Parameters that an expression points to; what has been loaded points to none."""
        found = set()
        for node in nodes:
            if isinstance(node, ast.Name):
                found |= self.from_parameters.get(node.id, set())
            elif callee(node) not in LOADS:
                found |= self.sources(*ast.iter_child_nodes(node))
        return found

    def block(self, statements, early):
        """Goes through statements; True if all of them together wait. early: nothing before them has waited."""
        waited = not early
        for s in statements:
            known = self.constants
            if isinstance(s, ast.If) and isinstance(s.test, ast.Compare) and isinstance(s.test.ops[0], (ast.Is, ast.IsNot)):
                known = {**dict.fromkeys(self.from_parameters, "given"), **known}
            if isinstance(s, ast.If) and {n.id for n in ast.walk(s.test) if isinstance(n, ast.Name)} <= set(known):
                chosen = eval(compile(ast.Expression(s.test), "test", "eval"), {}, known)
                waited = self.block(s.body if chosen else s.orelse, not waited)
                continue
            if isinstance(s, (ast.If, ast.For, ast.While)):
                self.expression(s.iter if isinstance(s, ast.For) else s.test, not waited)
                both = [self.block(s.body, not waited), self.block(s.orelse, not waited)]
                waited = waited or (all(both) if isinstance(s, ast.If) and s.orelse else False)
                if isinstance(s, ast.If) and not waited and any(isinstance(x, ast.Return) for x in ast.walk(s)):
                    raise AssertionError("returns before it has waited")
                continue
            if any(callee(n) == "previous_kernel" for n in ast.walk(s)):
                waited = True
            self.expression(s, not waited)
            if isinstance(s, (ast.Assign, ast.AugAssign)):
                targets = s.targets if isinstance(s, ast.Assign) else [s.target]
                found = self.sources(s.value)
                for name in (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)):
                    self.from_parameters[name] = found | (self.from_parameters.get(name, set()) if isinstance(s, ast.AugAssign) else set())
        return waited

    def expression(self, node, early):
        for call in (n for n in ast.walk(node) if callee(n) in LOADS | STORES):
            pointers = self.sources(*call.args[: POINTERS.get(callee(call), 1)])
            if callee(call) in STORES:
                self.written |= pointers
                self.early_stores |= early
            elif early:
                self.early |= pointers


def sequences():
    """Kernels in the order of an evaluation, each as (name, the plan's names of its parameters, accesses)."""
    known = {}
    for settings in ({"layers": 1}, {"layers": 2}, {"layers": 3}, {"radial_basis": "gaussian", "cutoff_function": "cosine"}):
        plan = cuda_plan(PaiNNConfig(species=["H", "O"], features=32, **settings))
        d = plan.to_dict()
        for kind_of_search, search in d["search"].items():
            for schedule in d["schedules"]:
                for kind in ("backward", "energy"):
                    stages = [s for s in search + schedule["stages"] if s["pass"] in ("forward", kind) and s["kernel"] != "exchange"]
                    run = []
                    for s in (d["import"] if kind_of_search == "list" else []) + stages:
                        launch = plan.launches[s["kernel"]]
                        key = (launch.function, tuple(launch.constants.items()))
                        if key not in known:
                            known[key] = Accesses(launch.function, launch.constants)
                        accesses = known[key]
                        run.append((s["kernel"], dict(zip(accesses.from_parameters, s["args"])), accesses))
                    yield run


def test_kernels_read_early_only_what_is_there():
    seen, started_early = set(), set()
    for run in sequences():
        for oldest, before, kernel in zip([None, *run], run, run[1:]):
            name, arguments, accesses = kernel
            seen.add(name)
            written = {before[1][p] for p in before[2].written if p in before[1]}
            early = {arguments[p] for p in accesses.early if p in arguments} - set(CUDA_SCALARS)
            assert accesses.waits, f"{name} does not wait on every path"
            assert not accesses.early_stores, f"{name} writes before it has waited"
            assert not written & early, f"{name} reads {written & early} before {before[0]} has ended, which writes it"
            if before[2].starts_next and oldest:
                written = {oldest[1][p] for p in oldest[2].written if p in oldest[1]}
                assert not written & early, f"{name} reads {written & early} before {oldest[0]} has ended: {before[0]} lets it start"
                started_early.add(name)
    assert {"update_backward.large", "update_mix_merged_backward.small", "message.small", "forces.small", "total.energy.small", "pairs_list"} <= seen
    assert started_early == {"message.small", "message_backward.small", "message_backward.add.small", "edge_gradient.small"}


@pytest.mark.parametrize("body, message", [
    ("y = tl.load(x)\n    previous_kernel()\n    tl.store(x, y)", None),
    ("p = x + 1\n    tl.store(p, 0)\n    previous_kernel()", "early store"),
    ("if x > 0:\n        previous_kernel()", "no wait"),
])  # fmt: skip
def test_the_reader_itself(body, message, tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(f"def kernel(x):\n    {body}\n")
    space = {}
    exec(compile(path.read_text(), str(path), "exec"), space)
    accesses = Accesses(space["kernel"])
    assert accesses.waits == (message != "no wait") and accesses.early_stores == (message == "early store")
    if message is None:
        assert accesses.early == {"x"} and accesses.written == {"x"}
