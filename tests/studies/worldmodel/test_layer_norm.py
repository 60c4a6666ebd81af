"""LayerNorm with a second derivative of its own, against finite differences and PyTorch's."""

from __future__ import annotations

import torch
from torch.nn import functional

from jacnorm.studies.worldmodel.layer_norm import layer_norm

torch.set_num_threads(1)


def test_values_and_both_derivatives():
    x = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.equal(layer_norm(x, 1e-3), functional.layer_norm(x, (7,), eps=1e-3))
    assert torch.autograd.gradcheck(lambda x: layer_norm(x, 1e-3), x)
    assert torch.autograd.gradgradcheck(lambda x: layer_norm(x, 1e-3), x)


def test_the_second_derivative_is_pytorchs_where_x_itself_has_a_history():
    start = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    v = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for norm in (lambda x: layer_norm(x, 1e-3), lambda x: functional.layer_norm(x, (6,), eps=1e-3)):
        (product,) = torch.autograd.grad(norm(start.sin()).tanh(), start, v, create_graph=True)
        found.append(torch.autograd.grad(product.square().sum(), start)[0])
    assert torch.allclose(*found, atol=1e-12)
