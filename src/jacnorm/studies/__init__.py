"""One package per paper; studies never import one another."""
