"""Decoded images in a file that every job on a machine maps: made once, by whoever comes first, and checked.

A file holds a signature, the SHA-256 of what it was made from and of its table, the table (height, width and CRC-32 of
each image) and the pixels, uint8 [height, width, 3] each. Its folder is named by what it was made from: other files (a
size or a time of change is enough), or another decoder, have a file of their own.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torchvision.datasets import ImageFolder

from daft_domainbed.data.readers import Readers
from daft_domainbed.embedded.pixels import is_deep
from daft_domainbed.errors import DISK_FULL, UsageError
from daft_domainbed.host import contract
from daft_domainbed.runtime import locks, stopping
from daft_domainbed.runtime.files import writing_atomically

_SIGNATURE = b"DAFTimg2"
_CLIPPED = b"DAFTimg1"  # of files in which images of more than 8 bits were clipped
_MAY_BE_DEEP = (".png", ".tif", ".tiff", ".pgm", ".ppm")
_HEAD = len(_SIGNATURE) + hashlib.sha256().digest_size
_ROW = np.dtype([("height", "<u4"), ("width", "<u4"), ("crc", "<u4")])

Loader = Callable[[str], Image.Image]
T = TypeVar("T")


def cache_images(domains: Iterable[Any], folder: Path, say: Callable[[str], None]) -> None:
    """Have each image folder among a data set's domains read from a file of decoded images, made where there is none.

    Args:
        domains: The data set's; those that are no plain image folder (`contract.is_plain_folder`) are left alone.
        folder: Where the files are.
        say: Called with a message when a file is made, waited for or found damaged.

    Raises:
        UsageError: The folder cannot be written, or an image cannot be decoded.
        OSError: The disk is full; nothing half-made is left.
    """
    folders = [domain for domain in domains if contract.is_plain_folder(domain)]
    if not folders:
        say("--image_cache has no effect: no domain is a plain image folder")
    for domain in folders:
        domain.loader = _open(domain, folder, say)


def read_or_name(read: Callable[[str], T], path: str) -> T:
    """Return what is read from an image's file.

    Raises:
        UsageError: The file is broken; names it.
    """
    try:
        return read(path)
    except UsageError:
        raise
    except Exception as error:  # decoders raise errors of every kind
        raise UsageError(f"broken image {path} ({error}): mend or remove it") from error


class CachedImages:
    """Reads images, by path, from a file of decoded ones; an image that is damaged there, from its own file.

    Args:
        file: The file of decoded images.
        paths: The images' own files, in its order.
        key: A hash of what the file has to be made from.
        load: Decodes an image.
        say: Called with a message where the file is damaged.

    Raises:
        ValueError: The file is damaged, or was made from something else.
        OSError: There is no such file, or it cannot be read.
    """

    def __init__(self, file: Path, paths: Sequence[str], key: bytes, load: Loader, say: Callable[[str], None]) -> None:
        self.file, self.load, self.say = file, load, say
        self.bytes = np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray)
        start = _HEAD + len(paths) * _ROW.itemsize
        table = self.bytes[_HEAD:start].tobytes()
        head = self.bytes[:_HEAD].tobytes()
        is_clipped = head == _make_head(key, table, _CLIPPED) and any(map(_is_deep, paths))
        if is_clipped or head not in (_make_head(key, table), _make_head(key, table, _CLIPPED)):
            raise ValueError(f"{file} is damaged, or older than images of more than 8 bits")
        self.rows = np.frombuffer(table, dtype=_ROW)
        sizes = 3 * self.rows["height"].astype(np.int64) * self.rows["width"]
        self.ends = start + np.cumsum(sizes)
        self.starts = self.ends - sizes
        if len(self.bytes) != start + sizes.sum():
            raise ValueError(f"{file} is damaged")
        self.indices = {path: i for i, path in enumerate(paths)}
        self.is_checked = np.zeros(len(paths), dtype=bool)
        self.is_reported = False

    def __call__(self, path: str) -> Image.Image:
        """Return an image, whose pixels are compared with their checksum when they are first read."""
        i = self.indices[path]
        row, pixels = self.rows[i], self.bytes[self.starts[i] : self.ends[i]]
        if not self.is_checked[i] and zlib.crc32(pixels.data) != row["crc"]:
            if not self.is_reported:
                self.say(f"{self.file} is damaged, at {path} at least: delete it, the next run makes it anew")
            self.is_reported = True
            return self.load(path)
        self.is_checked[i] = True
        return Image.fromarray(pixels.reshape(row["height"], row["width"], 3))

    def get_size(self, path: str) -> tuple[int, int]:
        """Return an image's width and height."""
        row = self.rows[self.indices[path]]
        return int(row["width"]), int(row["height"])


def _open(domain: ImageFolder, folder: Path, say: Callable[[str], None]) -> CachedImages:
    key, paths = _describe(domain), [path for path, _ in domain.samples]
    place = folder / f"{Path(domain.root).name}-{key.hex()[:16]}"
    file = place / "images"
    open_file = functools.partial(CachedImages, file, paths, key, domain.loader, say)
    with suppress(OSError, ValueError):
        return open_file()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _claim(place, say) as claim:
            with suppress(OSError, ValueError):  # another process has made it meanwhile
                return open_file()
            say(f"decoding the {len(paths)} images of {domain.root} into {file}")
            _make(file, paths, key, domain.loader, claim)
            return open_file()
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UsageError(f"--image_cache {folder} cannot be used ({error.strerror}): choose another") from error


def _claim(place: Path, say: Callable[[str], None]) -> AbstractContextManager[locks.Claim]:
    """Claim a folder, waiting for the process that has it."""
    is_told = False

    def on_wait(error: locks.Claimed) -> None:
        nonlocal is_told
        _stop_if_asked(f"waiting for another process in {place}")
        if not is_told:
            say(f"waiting for another process, which decodes images into {place}")
            is_told = True

    return locks.claim_in_turn(place, on_wait)


def _stop_if_asked(doing: str) -> None:
    if stopping.is_requested():
        raise stopping.Stopped(f"stopped while {doing}; the same command goes on")


def _describe(domain: ImageFolder) -> bytes:
    """Return a SHA-256 of all that decides about the pixels: the files, in order, and who decodes them how."""
    loader: Any = domain.loader
    function = getattr(loader, "func", loader)  # of a partial
    how = [PIL.__version__, features.version("jpg"), function.__module__, function.__qualname__]
    digest = hashlib.sha256(repr([*how, sorted(getattr(loader, "keywords", {}).items())]).encode())
    for path, _ in domain.samples:
        stat = os.stat(path)
        digest.update(
            f"{path[len(str(domain.root)) :]}\0{stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.digest()


def _is_deep(path: str) -> bool:
    if not path.lower().endswith(_MAY_BE_DEEP):
        return False
    with Image.open(path) as image:
        return is_deep(image)


def _make_head(key: bytes, table: bytes, signature: bytes = _SIGNATURE) -> bytes:
    return signature + hashlib.sha256(key + table).digest()


def _make(file: Path, paths: Sequence[str], key: bytes, load: Loader, claim: locks.Claim) -> None:
    threads = torch.get_num_threads()
    with writing_atomically(file) as out, Readers(threads) as pool:
        out.seek(_HEAD + len(paths) * _ROW.itemsize)
        rows: list[tuple[int, int, int]] = []
        while chunk := paths[len(rows) : len(rows) + 4 * threads]:  # which are in memory at once
            rows += [_write(out, pixels) for pixels in pool.map(functools.partial(_decode, load), chunk)]
            _stop_if_asked(f"decoding images into {file}")
            claim.check()
        table = np.array(rows, dtype=_ROW).tobytes()
        out.seek(0)
        out.write(_make_head(key, table) + table)


def _decode(load: Loader, path: str) -> NDArray[np.uint8]:
    return np.asarray(read_or_name(load, path))


def _write(out: BinaryIO, pixels: NDArray[np.uint8]) -> tuple[int, int, int]:
    out.write(pixels.data)
    return pixels.shape[0], pixels.shape[1], zlib.crc32(pixels.data)
