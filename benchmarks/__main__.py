"""python -m benchmarks [NAME ...] [--minutes 20]: run the named benchmarks, or all, and bring the page up to date.

The minutes are shared out among them by how much each has to measure. `python -m benchmarks.NAME --help` says what a
single one takes; `python -m benchmarks --page-only` only writes docs/benchmarks.md anew from the files of measurements.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from typing import Any

from benchmarks import _frame, _page
from benchmarks.peers._peers import PEERS

# In the order in which they run.
MODULES = {
    "scheduler": "benchmarks.scheduler",
    "broker": "benchmarks.broker",
    "cache": "benchmarks.cache",
    "sampling": "benchmarks.sampling",
    "quality": "benchmarks.quality",
    "device": "benchmarks.device",
    "overhead": "benchmarks.overhead",
    "mixed": "benchmarks.mixed",
    "scoring": "benchmarks.scoring",
    "pool": "benchmarks.pool",
    "peers": "benchmarks.peers.measure",
}


def main() -> int:
    parser = _frame.parser("python -m benchmarks", __doc__)
    parser.set_defaults(minutes=20.0)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODULES)}; none: all of them")
    parser.add_argument("--page-only", action="store_true", help="measure nothing; write the page anew")
    args = parser.parse_args()
    names = args.names or list(MODULES)
    if not args.names and not any(peer.installed for peer in PEERS.values()):
        print("benchmarks: peers are left out, as none is set up: make peers", file=sys.stderr)
        names.remove("peers")
    if unknown := [name for name in names if name not in MODULES]:
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(MODULES)}")
    modules = {name: importlib.import_module(MODULES[name]) for name in names}
    failed = [] if args.page_only else _measure(modules, args)
    _page.update(args, modules)
    for name, problem in failed:
        print(f"benchmarks: {name} failed: {problem}", file=sys.stderr)
    return 1 if failed else 0


def _measure(modules: dict[str, Any], args: argparse.Namespace) -> list[tuple[str, str]]:
    """Run each; a benchmark that fails does not keep the others from running. Returns what failed, and why."""
    ends, failed = time.monotonic() + 60 * args.minutes, []
    least = min(args.minutes, 1.0)  # in seconds, even where those before it have taken all: 0 would be another thing
    left = sum(module.WEIGHT for module in modules.values())
    for name, module in modules.items():
        seconds = max(least, (ends - time.monotonic()) * module.WEIGHT / left)
        left -= module.WEIGHT
        given = argparse.ArgumentParser()
        module.arguments(given)
        own = given.parse_args([], argparse.Namespace(**vars(args)))
        command = f"python -m benchmarks {' '.join(args.names)} --minutes {args.minutes:g}".replace("  ", " ")
        print(f"benchmarks: {name}, {seconds / 60:.1f} minutes", flush=True)
        try:
            path = _frame.measure(name, module, own, seconds, command)
        except (Exception, SystemExit) as e:
            traceback.print_exc()
            failed.append((name, f"{type(e).__name__}: {e}"))
        else:
            _page.show(path, module)
    return failed


if __name__ == "__main__":
    sys.exit(main())
