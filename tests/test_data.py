import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from pcafast import data
from pcafast.errors import ArgumentError, FileError

RNG = np.random.default_rng(0)


def everything(dataset):
    images, labels = next(iter(data.loader(dataset, batch_size=len(dataset))))
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert images.shape == (len(dataset), *dataset.shape)
    assert labels.dtype == torch.int64
    return images.double().numpy(), labels.numpy()


def normalised_rgb(pixels):
    """From uint8 (N, H, W, 3) to (N, 3, H, W)."""
    scaled = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return scaled.transpose(0, 3, 1, 2)


def random_pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


# Digits


def test_digits_are_split_evenly_within_classes_and_nothing_is_lost():
    digits = load_digits()
    train, test = (data.open_dataset("digits", split) for split in ("train", "test"))
    assert (train.name, train.shape, train.num_classes) == ("digits", (1, 8, 8), 10)
    (train_images, train_labels), (test_images, test_labels) = everything(train), everything(test)
    share = np.bincount(test_labels) / np.bincount(digits.target)
    assert share == pytest.approx(0.2, abs=0.01)

    def rows(images, labels):
        return sorted(map(tuple, np.column_stack([images.reshape(len(images), -1), labels])))

    images = np.concatenate([train_images, test_images])
    labels = np.concatenate([train_labels, test_labels])
    assert rows((images * 0.5 + 0.5) * 16, labels) == rows(digits.images, digits.target)


# .npz


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 3, 1)])
def test_npz_of_grey_images(tmp_path, shape):
    pixels = random_pixels(*shape)
    np.savez(tmp_path / "grey.npz", images=pixels, labels=np.array([0, 1, 0, 3, 1], dtype=np.uint8))
    dataset = data.open_dataset(str(tmp_path / "grey.npz"), "test")
    assert (dataset.name, dataset.shape, dataset.num_classes) == ("grey.npz", (1, 4, 3), 4)
    images, labels = everything(dataset)
    assert images == pytest.approx((pixels.reshape(5, 1, 4, 3) / 255 - 0.5) / 0.5, abs=1e-6)
    assert labels.tolist() == [0, 1, 0, 3, 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_npz_of_rgb_images(tmp_path, dtype):
    pixels = random_pixels(5, 4, 6, 3)
    stored = pixels if dtype == np.uint8 else (pixels / 255).astype(dtype)
    np.savez_compressed(tmp_path / "rgb.npz", images=stored, labels=np.arange(5))
    images, _ = everything(data.open_dataset(str(tmp_path / "rgb.npz"), "test"))
    assert images == pytest.approx(normalised_rgb(pixels), abs=5e-3 if dtype == np.float16 else 1e-6)


def test_single_image_and_its_label(tmp_path):
    np.savez(tmp_path / "rgb.npz", images=random_pixels(5, 4, 6, 3), labels=np.arange(5))
    dataset = data.open_dataset(str(tmp_path / "rgb.npz"), "test")
    image, label = dataset[3]
    assert np.array_equal(image.numpy(), everything(dataset)[0][3])
    assert label == 3


def test_split_in_the_path(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        np.savez(tmp_path / f"set-{split}.npz", images=random_pixels(count, 4, 4), labels=np.zeros(count, int))
    spec = str(tmp_path / "set-{split}.npz")
    assert [len(data.open_dataset(spec, split)) for split in ("train", "test")] == [3, 2]


GOOD = {"images": np.zeros((3, 4, 4), np.uint8), "labels": np.arange(3)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": np.zeros((3, 4), np.uint8)}, r"images must have the shape \(N, H, W\).*got \(3, 4\)"),
        ({"images": np.zeros((3, 3, 4, 4), np.uint8)}, r"\(N, H, W, 3\), got \(3, 3, 4, 4\)"),
        ({"images": np.zeros((3, 4, 4), np.int64)}, "images must be uint8 or floats in 0..1, got int64"),
        ({"images": np.full((3, 4, 4), 255.0)}, "floats must lie in 0..1, got 255.0 to 255.0"),
        ({"images": np.full((3, 4, 4), np.nan)}, "floats must lie in 0..1, got nan"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.arange(0)}, r"is empty.*\(0, 4, 4\)"),
        ({"labels": np.arange(2)}, r"labels must have the shape \(3,\), one per image, got \(2,\)"),
        ({"labels": np.zeros((3, 1), int)}, r"one per image, got \(3, 1\)"),
        ({"labels": np.array([0.0, 1.0, 2.0])}, "labels must be integers from 0 on, got float64"),
        ({"labels": np.array([0, -1, 2])}, "labels out of range: expected 0 and up, got -1 to 2"),
        ({"labels": np.array([0, None, 2])}, "cannot read .*no .npz file of numbers"),
    ],
)
def test_npz_with_wrong_arrays(tmp_path, changed, message):
    np.savez(tmp_path / "bad.npz", **(GOOD | changed))
    with pytest.raises(FileError, match=message):
        data.open_dataset(str(tmp_path / "bad.npz"), "test")


def test_npz_without_labels(tmp_path):
    np.savez(tmp_path / "bad.npz", images=GOOD["images"], targets=GOOD["labels"])
    with pytest.raises(FileError, match="must hold the arrays images and labels, but holds images, targets"):
        data.open_dataset(str(tmp_path / "bad.npz"), "test")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_truncated_npz(tmp_path, save, share):
    path = tmp_path / "cut.npz"
    save(path, images=random_pixels(9, 8, 8, 3), labels=np.arange(9))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FileError, match=r"cannot read .*truncated"):
        data.open_dataset(str(path), "test")


def test_files_of_another_kind(tmp_path):
    (tmp_path / "text.npz").write_text("hello world")
    np.save(tmp_path / "array.npy", GOOD["images"])
    for name in ("text.npz", "array.npy"):
        with pytest.raises(FileError, match=r"cannot read .*no .npz file"):
            data.open_dataset(str(tmp_path / name), "test")


# torchvision's folders


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path):
    """Twelve training and seven test images; returns (root, test images, test labels)."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 12), ("t10k", 7)):
        images, labels = random_pixels(count, 28, 28), np.arange(count) % 5
        write_idx(raw / f"{stem}-images-idx3-ubyte", images)
        write_idx(raw / f"{stem}-labels-idx1-ubyte", labels)
    return tmp_path, images, labels


def test_mnist_folder(mnist):
    root, pixels, expected = mnist
    assert len(data.open_dataset(str(root), "train")) == 12
    dataset = data.open_dataset(str(root), "test")
    assert (dataset.name, dataset.shape, dataset.num_classes) == ("MNIST", (1, 28, 28), 10)
    images, labels = everything(dataset)
    assert images == pytest.approx((pixels[:, None] / 255 - 0.1307) / 0.3081, abs=1e-6)
    assert labels.tolist() == expected.tolist()


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_truncated_mnist(mnist, kind, share):
    path = mnist[0] / "MNIST" / "raw" / f"t10k-{kind}-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FileError, match=r"cannot read .*raw: a file is missing or truncated"):
        data.open_dataset(str(mnist[0]), "test")


def test_mnist_with_labels_of_another_split(mnist):
    raw = mnist[0] / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").write_bytes((raw / "train-labels-idx1-ubyte").read_bytes())
    with pytest.raises(FileError, match=r"labels must have the shape \(7,\), one per image, got \(12,\)"):
        data.open_dataset(str(mnist[0]), "test")


def test_mnist_labels_out_of_range(mnist):
    write_idx(mnist[0] / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", np.arange(7) + 4)
    with pytest.raises(FileError, match="labels out of range: expected 0 to 9, got 4 to 10"):
        data.open_dataset(str(mnist[0]), "test")


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """One training batch and one test batch whose checksums torchvision is told to expect."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    pixels = random_pixels(4, 3, 32, 32)
    train = write("data_batch_1", {"data": random_pixels(6, 3072), "labels": [0] * 6})
    test = write("test_batch", {"data": pixels.reshape(4, 3072), "labels": [3, 1, 0, 2]})
    name, checksum = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", [train])
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    return tmp_path, pixels


def test_cifar10_folder(cifar10):
    root, pixels = cifar10
    assert len(data.open_dataset(str(root), "train")) == 6
    dataset = data.open_dataset(str(root), "test")
    assert (dataset.shape, dataset.num_classes) == ((3, 32, 32), 10)
    images, labels = everything(dataset)
    assert images == pytest.approx(normalised_rgb(pixels.transpose(0, 2, 3, 1)), abs=1e-6)
    assert labels.tolist() == [3, 1, 0, 2]


class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path("code-has-run"),)


def test_cifar10_pickles_other_than_the_originals_are_not_opened(cifar10, monkeypatch):
    root, _ = cifar10
    monkeypatch.chdir(root)
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(FileError, match=r"cannot read .*cifar-10-batches-py"):
        data.open_dataset(str(root), "test")
    assert not Path("code-has-run").exists()


# Trees of image files


def write_images(folder, images):
    folder.mkdir(parents=True)
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_with_splits(tmp_path, test_name):
    cats, dogs = random_pixels(2, 6, 5, 3), random_pixels(1, 6, 5, 3)
    for split, kinds in (("train", [dogs, cats]), (test_name, [cats, dogs])):
        for kind, images in zip(("cat", "dog"), kinds, strict=True):
            write_images(tmp_path / "pets" / split / kind, images)
    root = str(tmp_path / "pets")
    assert everything(data.open_dataset(root, "train"))[1].tolist() == [0, 1, 1]
    dataset = data.open_dataset(root, "test")
    assert (dataset.name, dataset.shape, dataset.num_classes) == ("pets", (3, 6, 5), 2)
    images, labels = everything(dataset)
    assert images == pytest.approx(normalised_rgb(np.concatenate([cats, dogs])), abs=1e-6)
    assert labels.tolist() == [0, 0, 1]


def test_folder_without_splits_serves_as_both(tmp_path):
    write_images(tmp_path / "cat", random_pixels(2, 6, 5))
    write_images(tmp_path / "dog", random_pixels(1, 6, 5))
    for split in ("train", "test"):
        images, labels = everything(data.open_dataset(str(tmp_path), split))
        assert labels.tolist() == [0, 0, 1]
        assert images.shape[1] == 3


def test_image_size_resizes_the_shorter_side_then_crops_the_centre(tmp_path):
    tall = random_pixels(64, 32, 3)
    write_images(tmp_path / "a", [tall, np.full((90, 120, 3), 51, np.uint8)])
    dataset = data.open_dataset(str(tmp_path), "test", image_size=28)
    assert dataset.shape == (3, 28, 28)
    images, _ = everything(dataset)
    # 32 = 28 * 256 / 224: the first image is only cropped.
    expected = [tall[18:46, 2:30], np.full((28, 28, 3), 51)]
    assert images == pytest.approx(normalised_rgb(np.stack(expected)), abs=1e-6)


def test_images_of_several_sizes_need_image_size(tmp_path):
    write_images(tmp_path / "a", [random_pixels(6, 5, 3), random_pixels(4, 7, 3)])
    with pytest.raises(ArgumentError, match=r"image_size is required.*0.png is 5x6, .*1.png is 7x4"):
        data.open_dataset(str(tmp_path), "test")


def test_folder_errors(tmp_path):
    with pytest.raises(FileError, match="one folder per class"):
        data.open_dataset(str(tmp_path), "test")
    write_images(tmp_path / "train" / "cat", random_pixels(1, 4, 4))
    with pytest.raises(FileError, match="has the folder train but not val"):
        data.open_dataset(str(tmp_path), "test")
    write_images(tmp_path / "val" / "cat", random_pixels(1, 4, 4))
    (tmp_path / "val" / "bird").mkdir()
    for split in ("train", "test"):
        with pytest.raises(FileError, match="same class folders, but only one of them has bird"):
            data.open_dataset(str(tmp_path), split)
    (tmp_path / "train" / "bird").mkdir()
    with pytest.raises(FileError, match=r"images in each, but: .*bird"):
        data.open_dataset(str(tmp_path), "test")


@pytest.mark.parametrize("share", [0, 0.5])
def test_damaged_image(tmp_path, share):
    write_images(tmp_path / "a", random_pixels(2, 40, 40, 3))
    path = tmp_path / "a" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FileError, match=r"cannot read the image .*1.png: truncated or not an image"):
        everything(data.open_dataset(str(tmp_path), "test"))


# Arguments


@pytest.mark.parametrize(
    ("spec", "split", "size", "error", "message"),
    [
        ("digits", "validation", None, ArgumentError, "split must be 'train' or 'test', got 'validation'"),
        ("digits", "test", 0, ArgumentError, "image_size must be at least 1, got 0"),
        ("digits", "test", 32, ArgumentError, "image_size is for trees of image files only"),
        (
            "nowhere/{split}.npz",
            "test",
            None,
            FileError,
            "no data set nowhere/test.npz exists: expected 'digits'",
        ),
    ],
)
def test_wrong_arguments(spec, split, size, error, message):
    with pytest.raises(error, match=message):
        data.open_dataset(spec, split, image_size=size)


# Batches


def labels_of(batches):
    return torch.cat([labels for _, labels in batches]).tolist()


def identity_set(tmp_path, count=100):
    """Each image's label is its index, which its only pixel shows as well."""
    np.savez(tmp_path / "set.npz", images=np.arange(count, dtype=np.uint8)[:, None, None], labels=np.arange(count))
    return data.open_dataset(str(tmp_path / "set.npz"), "test")


def test_loader_keeps_the_order_and_the_last_batch(tmp_path):
    batches = list(data.loader(identity_set(tmp_path), batch_size=30))
    assert [len(labels) for _, labels in batches] == [30, 30, 30, 10]
    assert labels_of(batches) == list(range(100))


@pytest.mark.parametrize("images", [None, 40])
def test_shuffled_passes_differ_but_repeat_with_the_seed(tmp_path, images):
    dataset = identity_set(tmp_path)

    def passes(seed):
        batches = data.loader(dataset, batch_size=30, shuffle=True, seed=seed, images=images)
        return [labels_of(batches), labels_of(batches)]

    first, second = passes(0)
    assert first != second
    assert sorted(first) == sorted(second)
    assert passes(0) == [first, second]
    assert passes(1)[0] != first


def test_a_subset_is_drawn_at_random_once(tmp_path):
    dataset = identity_set(tmp_path)
    drawn = labels_of(data.loader(dataset, batch_size=7, images=40))
    assert drawn == labels_of(data.loader(dataset, batch_size=64, images=40))
    assert drawn != labels_of(data.loader(dataset, batch_size=7, images=40, seed=1))
    assert len(set(drawn)) == 40
    assert min(drawn) < 20
    assert max(drawn) >= 80
    assert drawn != sorted(drawn)


def test_images_stay_with_their_labels(tmp_path):
    for images, labels in data.loader(identity_set(tmp_path), batch_size=9, shuffle=True, images=50):
        assert torch.equal(((images.flatten() * 0.5 + 0.5) * 255).round().long(), labels)


def test_loader_leaves_torchs_generator_alone(tmp_path):
    before = torch.get_rng_state()
    list(data.loader(identity_set(tmp_path), batch_size=30, shuffle=True, images=40))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 8, "images": 0}, r"images must lie in 1\.\.360, the size of digits, got 0"),
        ({"batch_size": 8, "images": 361}, r"images must lie in 1\.\.360, the size of digits, got 361"),
    ],
)
def test_loader_arguments(options, message):
    with pytest.raises(ArgumentError, match=message):
        data.loader(data.open_dataset("digits", "test"), **options)
