"""Makes python/mlff/structures/out-of-domain.extxyz: what a student for neutral closed-shell molecules must not be trusted with.

    pip install rdkit==2026.9.1 tblite==0.8.0
    python out_of_domain.py ../../python/mlff/structures/out-of-domain.extxyz

Three kinds, info["kind"], each relaxed by GFN2-xTB with its own charge and number of unpaired electrons:

    ion       the molecules of conformers.py with a proton more or less
    radical   the same with a hydrogen atom less
    unusual   neutral molecules with closed shells, each with an atom whose element and bonded elements occur in no
              molecule of examples/train/organics/molecules.npz
"""

import re
import sys
from collections import Counter
from pathlib import Path

import ase.io
from ase import Atoms
from ase.optimize import BFGS
from rdkit import Chem
from rdkit.Chem import AllChem
from tblite.ase import TBLite

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "train" / "organics")]

from conformers import MOLECULES  # noqa: E402
from geometry import bonds  # noqa: E402

from mlff.train.frames import load  # noqa: E402

# where a proton comes and goes: SMARTS in the order of preference
BASES = ("[NX3;!$(N-[C,S,P]=[O,S])]", "[OX1;$(O=C)]", "[OX2;!$(O-C=O)]", "[SX2]", "[OX1]")
ACIDS = ("[OX2;H1]", "[SX2;H1]", "[NX3;H1,H2]", "[CX4;H1,H2,H3]")
UNUSUAL = (
    "FS(F)(F)(F)(F)F FS(F)(F)F BrP(Br)Br ClN(Cl)Cl CN(Cl)Cl OOO [O-][O+]=O OOOO FP(F)(F)(F)F NNNN CNNNC FOF ClOCl FOC COF SSSS "
    "P12P3P1P23 BrSBr BrN(C)C FN(F)F CN(F)F CP(Br)Br CP(F)(F)(F)F BrOC ClOC FSSF ClSSCl PP CPPC NPN CP(N)N N#P C#P CP=C "
    "O=C=C=C=O N#CN=NC#N NN=NN O=NON=O [O-][N+](=O)[N+](=O)[O-] SP(S)S COOOC CSOSC CSNSC N1=NC1 O1OC1 S1NC1 P1CC1 CS(=N)C OSO "
    "BrF ClF FF BrCl OF NF ON(C)O NCl NBr SF PF PBr PCl SBr SCl SSP OPO OOS OON CNOC CSOC C12C3C1C23 N=S=O CN=S CP=O"
).split()


def edited(smiles: str, patterns: tuple, protons: int) -> list[Chem.Mol]:
    """The molecule with a proton more (1) or less (-1) at the first atom that the first fitting pattern names; [] if none does."""
    mol = Chem.MolFromSmiles(smiles)
    found = [match[0] for pattern in patterns for match in mol.GetSubstructMatches(Chem.MolFromSmarts(pattern))]
    return [changed(mol, found[0], protons, protons, 0)] if found else []


def radicals(smiles: str, count: int = 2) -> list[Chem.Mol]:
    """The molecule without one hydrogen atom, from its first and its last atoms that have some."""
    mol = Chem.MolFromSmiles(smiles)
    atoms = [atom.GetIdx() for atom in mol.GetAtoms() if atom.GetTotalNumHs()]
    return [changed(mol, k, 0, -1, 1) for k in dict.fromkeys(atoms[:: max(1, len(atoms) - 1)][:count])]


def changed(mol: Chem.Mol, k: int, charge: int, hydrogens: int, unpaired: int) -> Chem.Mol:
    mol = Chem.RWMol(mol)
    atom = mol.GetAtomWithIdx(k)
    count = atom.GetTotalNumHs() + hydrogens
    atom.SetNoImplicit(True)
    atom.SetNumExplicitHs(count)
    atom.SetFormalCharge(charge)
    atom.SetNumRadicalElectrons(unpaired)
    Chem.SanitizeMol(mol)
    return mol.GetMol()


def relaxed(mol: Chem.Mol, kind: str) -> Atoms | None:
    mol = Chem.AddHs(mol)
    if AllChem.EmbedMolecule(mol, randomSeed=7) != 0:
        return None
    charge, unpaired = Chem.GetFormalCharge(mol), sum(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms())
    atoms = Atoms([atom.GetSymbol() for atom in mol.GetAtoms()], mol.GetConformer().GetPositions())
    atoms.calc = TBLite(method="GFN2-xTB", charge=charge, multiplicity=unpaired + 1, verbosity=0)
    if not BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.05, steps=200):
        return None
    result = Atoms(atoms.numbers, (atoms.positions - atoms.positions.mean(0)).round(3))
    result.info = {"kind": kind, "smiles": Chem.MolToSmiles(Chem.RemoveHs(mol)), "charge": charge, "unpaired_electrons": unpaired}
    return result


def environments(atoms: Atoms) -> set[tuple]:
    """Element and sorted bonded elements of every atom."""
    around: dict[int, list[str]] = {k: [] for k in range(len(atoms))}
    for i, j in bonds(atoms):
        around[i].append(atoms.symbols[j])
        around[j].append(atoms.symbols[i])
    return {(atoms.symbols[k], *sorted(near)) for k, near in around.items()}


if __name__ == "__main__":
    known = set().union(*map(environments, load(Path(__file__).parent.parent / "train" / "organics" / "molecules.npz")))
    jobs = [
        *(("ion", mol) for smiles, _ in MOLECULES.values() for change in ((BASES, 1), (ACIDS, -1)) for mol in edited(smiles, *change)),
        *(("radical", mol) for smiles, _ in MOLECULES.values() for mol in radicals(smiles)),
        *(("unusual", Chem.MolFromSmiles(smiles)) for smiles in UNUSUAL),
    ]
    frames = [atoms for kind, mol in jobs if mol is not None and (atoms := relaxed(mol, kind)) is not None]
    frames = [atoms for atoms in frames if atoms.info["kind"] != "unusual" or environments(atoms) - known]
    ase.io.write(sys.argv[1], frames, format="extxyz", columns=["symbols", "positions"], write_info=True)
    path = Path(sys.argv[1])
    path.write_text(re.sub(r" +(-?\d+\.\d{3})00000", r" \1", path.read_text()))  # positions have three digits
    print(dict(Counter(atoms.info["kind"] for atoms in frames)))
