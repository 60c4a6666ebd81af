"""What regularisers do to a batch, to the parameters at which a gradient is taken, and to the objective.

All functions take R stacked runs, each with its own strength. Letters: R runs, B samples, K logits. The random numbers
come from the caller, so that runs of one seed can share them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Stack = Mapping[str, Tensor]


def mixed(values: Tensor, weights: Tensor, partners: Tensor) -> Tensor:
    """Each sample mixed with another of its batch, as mixup mixes inputs and targets (Zhang et al. 2018).

    values: (R, B, ...). weights: (R,), that of the sample itself, drawn from Beta(alpha, alpha) once a batch. partners:
    (R, B), a permutation of each run's samples.
    """
    runs = torch.arange(len(values), device=values.device)[:, None]
    return torch.lerp(values[runs, partners], values, _beside(weights, values))


def shifted(x: Tensor, offsets: Tensor) -> Tensor:
    """Images moved down and to the right by fractions of pixels: bilinear between pixels, edges repeated.

    x: (R, B, c, h, w). offsets: (R, B, 2), in pixels.
    """
    images = x.flatten(0, 1)  # (R B, c, h, w)
    height, width = images.shape[2:]
    down, right = offsets.flatten(0, 1).to(images).unbind(1)  # (R B,)
    # grid_sample counts from -1 to 1, the outer edges of the first and last pixels.
    rows = (2 * torch.arange(height, device=x.device) + 1) / height - 1 - 2 * down[:, None] / height
    columns = (2 * torch.arange(width, device=x.device) + 1) / width - 1 - 2 * right[:, None] / width
    shape = (len(images), height, width)
    grid = torch.stack([columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)], 3)  # (R B, h, w, 2)
    moved = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved.unflatten(0, x.shape[:2])


def cropped(x: Tensor, pads: Tensor, draws: Tensor) -> Tensor:
    """Images with `pads` zeros around them, cropped to their size at random, half of them mirrored left to right.

    x: (R, B, c, h, w). pads: (R,) int64, in pixels. draws: (R, B, 3), uniform on [0, 1): down, right and mirror.
    """
    runs, batch, channels, height, width = x.shape
    starts = (draws[..., :2] * (2 * pads + 1)[:, None, None]).long() - pads[:, None, None]  # (R, B, 2)
    rows = starts[..., 0, None] + torch.arange(height, device=x.device)  # (R, B, h)
    columns = torch.arange(width, device=x.device).expand(runs, batch, width)
    columns = torch.where(draws[..., 2, None] < 0.5, columns.flip(2), columns) + starts[..., 1, None]  # (R, B, w)
    inside = ((rows >= 0) & (rows < height))[..., :, None] & ((columns >= 0) & (columns < width))[..., None, :]
    image = torch.arange(runs * batch, device=x.device).view(runs, batch, 1, 1, 1)
    channel = torch.arange(channels, device=x.device).view(1, 1, channels, 1, 1)
    where = (rows.clamp(0, height - 1)[:, :, None, :, None], columns.clamp(0, width - 1)[:, :, None, None, :])
    return x.flatten(0, 1)[(image, channel, *where)] * inside.unsqueeze(2)


def ascended(parameters: Stack, gradients: Stack, radii: Tensor) -> dict[str, Tensor]:
    """Parameters theta + rho g / |g|, where sharpness-aware minimisation takes its gradient (Foret et al. 2021).

    |g| is over all parameters of a run; radii: (R,). A run whose gradient is zero stays where it is.
    """
    squares = sum(gradient.flatten(1).square().sum(1) for gradient in gradients.values())  # (R,)
    factors = radii / torch.as_tensor(squares).sqrt().clamp_min(torch.finfo(radii.dtype).tiny)
    return {name: p + _beside(factors, p) * gradients[name] for name, p in parameters.items()}


def squared_jacobian(logits: Tensor, x: Tensor, probes: Tensor) -> Tensor:
    """Estimate of the mean squared Frobenius norm of the Jacobian of the logits by the input, (R,), differentiable.

    K |v^T J|^2, with one random unit vector v for each sample, has that expectation (Hoffman et al. 2019). Where
    samples mix, as under batch norm in training, v^T J holds what an input does to all logits of the batch.

    logits: (R, B, K), computed from x (R, B, ...), which requires gradients. probes: (R, B, K), of any length but 0.
    """
    unit = probes / torch.linalg.vector_norm(probes, dim=2, keepdim=True)
    (rows,) = torch.autograd.grad((logits * unit).sum(), x, create_graph=True)  # (R, B, ...)
    return logits.shape[2] * rows.flatten(2).square().sum(2).mean(1)


def _beside(values: Tensor, tensor: Tensor) -> Tensor:
    """One number for each run, (R,), in the shape (R, 1, ..., 1) that multiplies `tensor`."""
    return values.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
