"""Readers: every layout from files the test writes, and every way a file can be wrong."""

import gzip
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tnlayers.main_job.data import DataError, Dataset, load_data
from tnlayers.main_job.readers import read_idx

SHARED = Path(__file__).resolve().parents[1] / "../shared/data"


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    head = (2048 + array.ndim if magic is None else magic).to_bytes(4, "big")
    return head + np.asarray(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, *, packed: bool = False, dash: str = "-", **changed: bytes) -> Path:
    """Four idx files of 30 training and 20 test images of 9 x 8 pixels; `changed` replaces the bytes of a file."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 30), ("t10k", 20)):
        content = {
            "images": idx(rng.integers(0, 256, (count, 9, 8))),
            "labels": idx(np.arange(count) % 10),
        }
        for kind, dims in (("images", 3), ("labels", 1)):
            data = changed.get(f"{part}_{kind}", content[kind])
            name = f"{part}-{kind}{dash}idx{dims}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)
    return folder


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def check(data: Dataset, train: int, test: int, shape: tuple[int, int, int], classes: int) -> None:
    assert tuple(data.train_x.shape) == (train, *shape)
    assert tuple(data.test_x.shape) == (test, *shape)
    assert data.shape == shape
    assert data.train_x.dtype == data.test_x.dtype == torch.float32
    assert data.train_y.dtype == data.test_y.dtype == torch.int64
    assert len(data.train_y) == train
    assert len(data.test_y) == test
    assert len(data.classes) == classes
    torch.testing.assert_close(data.train_x.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x.std((0, 2, 3), correction=0), torch.ones(shape[0]), atol=1e-5, rtol=0)


# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits_split_is_fixed_and_balanced():
    data, again = load_data("digits"), load_data("digits", seed=5)
    check(data, 1350, 447, (1, 8, 8), 10)
    assert torch.equal(data.test_x, again.test_x)
    counts = data.test_y.bincount()
    assert counts.max() - counts.min() <= 3
    everything = torch.cat([data.train_x, data.test_x]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # no image is in both parts


def test_limit_is_balanced_and_seeded():
    data = load_data("digits", limit=50)
    check(data, 50, 50, (1, 8, 8), 10)
    assert data.train_y.bincount(minlength=10).min() >= 3
    assert torch.equal(data.train_x, load_data("digits", limit=50).train_x)
    assert not torch.equal(data.train_y, load_data("digits", limit=50, seed=1).train_y)
    assert len(load_data("digits", limit=10**6).train_y) == 1350


@pytest.mark.parametrize(
    ("spec", "options", "part"),
    [
        ("nothing", {}, "expected one of digits, mnist:PATH"),
        ("mnist", {}, "expected mnist:PATH"),
        ("mnist:", {}, "expected mnist:PATH"),
        ("digits:/tmp", {}, "expected digits"),
        ("digits", {"limit": 3}, "at least 10"),
        ("digits", {"size": 8}, "imagefolder alone"),
    ],
)
def test_bad_specs(spec, options, part):
    with pytest.raises(DataError) as error:
        load_data(spec, **options)
    one_line(error, part)


# -- idx ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dash", ["-", "."])
def test_mnist_files(tmp_path, packed, dash):
    data = load_data(f"mnist:{write_mnist(tmp_path, packed=packed, dash=dash)}")
    check(data, 30, 20, (1, 9, 8), 10)
    raw = read_idx(next(tmp_path.glob("train-images*")), "images").astype(np.float32)
    expected = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(data.train_x[:, 0].numpy(), expected, atol=1e-5)
    assert data.train_y.tolist() == [k % 10 for k in range(30)]


def test_fashion_mnist_has_names_and_torchvision_folders(tmp_path):
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    assert load_data(f"fashion-mnist:{tmp_path}").classes[9] == "boot"


SMALL_IMAGES = np.zeros((30, 9, 8))
LIAR = (2051).to_bytes(4, "big") + np.asarray([2**31, 2**20, 2**10], ">u4").tobytes()


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"train_images": idx(SMALL_IMAGES)[:-7]}, ["train-images-idx3-ubyte", "(30, 9, 8)", "cut short"]),
        ({"train_images": idx(SMALL_IMAGES) + b"x"}, ["train-images", "left over"]),
        ({"train_images": idx(SMALL_IMAGES, magic=1234)}, ["train-images", "magic = 2051", "magic = 1234"]),
        ({"train_images": b""}, ["train-images", "magic = 2051"]),
        ({"train_images": idx(SMALL_IMAGES)[:9]}, ["train-images", "header of 16 bytes, got 9"]),
        ({"train_images": LIAR}, ["train-images", "2147483648"]),
        ({"train_images": idx(np.zeros((0, 9, 8)))}, ["train-images", "sizes >= 1", "(0, 9, 8)"]),
        ({"train_labels": idx(SMALL_IMAGES)}, ["train-labels", "is a file of images", "swapped"]),
        ({"train_images": idx(np.zeros(30))}, ["train-images", "is a file of labels", "swapped"]),
        ({"train_labels": idx(np.zeros(29))}, ["train-labels", "expected 30 labels", "got 29"]),
        ({"t10k_labels": idx(np.full(20, 10))}, ["t10k-labels", "0..9", "got 10 at row 0"]),
        ({"t10k_images": idx(np.zeros((20, 8, 8)))}, ["(9, 8)", "(8, 8)"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_broken_idx_files(tmp_path, changed, parts, packed):
    write_mnist(tmp_path, packed=packed, **changed)
    with pytest.raises(DataError) as error:
        load_data(f"mnist:{tmp_path}")
    one_line(error, *parts)


@pytest.mark.parametrize("damage", ["cut", "flip", "header"])
def test_corrupt_gzip(tmp_path, damage):
    write_mnist(tmp_path, packed=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[len(data) // 2] ^= 0xFF
    else:
        data[3] = 0xFF
    file.write_bytes(bytes(data))
    with pytest.raises(DataError) as error:
        load_data(f"mnist:{tmp_path}")
    one_line(error, "train-images-idx3-ubyte.gz")


def test_missing_idx_files(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError) as error:
        load_data(f"mnist:{tmp_path}")
    one_line(error, str(tmp_path), "t10k-labels-idx1-ubyte")
    with pytest.raises(DataError) as error:
        load_data(f"mnist:{tmp_path / 'nowhere'}")
    one_line(error, "does not exist")
    with pytest.raises(DataError) as error:
        load_data(f"mnist:{tmp_path / 'train-labels-idx1-ubyte'}")
    one_line(error, "got a file")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").chmod(0)
    with pytest.raises(DataError, match="train-labels"):
        load_data(f"mnist:{tmp_path}")


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------


def jpegs(count: int, side: int = 32) -> list[bytes]:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        out = io.BytesIO()
        image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(out, "JPEG")
        found.append(out.getvalue())
    return found


def write_npz(folder: Path, part: str, count: int, *, side: int = 32, **changed) -> Path:
    pictures = jpegs(count, side)
    arrays = {
        "jpeg": np.frombuffer(b"".join(pictures), np.uint8),
        "offset": np.cumsum([0, *map(len, pictures)]),
        "label": (np.arange(count) % 10).astype(np.uint8),
        "classes": np.asarray([f"class{k}" for k in range(10)]),
        **changed,
    }
    file = folder / f"cifar10_{part}_jpeg.npz"
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file


def test_cifar_npz(tmp_path):
    train = write_npz(tmp_path, "train", 20)
    write_npz(tmp_path, "test", 10)
    seen = []
    data = load_data(f"cifar10:{tmp_path}", progress=lambda *event: seen.append(event))
    check(data, 20, 10, (3, 32, 32), 10)
    assert data.classes[0] == "class0"
    assert [event[1:] for event in seen] == [(20, 20), (10, 10)]
    assert torch.equal(load_data(f"cifar10:{train}").train_x, data.train_x)
    assert len(load_data(f"cifar10:{tmp_path}", limit=10).train_x) == 10


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"jpeg": None}, ["no ['jpeg']"]),
        ({"label": np.full(20, 10, np.uint8)}, ["0..9", "got 10 at row 0"]),
        ({"label": np.zeros(19, np.uint8)}, ["offset must rise"]),
        ({"offset": np.zeros(21, np.int64)}, ["offset must rise"]),
        ({"label": np.zeros(20)}, ["vectors of integers"]),
        ({"classes": np.asarray(["one", "two"])}, ["0..1"]),
        ({"side": 16}, ["image 0", "32 x 32", "16 x 16"]),
    ],
)
def test_broken_cifar_npz(tmp_path, changed, parts):
    write_npz(tmp_path, "train", 20, **changed)
    write_npz(tmp_path, "test", 10, **({"classes": changed["classes"]} if "classes" in changed else {}))
    with pytest.raises(DataError) as error:
        load_data(f"cifar10:{tmp_path}")
    one_line(error, "cifar10_train_jpeg.npz", *parts)


def test_broken_cifar_files(tmp_path):
    file = write_npz(tmp_path, "train", 20)
    with pytest.raises(DataError) as error:
        load_data(f"cifar10:{tmp_path}")
    one_line(error, "cifar10_test_jpeg.npz")  # the pair is incomplete
    write_npz(tmp_path, "test", 10)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no zip at all"):
        file.write_bytes(content)
        with pytest.raises(DataError) as error:
            load_data(f"cifar10:{tmp_path}")
        one_line(error, "cifar10_train_jpeg.npz")
    data = jpegs(20)
    noise = np.frombuffer(b"\x00" * sum(map(len, data)), np.uint8)
    write_npz(tmp_path, "train", 20, jpeg=noise)
    with pytest.raises(DataError) as error:
        load_data(f"cifar10:{tmp_path}")
    one_line(error, "image 0", "expected an image")


def test_cifar_npz_with_objects_is_refused(tmp_path):
    write_npz(tmp_path, "train", 20, classes=np.asarray([Hostile()] * 10, dtype=object))
    write_npz(tmp_path, "test", 10)
    with pytest.raises(DataError, match="cifar10_train_jpeg"):
        load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("path", ["nowhere", "", "other.txt"])
def test_cifar_bad_paths(tmp_path, path):
    (tmp_path / "other.txt").write_text("hello")
    with pytest.raises(DataError) as error:
        load_data(f"cifar10:{tmp_path / path}")
    one_line(error, str(tmp_path))


def write_batches(folder: Path, protocol: int = 2, **changed) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(2)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        content = {b"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), b"labels": [0, 1, 2, 9]}
        if name == "data_batch_3":
            content |= {key.encode(): value for key, value in changed.items()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    return folder


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_python_batches(tmp_path, protocol):
    folder = write_batches(tmp_path / "cifar-10-batches-py", protocol)
    data = load_data(f"cifar10:{tmp_path}")
    check(data, 20, 4, (3, 32, 32), 10)
    assert data.train_y.tolist() == [0, 1, 2, 9] * 5
    assert data.classes[9] == "truck"
    with (folder / "test_batch").open("rb") as file:
        raw = pickle.load(file)[b"data"].reshape(4, 3, 32, 32)
    scaled = data.test_x * 1.0
    for channel in range(3):  # the readers agree with numpy's own unpickling up to the normalization
        ours, theirs = scaled[:, channel].flatten().double(), torch.from_numpy(raw[:, channel]).flatten().double()
        assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.999999
    assert torch.equal(load_data(f"cifar10:{folder / 'data_batch_1'}").train_x, data.train_x)


MARK = "tnlayers_hostile_mark"


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ[MARK],)


@pytest.fixture(autouse=True)
def trap(tmp_path, monkeypatch):
    """A folder that appears if a hostile pickle is executed."""
    place = tmp_path / "executed"
    monkeypatch.setenv(MARK, str(place))
    yield
    assert not place.exists()


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"labels": Hostile()}, ["mkdir", "refused"]),
        ({"data": np.zeros((4, 3072))}, ["f8"]),
        ({"data": np.zeros((4, 100), np.uint8)}, ["(n, 3072)"]),
        ({"data": [1, 2]}, ["(n, 3072)", "None"]),
        ({"labels": [0, 1, 2]}, ["list of 4 integers"]),
        ({"labels": [0, 1, 2, 10]}, ["0..9", "got 10 at row 3"]),
        ({"labels": [0, 1, 2, -1]}, ["0..9"]),
        ({"labels": [0, 1, 2, 0.5]}, ["integers"]),
        ({"labels": "abcd"}, ["list of 4 integers"]),
    ],
)
def test_broken_and_hostile_batches(tmp_path, changed, parts):
    write_batches(tmp_path, **changed)
    with pytest.raises(DataError) as error:
        load_data(f"cifar10:{tmp_path}")
    one_line(error, "data_batch_3", *parts)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x02", b"hello", pickle.dumps([1, 2]), pickle.dumps(np.float64(1)), b"cos\nsystem\n(S'true'\ntR."],
)
def test_batches_that_are_no_dicts(tmp_path, content):
    write_batches(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError) as error:
        load_data(f"cifar10:{tmp_path}")
    one_line(error, "test_batch")


# -- folders of images -------------------------------------------------------------------------------------------------


def write_images(root: Path, *, parts=("train", "test"), classes=("ant", "bee"), side=(10, 12), mode="RGB") -> Path:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(3)
    for part in parts:
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for k in range(3):
                shape = side if mode == "L" else (*side, 3)
                picture = image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                picture.save(folder / f"{k}.{'png' if k else 'PNG'}")
    return root


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
@pytest.mark.parametrize("part", ["test", "val"])
def test_imagefolder(tmp_path, mode, channels, part):
    write_images(tmp_path, mode=mode, parts=("train", part))
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    data = load_data(f"imagefolder:{tmp_path}")
    check(data, 6, 6, (channels, 10, 12), 2)
    assert data.classes == ("ant", "bee")
    assert data.train_y.tolist() == [0, 0, 0, 1, 1, 1]
    assert load_data(f"imagefolder:{tmp_path}", size=8).shape == (channels, 8, 8)


def test_imagefolder_refusals(tmp_path):
    image = pytest.importorskip("PIL.Image")

    def refused(*parts: str, **options) -> None:
        with pytest.raises(DataError) as error:
            load_data(f"imagefolder:{tmp_path}", **options)
        one_line(error, *parts)

    refused("train")
    write_images(tmp_path, parts=("train",))
    refused("test")
    write_images(tmp_path, parts=("test",), classes=("ant", "cat"))
    refused("must agree", "['bee', 'cat']")
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "bee")
    odd = tmp_path / "test" / "bee" / "odd.png"
    image.new("RGB", (5, 5)).save(odd)
    refused("one size", "(10, 12)", "(5, 5)", "odd.png", "--size")
    assert load_data(f"imagefolder:{tmp_path}", size=(6, 7)).shape == (3, 6, 7)
    odd.write_bytes(odd.read_bytes()[:40])
    refused("odd.png", "expected an image", size=8)
    odd.write_text("hello")
    refused("odd.png", "expected an image")
    image.fromarray(np.zeros((10, 12), np.uint16)).save(odd)
    refused("odd.png", "mode I;16")
    odd.unlink()
    for file in (tmp_path / "train" / "ant").iterdir():
        file.unlink()
    refused("ant", "found none")


# -- the real files ----------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("spec", "folder", "shape"), [("mnist", "mnist", (1, 28, 28)), ("cifar10", "cifar10", (3, 32, 32))]
)
def test_shared_data(spec, folder, shape):
    path = SHARED / folder
    if not path.is_dir():
        pytest.skip(f"{path} is absent")
    check(load_data(f"{spec}:{path}", limit=200), 200, 200, shape, 10)
