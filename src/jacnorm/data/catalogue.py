"""The named data sets: where each comes from, what it must look like, and what to call it. Cheap to import.

To add a data set, add one entry to `CATALOGUE` (and its name to `Name`); images in Parquet on the Hugging Face hub,
digits blended with photos and texts in a mirror need nothing else, an embedded set needs one function in
`jacnorm.data.embedded` or `texts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jacnorm.errors import UserError

Name = Literal[
    "digits",
    "photos",
    "digits_m",
    "mnist",
    "fashion_mnist",
    "mnist_m",
    "cifar10",
    "cifar100",
    "svhn",
    "domainnet_clipart",
    "domainnet_infograph",
    "domainnet_painting",
    "domainnet_quickdraw",
    "domainnet_real",
    "domainnet_sketch",
    "python_docs",
    "tinyshakespeare",
    "text",
]
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Hub:
    """A place on the Hugging Face hub whose Parquet files hold encoded images and integer labels.

    A local mirror has the same layout: ``<mirror>/<id>/<folder>/<split>-00000-of-00001.parquet``.
    """

    id: str
    config: str
    image: str
    """Column of the encoded images: a struct with the field `bytes`."""
    label: str
    """Column of the class numbers."""
    revision: str = "main"
    """Branch asked for. Not a fixed commit: the commit read is recorded, and it is the content that is checked."""
    subfolder: str | None = None
    """Folder of the files, if it is not called as the configuration is."""
    only: tuple[str, int] | None = None
    """Column of integers and the value of it that rows of this data set have; None takes all rows."""

    @property
    def folder(self) -> str:
        """Folder of the Parquet files."""
        return self.subfolder or self.config


@dataclass(frozen=True)
class Blend:
    """Digits on photos, as MNIST-M was made from MNIST (Ganin et al. 2016, JMLR 17(59), section 5.2.1).

    Each digit, in three equal channels of 0 .. 255, is laid over a random patch of a photo by the absolute difference
    of the two. Training digits get patches of training photos, test digits of test photos.
    """

    digits: Literal["digits", "mnist"]
    photos: Literal["photos", "bsds500"]
    """The sample photos of scikit-learn; or a folder of photos (`jacnorm.data.photos`)."""


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
    blend: Blend | None = None
    """How the data are made of others; with neither this nor `hub`, they ship inside scikit-learn."""
    resized: bool = False
    """The stored images have any size and colours; each is brought to `shape`, whatever its own proportions."""
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

_DIGITS_M = Dataset(
    name="digits_m",
    label="digits-M (made here)",
    classes=_TEN,
    shape=(3, 8, 8),
    sizes=_DIGITS.sizes,
    split=f"digits: {_DIGITS.split}; training digits lie on patches of china.jpg, test digits on patches of flower.jpg",
    licence=f"{_DIGITS.licence}; {_PHOTOS.licence}",
    blend=Blend("digits", "photos"),
)

_MNIST_M = Dataset(
    name="mnist_m",
    label="MNIST-M (made here from {photos})",
    classes=_TEN,
    shape=(3, 28, 28),
    sizes=_MNIST_SIZES,
    split="digits: official; the first four fifths of the photos by name lie under training digits, the others under "
    "test digits",
    licence=f"{_MNIST.licence}; BSDS500: research use only; photos of the user's: known to the user",
    blend=Blend("mnist", "bsds500"),
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

_SVHN = Dataset(
    name="svhn",
    label="SVHN",
    classes=_TEN,
    shape=(3, 32, 32),
    sizes={"train": 73_257, "test": 26_032},
    split=_OFFICIAL,
    licence="non-commercial use (Netzer et al. 2011)",
    hub=Hub("ufldl-stanford/svhn", "cropped_digits", "image", "label"),
)

_DOMAINNET_SIZES = {  # of the cleaned version; no two are equal, so that a wrong domain is noticed
    "clipart": (33_525, 14_604),
    "infograph": (36_023, 15_582),
    "painting": (50_416, 21_850),
    "quickdraw": (120_750, 51_750),
    "real": (120_906, 52_041),
    "sketch": (48_212, 20_916),
}

_DOMAINNET = [
    Dataset(
        name=f"domainnet_{domain}",
        label=f"DomainNet {domain}, resized to 64 x 64",
        classes=tuple(map(str, range(345))),
        shape=(3, 64, 64),
        sizes={"train": train, "test": test},
        split=_OFFICIAL,
        licence="research use (DomainNet, Peng et al. 2019)",
        hub=Hub("wltjr1007/DomainNet", "default", "image", "label", subfolder="data", only=("domain", number)),
        resized=True,
    )
    for number, (domain, (train, test)) in enumerate(_DOMAINNET_SIZES.items())
]

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
        *(_DIGITS, _PHOTOS, _DIGITS_M, _MNIST, _FASHION_MNIST, _MNIST_M, _CIFAR10, _CIFAR100, _SVHN, *_DOMAINNET),
        *(_PYTHON_DOCS, _TINY_SHAKESPEARE, _OWN_TEXT),
    )
}


def find(name: str) -> Dataset | Text:
    """Look a data set up by name. Raises UserError, which lists the known names."""
    try:
        return CATALOGUE[name]
    except KeyError:
        raise UserError(f'data set "{name}" is unknown; choose one of {", ".join(CATALOGUE)}') from None
