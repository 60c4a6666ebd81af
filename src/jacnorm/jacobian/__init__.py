"""Input-output Jacobians of batched functions, measured with intervals (torch and nothing else of this project).

For a function f that maps a batch of independent samples (B, ...) to (B, ...), J_b = d f(x)_b / d x_b. Which function
answers which question:

- the largest stretch of a small perturbation: `spectral_norm`; the mean-square stretch: `frobenius_norm`;
- the shape of the spectrum: `singular_values`, `log_volume`, `condition_number`; the matrix itself: `jacobian`;
- layer to layer: `partial_jacobians`; a product of hundreds of factors: `ScaledProduct`;
- in a training loss: `jacobian_penalty`; is the instrument right: `cross_check`;
- curvature of a loss in the parameters: the module `jacnorm.jacobian.operators` (import it by name; it needs
  curvlinops).
"""

from jacnorm.jacobian.crosscheck import CrossCheck, cross_check
from jacnorm.jacobian.errors import (
    AdjointMismatch,
    CoupledSamples,
    DtypeError,
    JacobianError,
    NonDeterministicModel,
    NonFiniteValue,
    NotDifferentiable,
    OptionError,
    ShapeError,
    UnknownLayer,
)
from jacnorm.jacobian.frobenius import frobenius_norm
from jacnorm.jacobian.partial import partial_jacobians
from jacnorm.jacobian.penalty import jacobian_penalty
from jacnorm.jacobian.products import ScaledProduct
from jacnorm.jacobian.results import (
    MESSAGES,
    CensoredMeasurement,
    Measurement,
    NotConvergedWarning,
    Outcome,
    StochasticNorm,
)
from jacnorm.jacobian.spectral import spectral_norm
from jacnorm.jacobian.spectrum import condition_number, jacobian, log_volume, singular_values

__all__ = [
    "MESSAGES",
    "AdjointMismatch",
    "CensoredMeasurement",
    "CoupledSamples",
    "CrossCheck",
    "DtypeError",
    "JacobianError",
    "Measurement",
    "NonDeterministicModel",
    "NonFiniteValue",
    "NotConvergedWarning",
    "NotDifferentiable",
    "OptionError",
    "Outcome",
    "ScaledProduct",
    "ShapeError",
    "StochasticNorm",
    "UnknownLayer",
    "condition_number",
    "cross_check",
    "frobenius_norm",
    "jacobian",
    "jacobian_penalty",
    "log_volume",
    "partial_jacobians",
    "singular_values",
    "spectral_norm",
]
