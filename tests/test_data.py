import gzip
import hashlib
import http.server
import io
import struct
import sys
import tarfile
import threading
import types

import numpy as np
import pytest
import torch

from speccert.experiments import download
from speccert.experiments.data import Dataset, Split, load_dataset, read_cifar, read_idx
from speccert.experiments.download import DataError, DataFile, Source


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def sha(content):
    return hashlib.sha256(content).hexdigest()


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def small_mnist(monkeypatch):
    """Contents of a 40 + 10 picture stand-in for MNIST, whose hashes replace the real ones."""
    generator = np.random.default_rng(0)
    contents = {
        "train-images-idx3-ubyte": idx(generator.integers(0, 256, (40, 4, 5), np.uint8)),
        "train-labels-idx1-ubyte": idx(np.arange(40, dtype=np.uint8) % 4),
        "t10k-images-idx3-ubyte": idx(generator.integers(0, 256, (10, 4, 5), np.uint8)),
        "t10k-labels-idx1-ubyte": idx(np.arange(10, dtype=np.uint8) % 4),
    }
    files = tuple(DataFile(name, sha(c), md5(gzip.compress(c, mtime=0))) for name, c in contents.items())
    monkeypatch.setitem(download.SOURCES, "mnist", Source("mnist", ("http://127.0.0.1:9/",), files))
    return contents


def write(folder, contents, packed=()):
    folder.mkdir(parents=True)
    for name, content in contents.items():
        if name in packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, compresslevel=1))
        else:
            (folder / name).write_bytes(content)


@pytest.fixture
def server(tmp_path):
    """A local HTTP server of a folder: (folder, base address)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def test_digits_are_the_real_ones_split_without_overlap():
    from sklearn.datasets import load_digits

    data = load_dataset("digits")
    parts = (data.train, data.validation, data.test)
    assert (data.input_shape, data.num_classes) == ((1, 8, 8), 10)
    assert sum(len(part) for part in parts) == 1797
    assert abs(len(data.test) - 359) <= 5
    rows = np.sort([part_row.tobytes() for part in parts for part_row in part.x.numpy()])
    expected = np.sort([(image / 16).astype(np.float32).tobytes() for image in load_digits().images])
    np.testing.assert_array_equal(rows, expected)
    for part in parts:
        assert part.x.dtype == torch.float32
        assert part.y.dtype == torch.int64
        assert torch.bincount(part.y, minlength=10).float().std() < 0.1 * len(part) / 10 + 1


def test_moments_are_those_of_the_train_part():
    data = load_dataset("digits", train_samples=200)
    pixels = data.train.x.numpy().astype(np.float64)
    assert data.mean == pytest.approx((pixels.mean(),), rel=1e-12)
    assert data.std == pytest.approx((pixels.std(),), rel=1e-12)


def test_equal_arguments_give_equal_parts_and_leave_random_state():
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = load_dataset("digits", seed=5, train_samples=100, test_samples=50)
    second = load_dataset("digits", seed=5, train_samples=100, test_samples=50)
    other = load_dataset("digits", seed=6, train_samples=100, test_samples=50)
    assert torch.equal(first.train.x, second.train.x)
    assert torch.equal(first.validation.y, second.validation.y)
    assert torch.equal(first.test.x, second.test.x)
    assert not torch.equal(first.train.x, other.train.x)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_the_test_part_does_not_depend_on_the_seed():
    assert torch.equal(load_dataset("digits", seed=0).test.x, load_dataset("digits", seed=1).test.x)


@pytest.mark.parametrize("packed", [(), ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte")])
def test_idx_files_raw_and_packed_anew(tmp_path, small_mnist, packed):
    write(tmp_path / "mnist", small_mnist, packed)
    data = load_dataset("mnist", root=tmp_path, validation_fraction=0.2)
    assert data.input_shape == (1, 4, 5)
    assert (len(data.train), len(data.validation), len(data.test)) == (32, 8, 10)
    assert torch.bincount(data.validation.y).tolist() == [2, 2, 2, 2]
    test_bytes = np.frombuffer(small_mnist["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(10, 1, 4, 5)
    np.testing.assert_array_equal(data.test.x.numpy(), (test_bytes / np.float32(255)).astype(np.float32))
    assert data.test.y.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_root_from_the_environment(tmp_path, small_mnist, monkeypatch):
    write(tmp_path / "mnist", small_mnist)
    monkeypatch.setenv("SPECCERT_DATA", str(tmp_path))
    assert len(load_dataset("mnist").test) == 10


def test_default_root_is_a_folder_of_the_user(monkeypatch):
    monkeypatch.delenv("SPECCERT_DATA", raising=False)
    assert download.data_root().name == "speccert"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (
            lambda c: c[:-1],
            r"train-images-idx3-ubyte: not the original content, expected SHA-256 \w{12}…, got .*--data-root",
        ),
        (lambda c: c[:-1] + b"x" if c[-1:] != b"x" else c[:-1] + b"y", "not the original content"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, small_mnist, damage, match):
    name = "train-images-idx3-ubyte"
    write(tmp_path / "mnist", {**small_mnist, name: damage(small_mnist[name])})
    with pytest.raises(DataError, match=match) as caught:
        load_dataset("mnist", root=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b"a" * 1000)[:20], b""], ids=["not gzip", "truncated", "empty"]
)
def test_a_broken_gzip_file_is_refused(tmp_path, small_mnist, content):
    name = "train-labels-idx1-ubyte"
    write(tmp_path / "mnist", {key: value for key, value in small_mnist.items() if key != name})
    (tmp_path / "mnist" / f"{name}.gz").write_bytes(content)
    match = r"train-labels-idx1-ubyte.gz: (unreadable or truncated|not the original content)"
    with pytest.raises(DataError, match=match):
        load_dataset("mnist", root=tmp_path)


def test_missing_files_are_fetched_with_checksums(tmp_path, small_mnist, server, monkeypatch):
    folder, address = server
    for name, content in small_mnist.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    source = download.SOURCES["mnist"]
    urls = ("http://127.0.0.1:9/", address)  # the first one is down
    monkeypatch.setitem(download.SOURCES, "mnist", Source("mnist", urls, source.files))
    root = tmp_path / "new" / "root"
    assert len(load_dataset("mnist", root=root).test) == 10
    assert sorted(path.name for path in (root / "mnist").iterdir()) == sorted(f"{name}.gz" for name in small_mnist)


def test_a_download_that_fails_says_what_to_do(tmp_path, small_mnist, server, monkeypatch):
    source = download.SOURCES["mnist"]
    monkeypatch.setitem(download.SOURCES, "mnist", Source("mnist", (server[1],), source.files))
    match = r"cannot fetch .*mnist/train-images-idx3-ubyte.gz.*404.*set --data-root \(or SPECCERT_DATA\)"
    with pytest.raises(DataError, match=match) as caught:
        load_dataset("mnist", root=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_wrong_download_is_not_kept(tmp_path, small_mnist, server, monkeypatch):
    folder, address = server
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"an error page")
    source = download.SOURCES["mnist"]
    monkeypatch.setitem(download.SOURCES, "mnist", Source("mnist", (address,), source.files))
    with pytest.raises(DataError, match="MD5"):
        load_dataset("mnist", root=tmp_path / "root")
    assert list((tmp_path / "root" / "mnist").iterdir()) == []


def cifar_batch(seed, rows=20):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (rows, 3072), np.uint8)
    return np.concatenate([(np.arange(rows, dtype=np.uint8) % 10)[:, None], pixels], axis=1).tobytes()


@pytest.fixture
def small_cifar(monkeypatch, server):
    """Contents of small batches, and a served archive of them, whose hashes replace the real ones."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    contents = {name: cifar_batch(seed) for seed, name in enumerate(names)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in {**contents, "../evil": b"x"}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (server[0] / "cifar.tar.gz").write_bytes(buffer.getvalue())
    files = tuple(DataFile(name, sha(content)) for name, content in contents.items())
    source = Source("cifar-10-batches-bin", (server[1] + "cifar.tar.gz",), files, md5(buffer.getvalue()))
    monkeypatch.setitem(download.SOURCES, "cifar10", source)
    return contents


def test_cifar_batches_are_fetched_unpacked_and_read_in_order(tmp_path, small_cifar):
    data = load_dataset("cifar10", root=tmp_path / "root")
    assert sorted(p.name for p in (tmp_path / "root" / "cifar-10-batches-bin").iterdir()) == sorted(small_cifar)
    assert not (tmp_path / "root" / "evil").exists()
    assert (data.input_shape, len(data.train), len(data.validation), len(data.test)) == ((3, 32, 32), 90, 10, 20)
    row = small_cifar["test_batch.bin"][:3073]
    assert data.test.y[0] == row[0]
    pixels = (data.test.x[0] * 255).round().to(torch.uint8)
    assert pixels[0, 0, 0] == row[1]  # red, top left
    assert pixels[0, 1, 0] == row[1 + 32]  # red, second row
    assert pixels[1, 0, 0] == row[1 + 1024]  # green, top left
    assert pixels[2, 31, 31] == row[3072]  # blue, bottom right


def test_a_broken_archive_is_refused(tmp_path, small_cifar, server, monkeypatch):
    (server[0] / "cifar.tar.gz").write_bytes(b"no archive")
    source = download.SOURCES["cifar10"]
    wrong = Source(source.folder, source.urls, source.files, md5(b"no archive"))
    monkeypatch.setitem(download.SOURCES, "cifar10", wrong)
    with pytest.raises(DataError, match=r"cifar.tar.gz: cannot be unpacked \(.*delete it and try again"):
        load_dataset("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "expected an IDX file of unsigned bytes"),
        (b"\x00\x00\x0d\x01" + b"\x00" * 8, "got '00 00 0d 01'"),
        (b"\x00\x00\x08\x03\x00\x00", "header is cut: expected 16 bytes, got 6"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], r"shape \(2, 3\): expected 18 bytes, got 17"),
        (idx(np.zeros((2, 3), np.uint8)) + b"\x00", "expected 18 bytes, got 19"),
    ],
)
def test_bad_idx_content_is_refused(content, match):
    with pytest.raises(DataError, match=match):
        read_idx(content)


@pytest.mark.parametrize("content", [b"", b"\x00" * 3072, b"\x00" * 3074])
def test_bad_cifar_content_is_refused(content):
    with pytest.raises(DataError, match="rows of 3073 bytes"):
        read_cifar(content)


def arrays(**changes):
    generator = np.random.default_rng(0)
    made = {
        "x_train": generator.random((30, 6)),
        "y_train": np.arange(30) % 3,
        "x_test": generator.random((9, 6)),
        "y_test": np.arange(9) % 3,
    }
    made |= changes
    return {key: value for key, value in made.items() if value is not None}


def saved(tmp_path, **changes):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays(**changes))
    return str(path)


def test_npz_flat_floats(tmp_path):
    data = load_dataset(saved(tmp_path))
    assert (data.input_shape, data.num_classes, len(data.mean)) == ((6,), 3, 1)
    assert (len(data.train), len(data.validation), len(data.test)) == (27, 3, 9)


def test_npz_bytes_become_fractions_and_own_validation_is_kept(tmp_path):
    images = np.arange(30 * 2 * 3 * 3).reshape(30, 2, 3, 3).astype(np.uint8)
    test = images[:9]
    name = saved(tmp_path, x_train=images, x_test=test, x_val=images[9:12], y_val=np.arange(3))
    data = load_dataset(name)
    assert (len(data.train), len(data.validation)) == (30, 3)
    assert torch.equal(data.test.x, torch.from_numpy(test).float() / 255)
    assert len(data.mean) == len(data.std) == 2


def test_a_constant_channel_has_std_one(tmp_path):
    assert load_dataset(saved(tmp_path, x_train=np.full((30, 6), 0.5))).std == (1.0,)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x_test": None}, "missing x_test"),
        ({"extra": np.zeros(1)}, "unknown extra"),
        ({"x_val": np.zeros((3, 6))}, "missing y_val"),
        ({"x_train": np.zeros((30, 2, 3))}, r"x_train has shape \(30, 2, 3\), expected N x C x H x W or N x D"),
        ({"x_train": np.zeros((0, 6)), "y_train": np.zeros(0, int)}, "none of them 0"),
        ({"x_train": np.full((30, 6), 1.5)}, "x_train spans 1.5 … 1.5, expected finite values in"),
        ({"x_test": np.full((9, 6), np.nan)}, "x_test spans nan"),
        ({"x_test": np.full((9, 6), -0.1)}, "x_test spans -0.1"),
        ({"x_train": np.zeros((30, 6), int)}, "x_train is int64, expected floats"),
        ({"y_train": np.zeros(30)}, r"y_train is float64 of shape \(30,\), expected N integers"),
        ({"y_train": np.zeros((30, 1), int)}, "expected N integers"),
        ({"y_train": np.arange(29) % 3}, "x_train has 30 rows but y_train 29"),
        ({"y_train": np.arange(30) % 3 + 1}, r"y_train holds \[1, 2, 3\], expected every label 0 … K-1"),
        ({"y_train": np.zeros(30, int)}, "K >= 2"),
        ({"y_test": np.full(9, 3)}, r"y_test holds labels \[3\] that y_train has not"),
        ({"x_test": np.zeros((9, 7))}, r"x_test has inputs of shape \(7,\) but x_train \(6,\)"),
        ({"x_train": np.array([[object()]])}, "cannot be read as .npz without pickle"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, changes, match):
    with pytest.raises(DataError, match=match) as caught:
        load_dataset(saved(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut"])
def test_bad_npz_file_names_itself(tmp_path, content):
    path = tmp_path / "bad.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad.npz: cannot be read"):
        load_dataset(str(path))


def test_a_single_array_is_no_data_set(tmp_path):
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="got a single array"):
        load_dataset(str(tmp_path / "one.npz"))


@pytest.fixture
def own_module(monkeypatch):
    module = types.ModuleType("own_loaders")
    monkeypatch.setitem(sys.modules, "own_loaders", module)
    return module


def test_loader_function_of_arrays_and_tensors(own_module):
    own_module.load = lambda: {key: torch.from_numpy(value) for key, value in arrays().items()}
    data = load_dataset("own_loaders:load")
    assert (data.name, data.input_shape) == ("own_loaders:load", (6,))
    np.testing.assert_array_equal(data.test.x.numpy(), arrays()["x_test"].astype(np.float32))


def test_loader_function_of_a_dataset_keeps_its_parts(own_module):
    made = load_dataset("digits", train_samples=50, test_samples=20)
    own_module.load = lambda: made
    data = load_dataset("own_loaders:load", test_samples=10)
    assert isinstance(data, Dataset)
    assert torch.equal(data.train.x, made.train.x)
    assert torch.equal(data.validation.x, made.validation.x)
    assert len(data.test) == 10


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("imagenet", "unknown data set 'imagenet', expected digits, mnist, fashion-mnist, cifar10"),
        ("no_such_module:load", "No module named 'no_such_module'"),
        ("own_loaders:absent", "module own_loaders has no function absent"),
        ("own_loaders:number", "expected a dict of arrays or a Dataset, got int"),
    ],
)
def test_bad_names_are_refused(own_module, name, match):
    own_module.number = lambda: 3
    with pytest.raises(DataError, match=match):
        load_dataset(name)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"validation_fraction": 0.0}, r"validation_fraction must be in \(0, 1\), got 0.0"),
        ({"validation_fraction": 1e-4}, "leaves a part empty"),
        ({"train_samples": 0}, r"train_samples must be in 1 … 1\d+, got 0"),
        ({"test_samples": 5000}, r"test_samples must be in 1 … 3\d+, got 5000"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        load_dataset("digits", **options)


def test_split_knows_its_length():
    assert len(Split(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))) == 4
