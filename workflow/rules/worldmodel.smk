# Towards Unraveling and Improving Generalization in World Models (docs/studies/worldmodel.md).
STUDIES["worldmodel"] = {
    "train": {
        "pendulum": ["pendulum_fits", "pendulum_curves"],
        "dreamer": ["dreamer_fits", "dreamer_curves"],
    },
    "measure": {
        "expansion": ["expansion"],
        "pendulum": [
            "pendulum_jacobians",
            "pendulum_divergence",
            "pendulum_prediction",
            "pendulum_returns",
            "pendulum_frames",
        ],
        "dreamer": [
            "dreamer_jacobians",
            "dreamer_divergence",
            "dreamer_prediction",
            "dreamer_returns",
        ],
    },
}
ENVIRONMENTS["worldmodel", "dreamer"] = "dreamerv3"
