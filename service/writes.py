"""Who may change what the server answers with. There are no accounts: a setting says whether anyone may at all.

See docs/decisions/0010-who-may-recalibrate.md.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request

from service.errors import Forbidden
from service.settings import Settings

SETTING = "DRAWWELL_ALLOW_CALIBRATION"


def check(request: Request, settings: Settings) -> None:
    """Raises `Forbidden` for a request that may not write, and says which setting forbids it."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        raise Forbidden(f"a page of {origin} asks, which is not of this server: pages of others may not write")
    if settings.allow_calibration == "yes":
        return
    if settings.allow_calibration == "no":
        raise Forbidden(f"this server takes no calibrations: {SETTING} is no")
    if not is_loopback(settings.host):
        raise Forbidden(
            f"this server takes no calibrations, since it listens on {settings.host} and {SETTING} is auto: yes lets "
            "whoever reaches it recalibrate"
        )
    if not is_loopback(urlsplit(f"//{host}").hostname or ""):
        # A page that had its own name lead to 127.0.0.1 could be the one that asks.
        raise Forbidden(
            f"asked for as {host}, which is not this machine's own name for itself: {SETTING}=yes takes any name"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine is meant."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
