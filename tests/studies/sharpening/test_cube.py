"""Inputs on the cube: uniform, nested, each seed's own; a smooth target; a grid that covers."""

from __future__ import annotations

import pytest
import torch

from jacnorm.studies.sharpening import cube
from jacnorm.studies.sharpening.measures import Neighbours

torch.set_num_threads(1)


@pytest.mark.parametrize("dimension", [1, 2, 3, 4])
def test_samples_are_uniform_nested_and_each_seeds_own(dimension):
    x = cube.samples([10, 11], 4000, dimension)
    assert x.shape == (2, 4000, 1, 1, dimension)
    assert x.min() >= 0
    assert x.max() < 1
    assert not torch.equal(x[0], x[1])
    # 99.9 % of means and second moments lie within 3.3 standard errors.
    assert x.double().mean((1, 2, 3)).flatten().tolist() == pytest.approx([1 / 2] * 2 * dimension, abs=0.016)
    assert x.double().square().mean((1, 2, 3)).flatten().tolist() == pytest.approx([1 / 3] * 2 * dimension, abs=0.017)
    for count in (1, 15, 16, 17, 30, 999):  # torch draws blocks of 16 in another way for some distributions
        assert torch.equal(cube.samples([10, 11], count, dimension), x[:, :count])
    assert torch.equal(cube.samples([11], 30, dimension)[0], x[1, :30])


@pytest.mark.parametrize("dimension", [1, 2, 3, 4])
def test_the_target_is_one_smooth_function_that_varies(dimension):
    x = cube.grid(dimension).double()
    y = cube.target(x)
    assert y.shape == (len(x), cube.OUTPUTS)
    assert torch.equal(y, cube.target(x))
    assert (y.std(0) > 0.05).all()
    torch.testing.assert_close(cube.target(x.float()), y.float(), rtol=1e-4, atol=1e-5)
    step = torch.full((dimension,), 1e-4 / dimension**0.5, dtype=torch.float64)  # of length 1e-4
    slope = (cube.target(x + step) - y).norm(dim=1) / 1e-4
    bend = (cube.target(x + step) - 2 * y + cube.target(x - step)).norm(dim=1) / 1e-8
    assert slope.max() < 50
    assert bend.max() < 500


def test_the_target_of_stacked_samples_is_the_target_of_each():
    x = cube.samples([10, 11], 5, 3)
    assert cube.target(x).shape == (2, 5, cube.OUTPUTS)
    torch.testing.assert_close(cube.target(x)[1], cube.target(x[1]))


@pytest.mark.parametrize(("dimension", "axis"), [(1, 10_000), (2, 100), (3, 21), (4, 10)])
def test_the_grid_is_regular_and_has_the_faces(dimension, axis):
    points = cube.grid(dimension)
    assert points.shape == (axis**dimension, 1, 1, dimension)
    assert len(points) <= cube.GRID_POINTS
    assert len(points.unique(dim=0)) == len(points)
    assert points[0].unique().tolist() == [0]
    assert points[-1].unique().tolist() == [1]
    covered = Neighbours.of(points, cube.samples([10], 500, dimension)[0]).distance.max()
    assert covered <= dimension**0.5 / 2 / (axis - 1) + 1e-6  # half a diagonal of a cell
