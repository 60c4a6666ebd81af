"""Tables that remember which of them were read, for tests of what figures and judges say that they read."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd


class Watched(dict[str, pd.DataFrame]):
    """A copy of `content` that notes every name asked for in `read`."""

    def __init__(self, content: Mapping[str, pd.DataFrame]) -> None:
        super().__init__(content)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> pd.DataFrame:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: object = None) -> object:  # type: ignore[override]
        self.read.add(name)
        return super().get(name, default)
