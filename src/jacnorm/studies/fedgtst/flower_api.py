"""What the study uses of Flower, with telemetry, usage reports and update checks turned off before it is imported.

Whoever wants them sets the variables; what is set is left alone.
"""

from __future__ import annotations

import os
import warnings

from jacnorm.errors import UserError

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

try:
    with warnings.catch_warnings():
        # Flower's command line meets a newer click on import; that is not our users' concern.
        warnings.simplefilter("ignore", DeprecationWarning)
        from flwr.app import (
            Array,
            ArrayRecord,
            ConfigRecord,
            Context,
            Error,
            Message,
            MessageType,
            MetricRecord,
            RecordDict,
        )
        from flwr.clientapp import ClientApp
        from flwr.common.constant import ErrorCode
        from flwr.serverapp import Grid, ServerApp
        from flwr.serverapp.strategy import Strategy
        from flwr.supercore.run import Run
        from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    raise UserError(
        f"Flower is missing or of another release ({error}): install it with `pip install 'jacnorm[federated]'`"
    ) from None

__all__ = [
    "QUIET",
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "ErrorCode",
    "Grid",
    "Message",
    "MessageType",
    "MetricRecord",
    "RecordDict",
    "Run",
    "ServerApp",
    "Strategy",
    "TaskIdentity",
]
