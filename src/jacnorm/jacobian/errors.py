"""Refusals of the measurement core: what was wrong, with which value, and what to do."""

from __future__ import annotations


class JacobianError(ValueError):
    """A Jacobian cannot be measured as asked; the message says why and what to change."""


class ShapeError(JacobianError):
    """A tensor has the wrong rank, batch size or number of entries."""


class DtypeError(JacobianError):
    """A tensor has a dtype in which the quantity is not defined or not measured (integers, half precision)."""


class OptionError(JacobianError):
    """An option is outside its range or names something that does not exist."""


class NotDifferentiable(JacobianError):
    """The output does not depend differentiably on the input, or the function cannot be linearised."""


class NonFiniteValue(JacobianError):
    """An input, output or product holds NaN or infinity; the message names the first bad sample."""


class CoupledSamples(JacobianError):
    """The output of one sample depends on another sample, so there is no Jacobian per sample."""


class NonDeterministicModel(JacobianError):
    """Two forward passes over one input differ (dropout, random augmentation, noise)."""


class AdjointMismatch(JacobianError):
    """<u, J v> and <J^T u, v> disagree: a custom backward is wrong or the dtype is too coarse."""


class UnknownLayer(JacobianError):
    """A layer name is not in the module, did not run, or runs in the wrong order."""
