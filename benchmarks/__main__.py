"""python -m benchmarks [NAME ...]: run the named benchmarks, or all of them, at their default settings.

A benchmark is a module of this package with a `main()`; `python -m benchmarks.NAME --help` says what it takes.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks


def main() -> int:
    known = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_")]
    asked = sys.argv[1:] or known
    unknown = [name for name in asked if name not in known]
    if unknown:
        print(f"benchmarks: no {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    for name in asked:
        sys.argv = [f"benchmarks.{name}"]
        importlib.import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
