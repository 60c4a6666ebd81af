# FedGTST: Boosting Global Transferability of Federated Models via Statistics Tuning (docs/studies/fedgtst.md).
STUDIES["fedgtst"] = {
    "train": {
        "federated": ["federated_runs", "federated_rounds", "federated_clients"],
        "images": ["image_runs", "image_rounds", "image_clients"],
        "domains": ["domain_runs", "domain_rounds", "domain_clients"],
    },
    "measure": {
        "bounds": ["bounds"],
        "engines": ["engines"],
        "federated": [
            "federated_statistics",
            "federated_transfer",
            "federated_fine_tuning",
        ],
        "images": ["image_statistics", "image_transfer", "image_fine_tuning"],
        "domains": ["domain_statistics", "domain_transfer", "domain_fine_tuning"],
    },
}
