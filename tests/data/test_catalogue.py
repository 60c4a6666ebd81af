import subprocess
import sys
from typing import get_args

import pytest

from jacnorm.data.catalogue import CATALOGUE, SPLITS, Name, find
from jacnorm.errors import UserError


def test_names_for_the_command_line_are_those_of_the_catalogue():
    assert get_args(Name) == tuple(CATALOGUE)


@pytest.mark.parametrize(("name", "classes"), [("digits", 10), ("photos", 2), ("fashion_mnist", 10), ("cifar100", 100)])
def test_classes_are_distinct(name, classes):
    assert len(set(find(name).classes)) == classes


def test_domains_make_up_the_whole_of_domainnet():
    """409,832 and 176,743 rows, as the data set's card on the hub says; the numbers here are of the domains."""
    domains = [entry for name, entry in CATALOGUE.items() if name.startswith("domainnet_")]
    assert [sum(entry.sizes[split] for entry in domains) for split in SPLITS] == [409_832, 176_743]
    for split in SPLITS:  # so that a domain that is taken for another is refused for its size
        assert len({entry.sizes[split] for entry in domains}) == 6
    assert [entry.hub.only for entry in domains] == [("domain", number) for number in range(6)]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError) as caught:
        find("imagenet")
    assert str(caught.value) == (
        'data set "imagenet" is unknown; choose one of digits, photos, digits_m, mnist, fashion_mnist, mnist_m, '
        "cifar10, cifar100, svhn, domainnet_clipart, domainnet_infograph, domainnet_painting, domainnet_quickdraw, "
        "domainnet_real, domainnet_sketch, python_docs, tinyshakespeare, text"
    )


def test_catalogue_is_cheap_to_import():
    heavy = "{'torch', 'datasets', 'pyarrow', 'numpy', 'sklearn', 'PIL'}"
    program = f"import sys, jacnorm.data.catalogue; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
