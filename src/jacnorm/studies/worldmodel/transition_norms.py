"""Exact Jacobians of a model's transitions, and their norms.

For a transition (h, z, a) to h' = f(h, z, a), with the prior's class probabilities p(h'), the composed one-step map
takes (h, z) to (h', p(h')). Its Jacobian is that of f above that of p at h' times that of f. A penalty on f alone can
make h smaller and p steeper without changing what the model does; the composed map, and a norm relative to the sizes
of h, tell.

Letters: N transitions, D size of h, K C size of z, M actions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jacnorm.jacobian import jacobian
from jacnorm.jacobian.dense import singular_values_of
from jacnorm.studies.worldmodel import rssm
from jacnorm.studies.worldmodel.rssm import Parameters

NORMS = ("f_h", "f_h_spectral", "f_z", "p_h", "composed", "composed_prior", "h_norm", "relative")
"""What `norms` finds; columns of the table of Jacobians."""


def norms(parameters: Parameters, h: Tensor, z: Tensor, a: Tensor, classes: int) -> dict[str, Tensor]:
    """For each transition of one model the norms in `NORMS`, (N,) each, float64.

    parameters: (1, ...) each, finite. h (N, D), z (N, K C) and a (N, M): where transitions start. Frobenius norms, but
    for f_h_spectral; h_norm is that of h, and relative is f_h times ||h|| over ||h'||. All is computed in float64.

    Raises NonFiniteValue if an input is not finite.
    """
    precise = {name: tensor.double() for name, tensor in parameters.items()}
    start = torch.cat([h, z, a], 1).double()  # (N, D + K C + M)
    deter, latent = h.shape[1], z.shape[1]

    def step(x: Tensor) -> Tensor:
        return rssm.f(precise, *x.unsqueeze(0).split([deter, latent, a.shape[1]], 2)).squeeze(0)

    def prior(h: Tensor) -> Tensor:
        return rssm.prior(precise, h.unsqueeze(0), classes).squeeze(0)

    after = step(start)  # (N, D)
    # Both functions are deterministic and treat samples apart, so the instrument need not be checked at every call.
    of_f = jacobian(step, start, check=False)[:, :, : deter + latent]  # (N, D, D + K C)
    of_p = jacobian(prior, after, check=False)  # (N, K C, D)
    of_both = of_p @ of_f  # (N, K C, D + K C)
    by_h, by_z = of_f.split([deter, latent], 2)
    f_h, length = _frobenius(by_h), start[:, :deter].norm(dim=1)
    return {
        "f_h": f_h,
        "f_h_spectral": singular_values_of(by_h)[:, 0],
        "f_z": _frobenius(by_z),
        "p_h": _frobenius(of_p),
        "composed": (of_f.square().sum((1, 2)) + of_both.square().sum((1, 2))).sqrt(),
        "composed_prior": _frobenius(of_both),
        "h_norm": length,
        "relative": f_h * length / after.norm(dim=1),
    }


def _frobenius(matrices: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrices, dim=(1, 2))
