"""Finds the public data sets on disk in their original formats, fetches what is missing, and checks every byte.

Layout under the data root: `mnist/` and `fashion-mnist/` hold the four IDX files, gzipped or not, and
`cifar-10-batches-bin/` the binary batches. Content is checked by the SHA-256 of the decompressed bytes, so that a file
compressed anew still passes.
"""

import dataclasses
import gzip
import hashlib
import os
import tarfile
import zlib
from pathlib import Path
from typing import IO

from .store import write_atomic


class DataError(ValueError):
    """A data file that is missing, damaged or not what it should be."""


@dataclasses.dataclass(frozen=True)
class DataFile:
    """One original file: SHA-256 of its decompressed content, and MD5 of the file that the server sends."""

    name: str
    sha256: str
    md5: str = ""  # empty where the server sends an archive of all files


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a data set lies under the data root, and where it is fetched from."""

    folder: str
    urls: tuple[str, ...]  # tried in turn; a folder of gzipped files, or a tar archive
    files: tuple[DataFile, ...]
    archive_md5: str = ""  # empty where each file is fetched alone


SOURCES: dict[str, Source] = {
    "mnist": Source(
        folder="mnist",
        urls=("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        files=(
            DataFile(
                "train-images-idx3-ubyte",
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            ),
            DataFile(
                "train-labels-idx1-ubyte",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "d53e105ee54ea40749a09fcbcd1e9432",
            ),
            DataFile(
                "t10k-images-idx3-ubyte",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "9fb629c4189551a2d022fa330f9573f3",
            ),
            DataFile(
                "t10k-labels-idx1-ubyte",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
        ),
    ),
    "fashion-mnist": Source(
        folder="fashion-mnist",
        urls=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        files=(
            DataFile(
                "train-images-idx3-ubyte",
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            ),
            DataFile(
                "train-labels-idx1-ubyte",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "25c81989df183df01b3e8a0aad5dffbe",
            ),
            DataFile(
                "t10k-images-idx3-ubyte",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "bef4ecab320f06d8554ea6380940ec79",
            ),
            DataFile(
                "t10k-labels-idx1-ubyte",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
        ),
    ),
    "cifar10": Source(
        folder="cifar-10-batches-bin",
        urls=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        files=(
            DataFile("data_batch_1.bin", "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
            DataFile("data_batch_2.bin", "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
            DataFile("data_batch_3.bin", "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
            DataFile("data_batch_4.bin", "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
            DataFile("data_batch_5.bin", "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
            DataFile("test_batch.bin", "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
        ),
        archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
    ),
}


def data_root(root: str | Path | None = None) -> Path:
    """The folder that holds the data sets: the argument, else SPECCERT_DATA, else a cache folder of the user."""
    if root is not None:
        return Path(root)
    if named := os.environ.get("SPECCERT_DATA"):
        return Path(named)
    import pooch

    return Path(pooch.os_cache("speccert"))


def read_files(dataset: str, root: str | Path | None = None) -> dict[str, bytes]:
    """Decompressed content of each original file of `dataset` by file name, fetched where missing.

    Raises:
        DataError: a file is missing and cannot be fetched, or its content is not the original one.
    """
    source, base = SOURCES[dataset], data_root(root)
    folder = base / source.folder
    missing = [file for file in source.files if _find(folder, file.name) is None]
    if missing and source.archive_md5:
        _fetch_archive(source, base, missing)
    for file in missing if not source.archive_md5 else ():
        _fetch(source, base, f"{file.name}.gz", file.md5)
    return {file.name: _read_checked(folder, file) for file in source.files}


def _find(folder: Path, name: str) -> Path | None:
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if path.is_file()), None)


def _read_checked(folder: Path, file: DataFile) -> bytes:
    path = _find(folder, file.name)
    remedy = "delete it to have it downloaded again, or set --data-root to a folder with the original"
    if path is None:
        raise DataError(f"{folder / file.name}: expected this file (or .gz); {remedy}")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: unreadable or truncated ({error}); {remedy}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise DataError(
            f"{path}: not the original content, expected SHA-256 {file.sha256[:12]}…, "
            f"got {found[:12]}… ({len(content)} bytes); {remedy}"
        )
    return content


def _fetch(source: Source, base: Path, name: str, md5: str) -> Path:
    """Download one file into the source's folder from the first address that has it."""
    import pooch

    folder, failures = base / source.folder, []
    for url in source.urls:
        address = url + name if url.endswith("/") else url
        try:
            return Path(pooch.retrieve(address, f"md5:{md5}", fname=name, path=folder))
        except (OSError, ValueError) as error:
            failures.append(f"{address}: {_first_line(error)}")
    raise DataError(
        f"cannot fetch {folder / name}, expected with MD5 {md5} ({'; '.join(failures)}); "
        f"set --data-root (or SPECCERT_DATA) to a folder that holds {source.folder}/{name}"
    )


def _fetch_archive(source: Source, base: Path, missing: list[DataFile]) -> None:
    """Download the archive and unpack the missing files only, each under its own name."""
    archive = _fetch(source, base, source.urls[0].rsplit("/", 1)[-1], source.archive_md5)
    try:
        with tarfile.open(archive) as members:
            for file in missing:
                member: IO[bytes] | None = members.extractfile(f"{source.folder}/{file.name}")
                if member is None:
                    raise KeyError(f"{file.name} is not a plain file")
                write_atomic(base / source.folder / file.name, member.read())
    except (OSError, KeyError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{archive}: cannot be unpacked ({_first_line(error)}); delete it and try again") from error
    archive.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
