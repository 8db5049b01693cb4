"""Downloads, against a local server that cuts connections, answers errors and serves wrong bytes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from training import download
from training.errors import DownloadError

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Mirror:
    """A server of `files`. Each of `faults` spoils one request: a status, or after how many bytes it hangs up."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[tuple[str, int]] = field(default_factory=list)
    ranges: bool = True
    seen: list[str | None] = field(default_factory=list)  # the Range header of every request


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.seen.append(asked)
            kind, number = state.faults.pop(0) if state.faults else ("none", 0)
            content = state.files.get(self.path.rsplit("/", 1)[-1])
            if kind == "status" or content is None:
                self.send_response(number or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and state.ranges else 0
            if start >= len(content) > 0:
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            rest = content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[:number] if kind == "cut" else rest)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Mirror(f"http://127.0.0.1:{server.server_address[1]}")
    state.files["file.gz"] = CONTENT
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=5, trust_env=False) as client:
        yield client


def fetch(urls: list[str], target: Path, client: httpx.Client) -> tuple[Path, list[float]]:
    waits: list[float] = []
    return download.download(urls, target, SHA256, client=client, sleep=waits.append), waits


def test_a_file_is_fetched_once(mirror: Mirror, client: httpx.Client, tmp_path: Path) -> None:
    target = tmp_path / "file.gz"
    for _ in range(2):
        fetch([f"{mirror.url}/file.gz"], target, client)
    assert target.read_bytes() == CONTENT
    assert mirror.seen == [None]
    assert [path.name for path in tmp_path.iterdir()] == ["file.gz"]


def test_a_cut_connection_goes_on_where_it_was_cut(mirror: Mirror, client: httpx.Client, tmp_path: Path) -> None:
    mirror.faults = [("cut", 1000), ("cut", 500), ("status", 503)]
    _, waits = fetch([f"{mirror.url}/file.gz"], tmp_path / "file.gz", client)
    assert (tmp_path / "file.gz").read_bytes() == CONTENT
    assert mirror.seen == [None, "bytes=1000-", "bytes=1500-", "bytes=1500-"]
    assert waits == sorted(waits)
    assert len(waits) == 3


def test_an_interrupted_run_is_taken_up_by_the_next(mirror: Mirror, client: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "file.gz.part").write_bytes(CONTENT[:12_345])
    fetch([f"{mirror.url}/file.gz"], tmp_path / "file.gz", client)
    assert mirror.seen == ["bytes=12345-"]
    assert (tmp_path / "file.gz").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_anew(mirror: Mirror, client: httpx.Client, tmp_path: Path) -> None:
    mirror.ranges = False
    mirror.faults = [("cut", 1000)]
    fetch([f"{mirror.url}/file.gz"], tmp_path / "file.gz", client)
    assert (tmp_path / "file.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT + b"more", b"x" * 1000, CONTENT])
def test_a_wrong_remainder_is_thrown_away(mirror: Mirror, client: httpx.Client, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "file.gz.part").write_bytes(left)
    fetch([f"{mirror.url}/file.gz"], tmp_path / "file.gz", client)
    assert (tmp_path / "file.gz").read_bytes() == CONTENT


def test_a_spoilt_target_is_fetched_again(mirror: Mirror, client: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(b"spoilt")
    fetch([f"{mirror.url}/file.gz"], tmp_path / "file.gz", client)
    assert (tmp_path / "file.gz").read_bytes() == CONTENT


def test_the_next_mirror_is_asked_at_once_where_one_lacks_the_file(
    mirror: Mirror, client: httpx.Client, tmp_path: Path
) -> None:
    _, waits = fetch([f"{mirror.url}/absent.gz", f"{mirror.url}/file.gz"], tmp_path / "file.gz", client)
    assert (tmp_path / "file.gz").read_bytes() == CONTENT
    assert waits == []


def test_wrong_bytes_never_get_the_name(mirror: Mirror, client: httpx.Client, tmp_path: Path) -> None:
    mirror.files["file.gz"] = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError, match="expected " + SHA256):
        fetch([f"{mirror.url}/file.gz"], tmp_path / "file.gz", client)
    assert not any(tmp_path.iterdir())


def test_the_error_tells_every_mirrors_failure(client: httpx.Client, mirror: Mirror, tmp_path: Path) -> None:
    mirror.faults = [("status", 500)] * download.ATTEMPTS
    urls = [f"{mirror.url}/file.gz", f"{mirror.url}/absent.gz", "http://127.0.0.1:9/file.gz"]
    with pytest.raises(DownloadError, match=r"(?s)HTTP 500.*HTTP 404.*127\.0\.0\.1:9/file\.gz: ConnectError"):
        fetch(urls, tmp_path / "file.gz", client)


def test_a_data_set_is_its_four_files(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files = {f"{stem}.gz": stem.encode() for stem in download.STEMS}
    source = download.Source((mirror.url,), tuple(hashlib.sha256(stem.encode()).hexdigest() for stem in download.STEMS))
    files = download.fetch("mnist", tmp_path / "mnist", source)
    assert [file.read_bytes().decode() for file in files] == list(download.STEMS)


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert download.cache_folder() == tmp_path / "drawwell"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert download.cache_folder() == Path.home() / ".cache" / "drawwell"
