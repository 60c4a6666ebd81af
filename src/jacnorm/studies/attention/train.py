"""Training step of the `attention` study: one subcommand per experiment.

``python -m jacnorm.studies.attention.train probing --help`` documents the options.
"""

from __future__ import annotations

from jacnorm.step import run
from jacnorm.studies.attention.train_language import probing

if __name__ == "__main__":
    run({"probing": probing})
