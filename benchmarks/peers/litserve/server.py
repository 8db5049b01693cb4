"""LitServe (https://lightning.ai/docs/litserve): `max_batch_size` and `batch_timeout` of the LitAPI, as its page on
batching says, and a worker process for each core (`workers_per_device`)."""

from __future__ import annotations

import os

import litserve
from fastapi import Response

from benchmarks.peers._sampling import Asked, Painter


class Drawing(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.painter = Painter.from_environment()

    def decode_request(self, request) -> Asked:  # type: ignore[no-untyped-def]  # LitServe reads the annotation
        return Asked(**request)

    def predict(self, x: Asked | list[Asked]) -> bytes | list[bytes]:
        """One request where `max_batch_size` is 1, else a list."""
        return self.painter.draw(x) if isinstance(x, list) else self.painter.draw([x])[0]

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


def main() -> None:
    api = Drawing(
        max_batch_size=int(os.environ["PEER_BATCH"]),
        batch_timeout=float(os.environ["PEER_WAIT"]),
        api_path="/generate",
    )
    # Without a limit: LitServe would drop what has waited for half a minute.
    workers = int(os.environ["PEER_WORKERS"])
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, timeout=False)
    server.run("127.0.0.1", int(os.environ["PEER_PORT"]), log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
