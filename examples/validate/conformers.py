"""Makes python/mlff/structures/conformers.extxyz: the molecules of `mlff validate --suite organics`, with RDKit.

    pip install rdkit==2026.9.1
    python conformers.py ../../python/mlff/structures/conformers.extxyz

Conformers by ETKDG with a fixed seed, relaxed with MMFF94, at most six that differ by more than 0.3 Angstrom (RMSD of all atoms).
The first conformer of a molecule carries the dihedral angle of its torsion profile, four atoms, where one is named.
"""

import re
import sys
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from rdkit import Chem
from rdkit.Chem import AllChem, rdMolAlign

MOLECULES = {  # SMILES, SMARTS of the torsion
    "ethanol": ("CCO", "[CH3][CH2]O[H]"),
    "1-propanol": ("CCCO", "CCCO"),
    "ethylene glycol": ("OCCO", "OCCO"),
    "glycerol": ("OCC(O)CO", None),
    "butane": ("CCCC", "CCCC"),
    "pentane": ("CCCCC", None),
    "diethyl ether": ("CCOCC", "CCOC"),
    "ethyl acetate": ("CCOC(C)=O", "CCOC"),
    "lactic acid": ("CC(O)C(=O)O", None),
    "ethylenediamine": ("NCCN", "NCCN"),
    "alanine dipeptide": ("CC(=O)NC(C)C(=O)NC", "[$(C=O)]N[CH]C(=O)N"),
    "dopamine": ("NCCc1ccc(O)c(O)c1", "NCCc"),
    "biphenyl": ("c1ccccc1-c1ccccc1", "cc-!@cc"),
    "ibuprofen": ("CC(C)Cc1ccc(cc1)C(C)C(=O)O", None),
    "aspirin": ("CC(=O)Oc1ccccc1C(=O)O", None),
    "mercaptoethanol": ("OCCS", "OCCS"),
    "N-ethylmethanesulfonamide": ("CCNS(C)(=O)=O", "CNSC"),
    "methyl propyl sulfide": ("CSCCC", None),
    "1,2-difluoroethane": ("FCCF", "FCCF"),
    "1,2-dichloroethane": ("ClCCCl", "ClCCCl"),
    "2-chloroethanol": ("OCCCl", None),
    "1,2-dibromoethane": ("BrCCBr", "BrCCBr"),
    "3-bromopropanal": ("BrCCC=O", None),
    "trimethyl phosphate": ("COP(=O)(OC)OC", "COPO"),
}


def conformers(name: str, smiles: str, torsion: str | None) -> list[Atoms]:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMultipleConfs(mol, 60, randomSeed=7, pruneRmsThresh=0.1)
    energies = [energy for _, energy in AllChem.MMFFOptimizeMoleculeConfs(mol, maxIters=5000)]
    kept: list[int] = []
    for k in np.argsort(energies).tolist():
        if len(kept) < 6 and all(rdMolAlign.GetBestRMS(Chem.Mol(mol), mol, k, other) > 0.3 for other in kept):
            kept.append(k)
    frames = []
    for k in kept:
        atoms = Atoms([a.GetSymbol() for a in mol.GetAtoms()], mol.GetConformer(k).GetPositions().round(3))
        atoms.info = {"molecule": name, "smiles": smiles}
        frames.append(atoms)
    if torsion:
        pattern = Chem.MolFromSmarts(torsion)
        frames[0].info["torsion"] = " ".join(map(str, mol.GetSubstructMatches(pattern)[0][:4]))
    return frames


if __name__ == "__main__":
    frames = [frame for name, (smiles, torsion) in MOLECULES.items() for frame in conformers(name, smiles, torsion)]
    ase.io.write(sys.argv[1], frames, format="extxyz", columns=["symbols", "positions"], write_info=True)
    path = Path(sys.argv[1])
    path.write_text(re.sub(r" +(-?\d+\.\d{3})00000", r" \1", path.read_text()))  # positions have three digits
    print(len(frames), "conformers of", len(MOLECULES), "molecules")
