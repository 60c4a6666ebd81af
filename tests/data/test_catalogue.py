import subprocess
import sys
from typing import get_args

import pytest

from jacnorm.data.catalogue import CATALOGUE, Name, find
from jacnorm.errors import UserError


def test_names_for_the_command_line_are_those_of_the_catalogue():
    assert get_args(Name) == tuple(CATALOGUE)


@pytest.mark.parametrize(("name", "classes"), [("digits", 10), ("photos", 2), ("fashion_mnist", 10), ("cifar100", 100)])
def test_classes_are_distinct(name, classes):
    assert len(set(find(name).classes)) == classes


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError) as caught:
        find("imagenet")
    assert str(caught.value) == (
        'data set "imagenet" is unknown; choose one of digits, photos, mnist, fashion_mnist, cifar10, cifar100, '
        "python_docs, tinyshakespeare, text"
    )


def test_catalogue_is_cheap_to_import():
    heavy = "{'torch', 'datasets', 'pyarrow', 'numpy', 'sklearn', 'PIL'}"
    program = f"import sys, jacnorm.data.catalogue; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
