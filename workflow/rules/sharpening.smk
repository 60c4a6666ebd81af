# On progressive sharpening, flat minima and generalisation (docs/studies/sharpening.md).
STUDIES["sharpening"] = {
    "train": {
        "descent": ["descent_fits"],
        "images": ["image_fits"],
        "regularisers": ["sgd_fits"],
        "scaling": ["scaling_fits"],
    },
    "measure": {
        "descent": ["trajectory", "layer_kernels", "measuring_cost"],
        "images": ["image_trajectory", "image_layer_kernels", "image_measuring_cost"],
        "regularisers": ["endpoints"],
        "scaling": ["sizes", "widths", "identities"],
    },
}
