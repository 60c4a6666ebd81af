"""The process that measures DreamerV3: ``python -m jacnorm.studies.worldmodel.dreamer_measure_worker task.json``."""

from __future__ import annotations

import sys
from typing import Any

from jacnorm.studies.worldmodel.dreamer_worker import Say, serve


def measure(task: dict[str, Any], say: Say) -> dict[str, Any]:
    """See `dreamer_measuring`, which only DreamerV3's own environment can import; by the task's command."""
    from jacnorm.studies.worldmodel import dreamer_measuring

    if task["command"] == "estimate":
        return dreamer_measuring.estimate(task)
    return dreamer_measuring.measure(task, say)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], measure))
