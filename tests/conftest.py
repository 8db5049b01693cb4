"""Shared fixtures, and the rule for tests that need the real data sets.

A test marked `realdata` is skipped where Fashion-MNIST and MNIST are not at hand; it never downloads them. With
DRAWWELL_REQUIRE_DATA=1 it fails instead, so that a machine that has the data cannot silently test without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import brokers
import pytest
from redis_server import RedisServer

from training import data, download

REAL = ("fashion-mnist", "mnist")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("realdata") is None:
        return
    folder = Path(os.environ.get(data.ENVIRONMENT) or download.cache_folder())
    missing = [name for name in REAL if not _holds(folder / name)]
    if missing:
        reason = f"{' and '.join(missing)} not in {folder}; set {data.ENVIRONMENT} to the folder that holds them"
        if os.environ.get("DRAWWELL_REQUIRE_DATA") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def _holds(folder: Path) -> bool:
    return all((folder / f"{stem}.gz").is_file() or (folder / stem).is_file() for stem in download.STEMS)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for tests that leave it running."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["local", "redis"])
def kind(request: pytest.FixtureRequest) -> brokers.Kind:
    """Either broker."""
    if request.param == "local":
        return brokers.Local()
    server: RedisServer = request.getfixturevalue("redis_server")
    server.flush()
    return brokers.Distributed(server)


@pytest.fixture(scope="session")
def fashion_mnist() -> data.Dataset:
    """Fashion-MNIST; for tests marked `realdata`."""
    return data.load("fashion-mnist")


@pytest.fixture(scope="session")
def mnist() -> data.Dataset:
    """MNIST; for tests marked `realdata`."""
    return data.load("mnist")


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    """scikit-learn's 8×8 digits."""
    return data.load("digits")
