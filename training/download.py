"""Fetches the public data sets once, into the cache: checked by sha256, retried with back-off, resumed by Range."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from training.errors import DownloadError

# The four files of MNIST and its relatives, in the order: training images and labels, test images and labels.
STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Source:
    """Where a data set is published: `<mirror>/<stem>.gz`, and what each of the files must be."""

    mirrors: tuple[str, ...]
    sha256: tuple[str, ...]  # of the .gz files, in the order of STEMS


SOURCES = {
    "mnist": Source(
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            "https://storage.googleapis.com/cvdf-datasets/mnist",
        ),
        sha256=(
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion-mnist": Source(
        mirrors=(
            "https://fashion-mnist.s3.eu-central-1.amazonaws.com",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        ),
        sha256=(
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
}

ATTEMPTS = 5  # per mirror


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/drawwell`, by default `~/.cache/drawwell`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "drawwell"


def fetch(name: str, folder: Path | None = None, source: Source | None = None) -> list[Path]:
    """The four files of data set `name`, in the order of `STEMS`, downloaded into `folder` (the cache) where absent.

    Raises `DownloadError`.
    """
    source = source or SOURCES[name]
    folder = folder or cache_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    with httpx.Client(timeout=httpx.Timeout(30.0), follow_redirects=True) as client:
        return [
            download([f"{mirror}/{stem}.gz" for mirror in source.mirrors], folder / f"{stem}.gz", sha256, client=client)
            for stem, sha256 in zip(STEMS, source.sha256, strict=True)
        ]


def download(
    urls: Sequence[str],
    target: Path,
    sha256: str,
    *,
    client: httpx.Client,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """`target`, fetched from the first of `urls` that yields the bytes with this sha256; returned at once where
    present.

    Bytes gather in `<target>.part`; a connection that is cut goes on there with a Range request. Only checked files get
    the name `target`, by an atomic rename. Raises `DownloadError` with each mirror's last failure.
    """
    if target.is_file() and _sha256(target) == sha256:
        return target
    part = target.with_name(target.name + ".part")
    failures = []
    for url in urls:
        for attempt in range(ATTEMPTS):
            if attempt:
                sleep(min(0.5 * 2**attempt, 30.0))
            try:
                _continue(client, url, part)
            except httpx.HTTPStatusError as error:
                failure = f"{url}: HTTP {error.response.status_code}"
                if error.response.status_code < 500 and error.response.status_code not in (408, 416, 429):
                    break  # asking again would not help
                if error.response.status_code == 416:
                    part.unlink(missing_ok=True)  # what lies there is longer than the file
            except httpx.TransportError as error:
                failure = f"{url}: {type(error).__name__}: {error}"
            else:
                found = _sha256(part)
                if found == sha256:
                    part.replace(target)
                    return target
                part.unlink()
                failure = f"{url}: sha256 {found}, expected {sha256}"
        failures.append(failure)
    raise DownloadError(f"{target.name}: could not be downloaded\n  " + "\n  ".join(failures))


def _continue(client: httpx.Client, url: str, part: Path) -> None:
    """Appends to `part` what it lacks. Starts anew where the server answers with the whole file."""
    have = part.stat().st_size if part.exists() else 0
    # `identity`: a Range counts bytes as sent, so nothing may be re-encoded on the way.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as response:
        response.raise_for_status()
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        with part.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_raw():  # as they come: collected into larger ones, a cut would lose the last
                file.write(chunk)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
