# gLSTM: Mitigating Over-Squashing by Increasing Storage Capacity (docs/studies/glstm.md).
STUDIES["glstm"] = {
    "train": {
        "nar": ["nar_fits", "nar_curves"],
        "narr": ["narr_fits", "narr_curves"],
        "gpp": ["gpp_fits", "gpp_graphs"],
        "ring": ["ring_fits"],
        "peptides": ["peptides_fits"],
    },
    "measure": {
        "trees": ["trees"],
        "nar": ["nar_jacobians", "nar_hessians"],
        "narr": ["narr_jacobians", "narr_hessians"],
    },
}
