"""Tiny files in the format of Peptides, as PyTorch Geometric finds them after the download."""

from __future__ import annotations

import torch

from jacnorm.studies.glstm.peptides import ATOM_CLASSES, TARGETS


def molecule(task, atoms, generator, ring=False):
    """A chain, or a ring: features of atoms, features of bonds, bonds, labels that depend on the first element."""
    x = torch.stack([torch.randint(classes, (atoms,), generator=generator) for classes in ATOM_CLASSES], 1)
    ends = torch.arange(atoms if ring else atoms - 1)
    bonds = torch.stack([ends, (ends + 1) % atoms])
    edge_index = torch.cat([bonds, bonds.flip(0)], 1)
    weight = (x[:, 0].float().mean() / 119 + torch.linspace(-1, 1, TARGETS[task])).unsqueeze(0)
    y = (weight > 0.5).float() if task == "func" else weight
    return x, torch.zeros(edge_index.shape[1], 3, dtype=torch.int64), edge_index, y


def write(folder, task, sizes=(5, 4, 4), seed=0):
    """Files of three splits with `sizes` molecules of 2 to 9 atoms."""
    generator = torch.Generator().manual_seed(seed)
    name = {"func": "peptides-func", "struct": "peptides-struct"}[task]
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for split, count in zip(("train", "val", "test"), sizes, strict=True):
        found = [molecule(task, 2 + (3 * i) % 8, generator, ring=i % 3 == 2) for i in range(count)]
        torch.save(found, raw / f"{split}.pt")
    return folder
