"""Downloads of weight files by URL or name, kept in a cache and verified by checksum."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import Request, url2pathname, urlopen

import torch
from tqdm import tqdm

from .files import replacing
from .locks import locked

logger = logging.getLogger(__name__)

CATALOG = {
    "ImageNetPretrained/MSRA/R-50": "ImageNetPretrained/MSRA/R-50.pkl",
    "ImageNetPretrained/MSRA/R-101": "ImageNetPretrained/MSRA/R-101.pkl",
    "ImageNetPretrained/FAIR/20171220/X-101-32x8d": (
        "ImageNetPretrained/20171220/X-101-32x8d.pkl"
    ),
}
CATALOG_ROOT = "https://dl.fbaipublicfiles.com/detectron/"
# File names at this address end in a checksum; digits in other names may be a date.
NAMED_BY_CHECKSUM = "https://download.pytorch.org/"
TIMEOUT = 60  # seconds without a byte


class DownloadError(ValueError):
    """A source is not available; the message names it and an alternative."""


def resolve_source(source: str) -> Path:
    """The local file of a source.

    A path is returned as it is; ``http(s)://``, ``catalog://`` and ``torchvision://`` sources are
    downloaded unless they are in the cache.

    A URL may end in ``#sha256=<hex>`` (at least the first eight digits, upper or lower case).
    Without it, a file is verified by the checksum in its name if it is PyTorch's
    (``resnet50-0676ba61.pth``), else by the checksum of the first download, which detects later
    damage.

    Raises:
        DownloadError: unknown name, failed download, wrong or malformed checksum.
    """
    if source.startswith("catalog://"):
        name = source.removeprefix("catalog://")
        if name not in CATALOG:
            raise DownloadError(f"{source}: the catalog has only {', '.join(CATALOG)}")
        source = CATALOG_ROOT + CATALOG[name]
    elif source.startswith("torchvision://"):
        source = _torchvision_url(source.removeprefix("torchvision://"))
    return local_path(source) or _download(source)


def local_path(source: str) -> Path | None:
    """The path of a local source; None if the source is to be downloaded.

    Raises:
        DownloadError: the source looks like a URL, but is malformed.
    """
    try:
        scheme = urlparse(source).scheme
    except ValueError as error:
        raise DownloadError(f"{source} is neither a path nor a URL: {error}") from error
    if scheme in ("http", "https", "catalog", "torchvision"):
        return None
    if scheme == "file":
        url = urlparse(source)
        folder = "" if url.netloc == "localhost" else url.netloc  # of a relative path
        return Path(url2pathname(folder + url.path)).expanduser()
    return Path(source).expanduser()


def cache_dir() -> Path:
    """Folder of the downloads, beside those of torch.hub (``TORCH_HOME`` moves both)."""
    return Path(torch.hub.get_dir()) / "nasfcos"


def _torchvision_url(name: str) -> str:
    from torchvision.models import get_model_weights, list_models

    try:
        return get_model_weights(name).IMAGENET1K_V1.url
    except (ValueError, AttributeError):
        usable = ", ".join(list_models(include=["resnet*", "mobilenet_v2"]))
        raise DownloadError(
            f"torchvision://{name}: torchvision has no ImageNet weights of that name; "
            f"backbones for this project: {usable}"
        ) from None


def _download(url: str) -> Path:
    url, marker, fragment = url.partition("#")
    expected = _checksum(url, fragment) if marker else None
    # Each URL has a folder of its own, because many files are called model_final.pth.
    folder = cache_dir() / hashlib.sha256(url.encode()).hexdigest()[:12]
    path = folder / (Path(urlparse(url).path).name or "weights")
    if expected is None and url.startswith(NAMED_BY_CHECKSUM):
        match = re.search(r"-([0-9a-f]{8,})\.\w+$", path.name)
        expected = match[1] if match else None
    path.parent.mkdir(parents=True, exist_ok=True)
    record = path.with_name(path.name + ".sha256")
    with locked(Path(f"{path}.lock")):  # several processes of a job may ask at once
        if path.is_file():
            expected = expected or (record.read_text().strip() if record.is_file() else None)
            if expected is None or sha256(path).startswith(expected):
                return path
            logger.warning("%s is damaged (wrong checksum); downloading it again", path)
        logger.info("downloading %s to %s", url, path)
        try:
            with replacing(path) as temporary:
                _fetch(url, temporary)
                found = sha256(temporary)
                if expected and not found.startswith(expected):
                    raise OSError(
                        f"its checksum is {found}, not {expected}. If it is the right file, write "
                        f"{url}#sha256={found[:8]}"
                    )
        except (OSError, HTTPException) as error:
            raise DownloadError(
                f"{url} could not be downloaded: {error}. Try again, or fetch it by other means "
                f"and give its path, or put it at {path}"
            ) from None
        record.write_text(found + "\n")
    return path


def _fetch(url: str, path: Path) -> None:
    request = Request(url, headers={"User-Agent": "nasfcos"})  # servers may refuse urllib's own
    with (
        urlopen(request, timeout=TIMEOUT) as response,
        tqdm.wrapattr(response, "read", response.length, disable=None) as body,
        path.open("wb") as file,
    ):
        shutil.copyfileobj(body, file, 1 << 20)
        if response.length:  # bytes of the announced length that are missing
            raise OSError(f"the connection ended {response.length} bytes early")


def _checksum(url: str, fragment: str) -> str:
    match = re.fullmatch(r"sha256=([0-9a-f]{8,64})", fragment.lower())
    if not match:
        raise DownloadError(
            f"{url}#{fragment}: what follows the # is no checksum; write #sha256= and at least "
            "the first 8 of the 64 hexadecimal digits, or leave it out with the #"
        )
    return match[1]


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
