"""The process that trains DreamerV3: ``python -m jacnorm.studies.worldmodel.dreamer_train_worker task.json``."""

from __future__ import annotations

import sys
from typing import Any

from jacnorm.studies.worldmodel.dreamer_worker import Say, serve


def train(task: dict[str, Any], say: Say) -> dict[str, Any]:
    """See `dreamer_training.train`, which only DreamerV3's own environment can import."""
    from jacnorm.studies.worldmodel import dreamer_training

    return dreamer_training.train(task, say)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], train))
