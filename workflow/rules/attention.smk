# Limitations of Normalization in Attention Mechanism (docs/studies/attention.md).
STUDIES["attention"] = {
    "train": {
        "probing": ["language_fits"],
    },
    "measure": {
        "probing": [
            "weights",
            "distances",
            "collapse",
            "separability",
            "sensitivity",
            "jacobians",
        ],
        "synthetic": [
            "synthetic_weights",
            "synthetic_distances",
            "synthetic_collapse",
            "synthetic_separability",
            "synthetic_sensitivity",
            "synthetic_jacobians",
        ],
    },
}
