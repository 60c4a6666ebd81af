"""The named data sets: where each comes from, what it must look like, and what to call it. Cheap to import.

To add a data set, add one entry to `CATALOGUE` (and its name to `Name`); images in Parquet on the Hugging Face hub and
texts in a mirror need nothing else, an embedded set needs one function in `jacnorm.data.embedded` or `texts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jacnorm.errors import UserError

Name = Literal[
    "digits", "photos", "mnist", "fashion_mnist", "cifar10", "cifar100", "python_docs", "tinyshakespeare", "text"
]
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Hub:
    """A place on the Hugging Face hub whose Parquet files hold encoded images and integer labels.

    A local mirror has the same layout: ``<mirror>/<id>/<config>/<split>-00000-of-00001.parquet``.
    """

    id: str
    config: str
    image: str
    """Column of the encoded images: a struct with the field `bytes`."""
    label: str
    """Column of the class numbers."""
    revision: str = "main"
    """Branch asked for. Not a fixed commit: the commit read is recorded, and it is the content that is checked."""


@dataclass(frozen=True)
class Dataset:
    """One named data set of images."""

    name: str
    label: str
    """What to call it in reports, if the pixels are those of the original."""
    classes: tuple[str, ...]
    """Class names in the order of the class numbers 0, 1, ..."""
    shape: tuple[int, int, int]
    """Channels, height, width of one image."""
    sizes: Mapping[str, int]
    """Number of images in each split."""
    split: str
    """How train and test were separated."""
    licence: str
    hub: Hub | None = None
    """None: the data ship inside scikit-learn."""
    pixel_max: int = 255
    """Largest value that a pixel can take; the smallest is 0."""
    idx_md5: Mapping[str, str] = field(default_factory=dict)
    """MD5 of the original uncompressed IDX files, by array (``train_x``, ...), for sets published in that format."""
    sha256: str | None = None
    """Content digest (`jacnorm.data.digests.content_digest`) that the arrays of an embedded set must have."""


@dataclass(frozen=True)
class Text:
    """One named text."""

    name: str
    label: str
    """What to call it in reports."""
    licence: str
    file: str | None = None
    """Where it lies below a local mirror; None: it ships with Python, or is the user's own."""
    origin: str = ""
    """Where to copy that file from."""
    sha256: str | None = None
    """SHA-256 that the text of that file must have, in UTF-8 with line ends as ``\\n``."""


_TEN = tuple("0123456789")
_OFFICIAL = "official"
_MNIST_SIZES = {"train": 60_000, "test": 10_000}
_CIFAR_SIZES = {"train": 50_000, "test": 10_000}

_DIGITS = Dataset(
    name="digits",
    label="scikit-learn digits",
    classes=_TEN,
    shape=(1, 8, 8),
    sizes={"train": 1437, "test": 360},
    split="36 test images per class, evenly spaced over the stored order of that class; both parts share writers",
    licence="CC BY 4.0 (UCI Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998)",
    pixel_max=16,
    sha256="f0cddbb324ce375849aacbaf8a09308bfa909711d4b8889efae15852e5426b92",
)

_PHOTOS = Dataset(
    name="photos",
    label="scikit-learn sample photos",
    classes=("china", "flower"),
    shape=(3, 427, 640),
    sizes={"train": 1, "test": 1},
    split="china.jpg is the training photo, flower.jpg the test photo",
    licence="CC BY 2.0 (china.jpg: danielbuechele; flower.jpg: vultilion)",
)

_MNIST = Dataset(
    name="mnist",
    label="MNIST",
    classes=_TEN,
    shape=(1, 28, 28),
    sizes=_MNIST_SIZES,
    split=_OFFICIAL,
    licence="MIT (as stated on its hub page)",
    hub=Hub("ylecun/mnist", "mnist", "image", "label"),
    idx_md5={
        "train_x": "6bbc9ace898e44ae57da46a324031adb",
        "train_y": "a25bea736e30d166cdddb491f175f624",
        "test_x": "2646ac647ad5339dbf082846283269ea",
        "test_y": "27ae3e4e09519cfbb04c329615203637",
    },
)

_FASHION_MNIST = Dataset(
    name="fashion_mnist",
    label="Fashion-MNIST",
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    shape=(1, 28, 28),
    sizes=_MNIST_SIZES,
    split=_OFFICIAL,
    licence="MIT",
    hub=Hub("zalando-datasets/fashion_mnist", "fashion_mnist", "image", "label"),
    idx_md5={
        "train_x": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train_y": "9018921c3c673c538a1fc5bad174d6f9",
        "test_x": "8181f5470baa50b63fa0f6fddb340f0a",
        "test_y": "15d484375f8d13e6eb1aabb0c3f46965",
    },
)

_CIFAR10 = Dataset(
    name="cifar10",
    label="CIFAR-10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    shape=(3, 32, 32),
    sizes=_CIFAR_SIZES,
    split=_OFFICIAL,
    licence="not stated by its authors",
    hub=Hub("uoft-cs/cifar10", "plain_text", "img", "label"),
)

_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""

_CIFAR100 = Dataset(
    name="cifar100",
    label="CIFAR-100",
    classes=tuple(_CIFAR100_CLASSES.split()),
    shape=(3, 32, 32),
    sizes=_CIFAR_SIZES,
    split=_OFFICIAL,
    licence="not stated by its authors",
    hub=Hub("uoft-cs/cifar100", "cifar100", "img", "fine_label"),
)

_PYTHON_DOCS = Text(
    name="python_docs",
    label="Python {version} documentation",
    licence="PSF-2.0 (Python Software Foundation)",
)

_TINY_SHAKESPEARE = Text(
    name="tinyshakespeare",
    label="tiny Shakespeare",
    licence="public domain (Shakespeare; 40,000 lines chosen by Karpathy 2015)",
    file="tinyshakespeare/input.txt",
    origin="data/tinyshakespeare in karpathy/char-rnn on GitHub",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)

_OWN_TEXT = Text(name="text", label="user's text", licence="known to the user")

CATALOGUE: dict[str, Dataset | Text] = {
    entry.name: entry
    for entry in (
        *(_DIGITS, _PHOTOS, _MNIST, _FASHION_MNIST, _CIFAR10, _CIFAR100),
        *(_PYTHON_DOCS, _TINY_SHAKESPEARE, _OWN_TEXT),
    )
}


def find(name: str) -> Dataset | Text:
    """Look a data set up by name. Raises UserError, which lists the known names."""
    try:
        return CATALOGUE[name]
    except KeyError:
        raise UserError(f'data set "{name}" is unknown; choose one of {", ".join(CATALOGUE)}') from None
