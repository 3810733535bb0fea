import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pad

from pcafast import data
from pcafast.data import images as images_module
from pcafast.data.augment import random_box
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


def colour_set(tmp_path, count, side=32):
    """Random images, each with its index for a label."""
    pixels = random_pixels(count, side, side, 3)
    np.savez(tmp_path / "colour.npz", images=pixels, labels=np.arange(count))
    return data.open_dataset(str(tmp_path / "colour.npz"), "train")


def same_batches(batches, expected):
    return all(
        torch.equal(part, other)
        for batch, wanted in zip(batches, expected, strict=True)
        for part, other in zip(batch, wanted, strict=True)
    )


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


@pytest.mark.parametrize("images", [None, 40])
@pytest.mark.parametrize("augment", [False, True])
def test_a_pass_can_be_had_again_in_another_process(tmp_path, images, augment):
    dataset = colour_set(tmp_path, 100)

    def fresh():
        return data.loader(dataset, batch_size=30, shuffle=True, seed=3, images=images, augment=augment)

    unbroken = fresh()
    passes = [list(unbroken) for _ in range(4)]
    begun = fresh()
    next(iter(begun))  # counts as a pass, although it was not finished
    assert same_batches(begun, passes[1])
    resumed = fresh()
    resumed.set_epoch(2)
    assert same_batches(resumed, passes[2])
    assert same_batches(resumed, passes[3])
    resumed.set_epoch(0)
    assert same_batches(resumed, passes[0])
    assert len({tuple(labels_of(batches)) for batches in passes}) == 4


def test_passes_at_once_do_not_disturb_each_other(tmp_path):
    dataset = colour_set(tmp_path, 60)
    batches = data.loader(dataset, batch_size=20, shuffle=True, augment=True)
    expected = [list(batches), list(batches)]
    batches.set_epoch(0)
    interleaved = list(zip(batches, batches, strict=True))
    assert same_batches([first for first, _ in interleaved], expected[0])
    assert same_batches([second for _, second in interleaved], expected[1])


def test_length_is_the_number_of_batches(tmp_path):
    dataset = identity_set(tmp_path)
    for batch_size, images in ((30, None), (25, None), (1, 7), (200, 100)):
        batches = data.loader(dataset, batch_size=batch_size, images=images)
        assert len(batches) == len(list(batches))


def test_batches_lie_on_the_device(tmp_path, device, monkeypatch):
    datasets = [colour_set(tmp_path, 64), data.open_dataset("digits", "test")]
    write_images(tmp_path / "tree" / "a", random_pixels(4, 20, 30, 3))
    datasets.append(data.open_dataset(str(tmp_path / "tree"), "train", image_size=16))
    for limit in (images_module._KEPT_ON_DEVICE, 0):
        monkeypatch.setattr(images_module, "_KEPT_ON_DEVICE", limit)
        for dataset in datasets:
            for augment in (False, True):
                there = list(data.loader(dataset, batch_size=3, shuffle=True, augment=augment, device=device))
                assert {part.device.type for batch in there for part in batch} == {device.type}
                here = data.loader(dataset, batch_size=3, shuffle=True, augment=augment)
                # The same pixels; a device may round otherwise when they are normalised.
                for batch, (images, labels) in zip(there, here, strict=True):
                    torch.testing.assert_close(batch[0].cpu(), images, rtol=1e-6, atol=1e-6)
                    assert torch.equal(batch[1].cpu(), labels)


def test_a_data_set_stays_where_it_was_when_a_loader_moves_it(tmp_path):
    dataset = colour_set(tmp_path, 4)
    moved = dataset.to(torch.device("meta"))
    assert next(iter(data.loader(dataset, batch_size=4)))[0].device.type == "cpu"
    for augment in (None, torch.Generator()):
        assert {part.device.type for part in moved.batch(torch.arange(4), augment)} == {"meta"}


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
    list(data.loader(colour_set(tmp_path, 50), batch_size=30, shuffle=True, images=40, augment=True))
    write_images(tmp_path / "tree" / "a", random_pixels(2, 20, 30, 3))
    list(data.loader(data.open_dataset(str(tmp_path / "tree"), "train"), batch_size=2, augment=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 8, "seed": -1}, r"seed must lie in 0\.\.2\*\*64 - 1, got -1"),
        ({"batch_size": 8, "seed": 2**64}, r"seed must lie in 0\.\.2\*\*64 - 1, got 18446744073709551616"),
        ({"batch_size": 8, "images": 0}, r"images must lie in 1\.\.360, the size of digits, got 0"),
        ({"batch_size": 8, "images": 361}, r"images must lie in 1\.\.360, the size of digits, got 361"),
    ],
)
def test_loader_arguments(options, message):
    with pytest.raises(ArgumentError, match=message):
        data.loader(data.open_dataset("digits", "test"), **options)


def test_epochs_count_from_zero():
    batches = data.loader(data.open_dataset("digits", "test"), batch_size=8)
    with pytest.raises(ArgumentError, match="epoch must be at least 0, got -1"):
        batches.set_epoch(-1)


# Augmentation


def placements(dataset, pixels, margins, copies):
    """For each augmented copy of each image, which crop of its padded pixels it is: (image, top, left, mirrored).

    The crops are torchvision's, of the raw pixels, normalised by the data set itself.
    """
    height, width = dataset.shape[1:]
    candidates = {}
    for index, image in enumerate(pixels):
        padded = pad(torch.from_numpy(image).permute(2, 0, 1), [margins[1], margins[0]])
        for top in range(2 * margins[0] + 1):
            for left in range(2 * margins[1] + 1):
                crop = padded[:, top : top + height, left : left + width]
                candidates[crop.numpy().tobytes()] = (index, top, left, False)
                candidates[crop.flip(2).numpy().tobytes()] = (index, top, left, True)
    batches = data.loader(dataset, batch_size=7, shuffle=True, augment=True)
    found = []
    for _ in range(copies):
        for images, labels in batches:
            assert images.dtype == torch.float32
            assert images.is_contiguous()
            raw = ((images * dataset._std + dataset._mean) * 255).round().to(torch.uint8)
            found += [candidates[image.numpy().tobytes()] for image in raw]
            assert [place[0] for place in found[-len(labels) :]] == labels.tolist()
    return found


@pytest.mark.parametrize("stored", ["uint8", "float"])
def test_colour_images_are_shifted_by_an_eighth_and_mirrored(tmp_path, stored):
    pixels = random_pixels(20, 32, 24, 3)
    images = pixels if stored == "uint8" else pixels / 255
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(20))
    dataset = data.open_dataset(str(tmp_path / "set.npz"), "train")
    found = placements(dataset, pixels, margins=(4, 3), copies=100)
    for part, values in ((1, 9), (2, 7), (3, 2)):
        counts = np.bincount([place[part] for place in found], minlength=values)
        # Each within five standard deviations of what is even.
        assert np.abs(counts - 2000 / values).max() < 5 * np.sqrt(2000 / values)
    # The four are drawn independently of one another.
    assert np.abs(np.triu(np.corrcoef(np.array(found, dtype=float).T), 1)).max() < 5 / np.sqrt(2000)


@pytest.mark.parametrize(("side", "margin"), [(28, 3), (8, 1), (4, 1)])
def test_grey_images_are_shifted_but_not_mirrored(tmp_path, side, margin):
    pixels = random_pixels(20, side, side, 1)
    np.savez(tmp_path / "set.npz", images=pixels[..., 0], labels=np.arange(20))
    dataset = data.open_dataset(str(tmp_path / "set.npz"), "train")
    found = placements(dataset, pixels, (margin, margin), copies=20)
    assert {place[1] for place in found} == {place[2] for place in found} == set(range(2 * margin + 1))
    assert not any(place[3] for place in found)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (64, 64), (40, 31)])
def test_random_boxes_are_distributed_as_torchvisions(height, width):
    generator = torch.Generator().manual_seed(0)
    ours = np.array([random_box(height, width, generator) for _ in range(3000)], dtype=float)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)], dtype=float
    )
    for box in (ours, theirs):
        assert (box[:, :2] >= 0).all()
        assert (box[:, :2] + box[:, 2:] <= (height, width)).all()

    def quantities(boxes):
        top, left, rows, columns = boxes.T
        return rows * columns / (height * width), np.log(columns / rows), top / height, left / width

    for our, their in zip(quantities(ours), quantities(theirs), strict=True):
        # Kolmogorov-Smirnov at 1 in 100,000.
        grid = np.unique(np.concatenate([our, their]))
        gap = np.searchsorted(np.sort(our), grid, "right") - np.searchsorted(np.sort(their), grid, "right")
        assert np.abs(gap).max() / 3000 < np.sqrt(-np.log(1e-5 / 2) / 2 * 2 / 3000)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(1000, 12, (492, 0, 16, 12)), (12, 1000, (0, 492, 12, 16)), (1, 1, (0, 0, 1, 1)), (1, 900, (0, 449, 1, 1))],
)
def test_random_box_of_a_long_image_is_its_middle(height, width, box):
    # No crop that is allowed has 8 % of such an area, except by rounding.
    assert random_box(height, width, torch.Generator().manual_seed(0)) == box


def test_image_files_are_cropped_resized_and_mirrored(tmp_path):
    """The colours of a slope tell where the crop was: red rises to the right, green downwards."""
    rows, columns = np.mgrid[0:100, 0:120].astype(np.uint8)
    write_images(tmp_path / "a", [np.stack([2 * columns, 2 * rows, 0 * rows], 2)])
    dataset = data.open_dataset(str(tmp_path), "train", image_size=16)
    batches = data.loader(dataset, batch_size=1, augment=True)
    images = torch.cat([images for _ in range(300) for images, _ in batches])
    assert images.shape == (300, 3, 16, 16)
    red, green, blue = ((images * dataset._std + dataset._mean) * 255).round().unbind(1)
    assert (blue == 0).all()
    mirrored = red[:, 8, 0] > red[:, 8, 15]
    assert 0.35 < mirrored.float().mean() < 0.65
    steps_right = (red[:, 8, 12] - red[:, 8, 4]).abs() / 2 / 8  # pixels of the file per pixel
    steps_down = (green[:, 12, 8] - green[:, 4, 8]) / 2 / 8
    shares = (16 * steps_right) * (16 * steps_down) / (100 * 120)
    assert 0.07 < shares.min() < 0.15
    assert 0.85 < shares.max() < 1.05
    sides = steps_right / steps_down
    assert 0.70 < sides.min() < 0.85
    assert 1.2 < sides.max() < 1.43
    again = data.loader(dataset, batch_size=1, augment=True)
    assert torch.equal(next(iter(again))[0][0], images[0])
