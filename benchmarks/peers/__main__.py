"""python -m benchmarks.peers setup | check [NAME ...]"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from benchmarks._frame import ROOT
from benchmarks._load import Job
from benchmarks._servers import Server, drawwell, running, subset
from benchmarks.peers._peers import PEERS
from benchmarks.peers._sampling import Asked, Painter

ASKED = (Asked("fashion-mnist-ddpm", 1, 5, 7), Asked("fashion-mnist-gan", 1, 1, 8))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Set peers up, or check them.")
    parser.add_argument("duty", choices=("setup", "check"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)}; none: all of them, and us")
    parser.add_argument("--models", type=Path, default=ROOT / "zoo", help="folder of the checkpoints to serve")
    args = parser.parse_args()
    names = args.names or list(PEERS)
    if unknown := [name for name in names if name not in PEERS]:
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if args.duty == "setup":
        for name in names:
            print(f"{name}: installing", flush=True)
            PEERS[name].setup()
        return 0
    with subset(args.models, *(asked.model for asked in ASKED)) as folder:
        ours = [] if args.names else [drawwell(folder)]
        servers = [*ours, *(PEERS[name].server(folder, PEERS[name].settings[0]) for name in names)]
        return max([check(server, folder) for server in servers])


def check(server: Server, folder: Path) -> int:
    """0 where a server draws what the models draw here, to a grey level: it has the same network behind it."""
    painter = Painter(folder)
    jobs = [Job(a.model, {"model": a.model, "n": a.n, "steps": a.steps, "seed": a.seed}) for a in ASKED]
    worst = 0
    with running(server, *jobs) as started:
        for asked, job in zip(ASKED, jobs, strict=True):
            answer = httpx.post(started.url + job.path, json=job.body, headers={"Accept": job.accept}, timeout=120)
            answer.raise_for_status()
            ours, theirs = (_pixels(png) for png in (painter.draw([asked])[0], answer.content))
            worst = max(worst, int(np.abs(ours - theirs).max()))
    print(f"{server.name}: {'the same images' if worst <= 1 else f'other images, by up to {worst} grey levels'}")
    return int(worst > 1)


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int64)


if __name__ == "__main__":
    sys.exit(main())
