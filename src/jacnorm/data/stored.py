"""What a prepared file says about itself.

Apart from `prepare` and `read`, so that a change in one does not concern the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_KEY = "data set"


def pack(about: Mapping[str, Any]) -> dict[str, str]:
    """Safetensors metadata that hold `about`: one value, because the order of several changes from run to run."""
    return {_KEY: json.dumps(about, sort_keys=True)}


def unpack(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `pack`, tuples become lists. Raises KeyError or ValueError if `metadata` are not its result."""
    return json.loads(metadata[_KEY])
