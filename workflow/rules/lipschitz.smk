# Data-dependent Sample Complexity of Deep Neural Networks via Lipschitz Augmentation (docs/studies/lipschitz.md).
STUDIES["lipschitz"] = {
    "train": {
        "depth": ["fits"],
        "residual": ["residual_fits"],
        "paired": ["paired_errors"],
        "table": ["table_errors"],
    },
    "measure": {
        "depth": ["leading", "layers", "theorem", "augmented"],
        "residual": ["residual", "blocks"],
        "paired": ["paired_norms"],
        "table": ["table_norms"],
    },
}
