import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import jacnorm.jacobian

MODULES = [module.name for module in pkgutil.iter_modules(jacnorm.jacobian.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    module = importlib.import_module(f"jacnorm.jacobian.{name}")
    assert doctest.testmod(module).failed == 0


def test_some_examples_exist():
    finder = doctest.DocTestFinder()
    with_examples = [
        name
        for name in MODULES
        if any(test.examples for test in finder.find(importlib.import_module(f"jacnorm.jacobian.{name}")))
    ]
    assert {"spectral", "frobenius", "spectrum", "partial", "penalty", "products"} <= set(with_examples)


def test_the_package_needs_torch_and_nothing_else_of_this_project():
    """Importing it loads no other part of jacnorm, and none of the libraries that cost seconds."""
    code = "import sys, jacnorm.jacobian; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in loaded if name.startswith("jacnorm")}
    assert ours <= {"jacnorm", "jacnorm.jacobian", *(f"jacnorm.jacobian.{name}" for name in MODULES)}
    assert not {"scipy", "curvlinops", "pandas"} & set(loaded)
    assert "jacnorm.jacobian.operators" not in loaded
    assert set(jacnorm.jacobian.__all__) <= set(dir(jacnorm.jacobian))
