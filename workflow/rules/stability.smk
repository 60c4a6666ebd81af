# On the Stability of the Jacobian Matrix in Deep Neural Networks (docs/studies/stability.md).
STUDIES["stability"] = {
    "train": {"trainability": ["trainability"], "drift": ["curves"]},
    "measure": {
        "depth": ["depth"],
        "theorem": ["limit", "surrogate", "independence"],
        "conditions": ["edge_matrices", "edge_networks", "correlated"],
        "scores": ["scores"],
        "trainability": ["start"],
        "drift": ["drift"],
    },
}
