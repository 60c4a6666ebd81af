"""Regularisers against closed forms and loops over single samples."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from jacnorm.studies.sharpening.regularisers import ascended, cropped, mixed, shifted, squared_jacobian

torch.set_num_threads(1)


def images(runs=2, batch=3, channels=2, height=5, width=6):
    return torch.randn(runs, batch, channels, height, width, generator=torch.Generator().manual_seed(1))


# --- mixup -----------------------------------------------------------------------------------------------------------


def test_a_sample_and_its_partner_are_averaged_with_the_run_s_weight():
    x = torch.arange(12.0).view(2, 3, 2)
    partners = torch.tensor([[1, 2, 0], [2, 1, 0]])
    found = mixed(x, torch.tensor([0.25, 1.0]), partners)
    expected = torch.stack([0.25 * x[0] + 0.75 * x[0, [1, 2, 0]], x[1]])
    torch.testing.assert_close(found, expected)


# --- augmentation ----------------------------------------------------------------------------------------------------


@given(st.floats(-0.9, 0.9), st.floats(-0.9, 0.9))
def test_a_plane_is_shifted_exactly_but_for_its_edges(down, right):
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    plane = (2 * rows - 3 * columns).expand(1, 1, 1, 6, 7)
    found = shifted(plane, torch.tensor([[[down, right]]]))
    expected = 2 * (rows - down) - 3 * (columns - right)
    torch.testing.assert_close(found[0, 0, 0, 1:-1, 1:-1], expected[1:-1, 1:-1], rtol=1e-4, atol=1e-4)


def test_a_whole_pixel_moves_rows_and_columns_and_repeats_the_edge():
    x = images()
    offsets = torch.zeros(2, 3, 2)
    torch.testing.assert_close(shifted(x, offsets), x)
    offsets[0, 1] = torch.tensor([1.0, -2.0])
    found = shifted(x, offsets)
    expected = x[0, 1][:, [0, 0, 1, 2, 3]][:, :, [2, 3, 4, 5, 5, 5]]
    torch.testing.assert_close(found[0, 1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], x[1])


def test_half_a_pixel_averages_neighbours():
    x = images(runs=1, batch=1)
    found = shifted(x, torch.tensor([[[0.0, 0.5]]]))
    torch.testing.assert_close(found[..., 1:], (x[..., 1:] + x[..., :-1]) / 2)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=2), st.integers(0, 1000))
def test_a_crop_is_a_window_of_the_padded_image(pads, seed):
    x = images()
    draws = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(seed))
    found = cropped(x, torch.tensor(pads), draws)
    for run, pad in enumerate(pads):
        for sample in range(3):
            down, right = (int(u * (2 * pad + 1)) for u in draws[run, sample, :2].tolist())
            window = functional.pad(x[run, sample], [pad] * 4)[:, down : down + 5, right : right + 6]
            mirrored = draws[run, sample, 2].item() < 0.5
            assert torch.equal(found[run, sample], window.flip(2) if mirrored else window)


# --- sharpness-aware minimisation ------------------------------------------------------------------------------------


def test_the_ascent_has_the_radius_of_its_run_and_the_direction_of_its_gradient():
    draw = torch.Generator().manual_seed(2)
    shapes = {"a": (3, 4, 2), "b": (3, 5)}
    parameters = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    gradients = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for gradient in gradients.values():
        gradient[2] = 0.0
    radii = torch.tensor([0.05, 2.0, 1.0])
    found = ascended(parameters, gradients, radii)
    for run in range(3):
        way = torch.cat([(found[name][run] - parameters[name][run]).flatten() for name in shapes])
        gradient = torch.cat([gradients[name][run].flatten() for name in shapes])
        if run == 2:
            assert (way == 0).all()
            continue
        torch.testing.assert_close(way, radii[run] * gradient / gradient.norm(), rtol=1e-3, atol=1e-6)


# --- Jacobian penalty ------------------------------------------------------------------------------------------------


def test_over_all_unit_vectors_the_mean_is_the_squared_frobenius_norm():
    draw = torch.Generator().manual_seed(3)
    weights = torch.randn(2, 4, 6, generator=draw, dtype=torch.float64)
    x = torch.randn(2, 4, 6, generator=draw, dtype=torch.float64).requires_grad_()
    logits = (x @ weights.transpose(1, 2)).sinh()  # Jacobian diag(cosh(W x)) W
    probes = 7.0 * torch.eye(4, dtype=torch.float64).expand(2, 4, 4)  # sample k is probed along k, of any length
    found = squared_jacobian(logits, x, probes)
    for run in range(2):
        rows = [(logits[run, k, k].asinh().cosh() * weights[run, k]).square().sum() for k in range(4)]
        torch.testing.assert_close(found[run], torch.stack(rows).mean() * 4)


def test_random_vectors_are_unbiased():
    draw = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 3, generator=draw, dtype=torch.float64)
    x = torch.zeros(1, 4000, 3, dtype=torch.float64, requires_grad=True)
    probes = torch.randn(1, 4000, 5, generator=draw, dtype=torch.float64)
    found = squared_jacobian(x @ weight.T, x, probes).item()
    unit = functional.normalize(probes[0], dim=1)
    error = (5 * (unit @ weight).square().sum(1)).std().item() / 4000**0.5
    assert abs(found - weight.square().sum().item()) < 4 * error
    assert error < 0.05 * found


def test_the_penalty_can_be_differentiated_by_parameters():
    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)
    x = torch.ones(1, 1, 2, dtype=torch.float64, requires_grad=True)
    probes = torch.tensor([[[3.0, 0.0, 4.0]]], dtype=torch.float64)
    (found,) = torch.autograd.grad(squared_jacobian(x @ weight.T, x, probes).sum(), weight)
    v = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    torch.testing.assert_close(found, 2 * 3 * torch.outer(v, v @ weight))
