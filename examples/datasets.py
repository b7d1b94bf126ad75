"""Real data of the examples, read whole into memory: digits, mnist, cifar10, shakespeare.

Every dataset answers a list of indices with one ready batch: on a CPU that is several times cheaper
than reading sample by sample and collating.

--data-dir may hold torchvision's layout (MNIST/raw/..., cifar-10-batches-py/...) or plain files,
alone or in a folder named after the dataset: the four IDX files of MNIST (gzip or not), cifar10.npz
or cifar10_small.npz, Shakespeare's input.txt.
"""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

SEQUENCE_LENGTH = 64
TORCHVISION_CIFAR10 = "cifar-10-batches-py"
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_MD5 = "6fb458f1232090904fb40fe944165e91"
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
WHAT_A_FOLDER_MAY_HOLD = {
    "mnist": "MNIST/raw/ by torchvision, or train-images-idx3-ubyte.gz and its three companions",
    "cifar10": f"{TORCHVISION_CIFAR10}/ by torchvision, or cifar10.npz or cifar10_small.npz",
    "shakespeare": "input.txt (tiny Shakespeare)",
}


class DatasetMissingError(Exception):
    """The data is not in --data-dir and could not be downloaded; the message says what to do."""


class Images(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Labelled images, normalised per batch.

    pixels: uint8 [count, channels, height, width]; labels: int64 [count]; mean, std: one value per
    channel, on the scale where the brightest pixel is 1. With `augment`, images are shifted by up
    to 4 pixels and half of them mirrored, drawn from torch's global generator.
    """

    def __init__(
        self,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        brightest: float = 255.0,
        augment: bool = False,
    ) -> None:
        self.pixels, self.labels, self.augment = pixels, labels, augment
        self._scale = (1.0 / (brightest * torch.tensor(std))).view(-1, 1, 1)
        self._shift = (torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (images fp32 [batch, channels, height, width], labels int64 [batch])."""
        images = self.pixels[indices].float() * self._scale - self._shift
        return (_shift_and_mirror(images) if self.augment else images), self.labels[indices]


class TextWindows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows of SEQUENCE_LENGTH characters and the characters that follow each of them.

    ids: int64 [characters]. With `jitter` each window starts up to one window later, drawn from
    torch's global generator, so that epochs do not repeat the same windows.
    """

    def __init__(self, ids: torch.Tensor, jitter: bool) -> None:
        self.ids, self.jitter = ids, jitter

    def __len__(self) -> int:
        # One window is left for the jitter, one character for the last target.
        return (len(self.ids) - 1) // SEQUENCE_LENGTH - 1

    def __getitem__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (ids int64 [batch, SEQUENCE_LENGTH], next ids int64 [batch, SEQUENCE_LENGTH])."""
        starts = torch.tensor(indices) * SEQUENCE_LENGTH
        if self.jitter:
            starts = starts + torch.randint(SEQUENCE_LENGTH, starts.shape)
        windows = self.ids[starts[:, None] + torch.arange(SEQUENCE_LENGTH + 1)]
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Data:
    """Training data, held-out data, and what a model has to know about them."""

    train: Images | TextWindows
    held_out: Images | TextWindows
    held_out_name: str  # what the held-out figures are measured on, for the summary
    classes: int  # labels, or distinct characters
    image_shape: tuple[int, int, int] | None  # channels, height, width; None for text


def fetch(name: str, folder: Path) -> None:
    """Make sure that load(name, folder) will find its files, downloading them if they are absent.

    One process per machine calls this while the others wait. Raises DatasetMissingError.
    """
    if name == "digits" or _find(name, folder) is not None:
        return
    try:
        # torchvision prints one line per mirror that fails; the message below says all of it once.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            _download(name, folder)
    except (OSError, RuntimeError) as error:
        raise DatasetMissingError(
            f"{name} is not in {folder.absolute()} and could not be downloaded ({error}). "
            "Name a folder that holds it with --data-dir; "
            f"such a folder has {WHAT_A_FOLDER_MAY_HOLD[name]}."
        ) from error


def load(name: str, folder: Path) -> Data:
    """Read a dataset that fetch() has made sure of. Raises DatasetMissingError."""
    loaders: dict[str, Callable[[Path], Data]] = {
        "mnist": _load_mnist,
        "cifar10": _load_cifar10,
        "shakespeare": _load_shakespeare,
    }
    if name == "digits":
        return _load_digits()
    place = _find(name, folder)
    if place is None:
        raise DatasetMissingError(
            f"{name} is not in {folder.absolute()}; name the folder that holds it with --data-dir."
        )
    return loaders[name](place)


def _find(name: str, folder: Path) -> Path | None:
    """Return the folder or file that holds the dataset, or None."""
    if name == "mnist":
        places = [folder, folder / "mnist", folder / "MNIST" / "raw"]
        return next(
            (place for place in places if all(_idx_file(place, file) for file in MNIST_FILES)), None
        )
    if name == "cifar10":
        places = [folder / TORCHVISION_CIFAR10]
        places += [
            folder / inside / f"{stem}.npz"
            for stem in ("cifar10", "cifar10_small")
            for inside in ("", stem)
        ]
    else:
        places = [folder / "input.txt", folder / "tinyshakespeare" / "input.txt"]
    return next((place for place in places if place.exists()), None)


def _download(name: str, folder: Path) -> None:
    import torchvision

    if name == "mnist":
        torchvision.datasets.MNIST(str(folder), download=True)
    elif name == "cifar10":
        torchvision.datasets.CIFAR10(str(folder), download=True)
    else:
        torchvision.datasets.utils.download_url(
            SHAKESPEARE_URL, str(folder / "tinyshakespeare"), "input.txt", SHAKESPEARE_MD5
        )


def _load_digits() -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)  # 0..16, exact in uint8
    labels = torch.from_numpy(bunch.target).long()
    # Shuffled, because scikit-learn's order goes by writer; the same split whatever the run's seed.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1437], order[1437:]
    mean, std = (0.305,), (0.376,)
    return Data(
        Images(pixels[train], labels[train], mean, std, brightest=16),
        Images(pixels[held_out], labels[held_out], mean, std, brightest=16),
        "360 held-out digits",
        10,
        (1, 8, 8),
    )


def _load_mnist(place: Path) -> Data:
    images, labels, test_images, test_labels = (_read_idx(place, file) for file in MNIST_FILES)
    mean, std = (0.1307,), (0.3081,)
    return Data(
        Images(images.unsqueeze(1), labels.long(), mean, std),
        Images(test_images.unsqueeze(1), test_labels.long(), mean, std),
        "MNIST test split, 10,000 images",
        10,
        (1, 28, 28),
    )


def _load_cifar10(place: Path) -> Data:
    if place.name == TORCHVISION_CIFAR10:
        import torchvision

        train, test = (
            torchvision.datasets.CIFAR10(str(place.parent), train=part) for part in (True, False)
        )
        arrays = (train.data, np.array(train.targets), test.data, np.array(test.targets))
        held_out_name = "CIFAR-10 test split, 10,000 images"
    else:
        with np.load(place) as stored:
            images, labels = stored["train_images"], stored["train_labels"]
            if place.stem == "cifar10_small":
                arrays = (images, labels, stored["test_images"], stored["test_labels"])
                held_out_name = (
                    "2,000 images held out of the CIFAR-10 training split (not its test split)"
                )
            else:
                # The test images of this file went through JPEG: hold out training batch 5 instead.
                arrays = (images[:40000], labels[:40000], images[40000:], labels[40000:])
                held_out_name = (
                    "CIFAR-10 training batch 5 held out, 10,000 images (not its test split)"
                )
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    images, held_out = (
        torch.from_numpy(array).permute(0, 3, 1, 2).contiguous() for array in arrays[::2]
    )
    labels, held_out_labels = (torch.from_numpy(array.astype("int64")) for array in arrays[1::2])
    return Data(
        Images(images, labels, mean, std, augment=True),
        Images(held_out, held_out_labels, mean, std),
        held_out_name,
        10,
        (3, 32, 32),
    )


def _load_shakespeare(place: Path) -> Data:
    alphabet, ids = np.unique(np.fromfile(place, np.uint8), return_inverse=True)
    text = torch.from_numpy(ids.astype("int64"))
    split = int(0.9 * len(text))
    return Data(
        TextWindows(text[:split], jitter=True),
        TextWindows(text[split:], jitter=False),
        "last tenth of the text",
        len(alphabet),
        None,
    )


def _idx_file(folder: Path, file: str) -> Path | None:
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def _read_idx(folder: Path, file: str) -> torch.Tensor:
    """Read an IDX file: bytes 0, 0, 8 (uint8), dimensions; big-endian int32 sizes; the data."""
    path = _idx_file(folder, file)
    assert path is not None  # _find() looked for all four
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(content, ">i4", count=dimensions, offset=4)) if dimensions else ()
    if not dimensions or len(content) != 4 + 4 * dimensions + int(np.prod(shape)):
        raise DatasetMissingError(
            f"{path} is not a whole IDX file of bytes; fetch it again or name another --data-dir."
        )
    return torch.from_numpy(
        np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    )


def _shift_and_mirror(images: torch.Tensor, reach: int = 4) -> torch.Tensor:
    """Shift every image by up to `reach` pixels (zeros come in) and mirror half of them."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (reach,) * 4)
    rows = torch.randint(2 * reach + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * reach + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    samples = torch.arange(count).view(-1, 1, 1)
    # Indexing the first, third and fourth dimension moves the channels last.
    return (
        padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    )
