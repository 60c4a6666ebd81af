"""Architectures that more than one study uses."""
