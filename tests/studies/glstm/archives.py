"""Tiny archives in the format of the published one, with labels from networkx."""

from __future__ import annotations

import networkx as nx
import numpy as np
import torch

SIZES = {"train": [6, 7, 8], "val": [6], "test": [7]}


def block(nodes, seed, order):
    """Three graphs of one size: adjacency, features, node labels in the given order, graph labels."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(3):
        graph = nx.disjoint_union(nx.path_graph(2), nx.cycle_graph(nodes - 2)) if number == 2 else nx.path_graph(nodes)
        values, source = rng.uniform(size=nodes), int(rng.integers(nodes))
        lengths = dict(nx.all_pairs_shortest_path_length(graph))
        columns = {
            "sssp": [lengths[source].get(node, 0) for node in range(nodes)],
            "eccentricity": [max(lengths[node].values()) for node in range(nodes)],
            "laplacian": nx.laplacian_matrix(graph).toarray() @ values,
        }
        adjacency = nx.to_numpy_array(graph)
        whole = [nx.is_connected(graph), max(columns["eccentricity"]), abs(np.linalg.eigvalsh(adjacency)).max()]
        nodewise = np.stack([columns[name] for name in order], axis=1)
        found.append((adjacency, np.stack([np.eye(nodes)[source], values], axis=1), nodewise, np.array(whole)))
    return [torch.from_numpy(np.stack(parts)).float() for parts in zip(*found, strict=True)]


def content(order=("sssp", "eccentricity", "laplacian")):
    """The four parts of an archive; the default order is that of the generator."""
    parts = ({}, {}, {}, {})
    for split, sizes in SIZES.items():
        blocks = [block(nodes, 10 * nodes + len(split), order) for nodes in sizes]
        for part, tensors in zip(parts, zip(*blocks, strict=True), strict=True):
            part[split] = list(tensors)
    return parts


def saved(folder, parts, zipped=True):
    path = folder / "pna_dataset_25-35.pkl"
    torch.save(parts, path, _use_new_zipfile_serialization=zipped)
    return path
