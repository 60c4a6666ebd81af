"""The training loop, its checkpoints, seeds and devices, and the tracking of runs.

`loop.fit` is the one loop of all studies; `stacked` trains many seeds and cells at once inside it; `tracking.track`
records a job with Weights & Biases.
"""
