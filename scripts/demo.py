"""make demo: starts a server, shows every model through the client, then leaves the server running until Ctrl-C.

python scripts/demo.py --models zoo --port 8000 --out demo-out
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

GRACE = 15.0  # seconds that a process has to end by itself


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve some models, show each of them, and go on serving.")
    parser.add_argument("--models", type=Path, default=Path("zoo"))
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    arguments = parser.parse_args()
    url = f"http://127.0.0.1:{arguments.port}"
    if not any(arguments.models.glob("*/model.json")):
        return _fail(f"{arguments.models}: holds no model (a folder with a model.json); train one with `make train`")
    if not _free(arguments.port):
        return _fail(f"port {arguments.port} is taken by another program; choose another: make demo PORT=8001")

    serve = [sys.executable, "-m", "service", "serve", "--models", str(arguments.models), "--port", str(arguments.port)]
    show = [sys.executable, "-m", "drawwell.demo", "--url", url, "--out", str(arguments.out)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "server.log"
    running: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that both ways of ending it end the server too
    try:
        print(f"starting the server at {url}; its messages go to {log}", flush=True)
        with log.open("wb") as messages:
            running.append(server := subprocess.Popen(serve, stdout=messages, stderr=subprocess.STDOUT))
        running.append(demo := subprocess.Popen(show))
        while demo.poll() is None and server.poll() is None:
            time.sleep(0.1)
        if demo.poll() == 0:
            print(f"\nThe pictures are in {arguments.out}/. The server goes on; its pages: {url}/docs. Ctrl-C ends it.")
            server.wait()
        if server.poll() is not None:
            return _fail(f"the server ended with status {server.returncode}; it said last:\n{_tail(log)}")
        return _fail(f"not everything could be shown; the server said last:\n{_tail(log)}")
    except KeyboardInterrupt:
        return 0
    finally:
        for process in reversed(running):
            _end(process)


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for a server
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _fail(message: str) -> int:
    print(f"demo: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
