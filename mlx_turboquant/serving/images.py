"""Images that requests link to: fetched from public addresses only, bounded.

A link is the client's word, and the server reads it: so no files, no address of this
machine or its network, no redirects to either, and no more bytes or time than an image
needs. The name is resolved once, and the connection goes to the address that was
checked.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import socket
import ssl
import time
from typing import Any
from urllib.parse import urljoin, urlsplit

from ..errors import RequestError
from ..version import __version__

MAX_BYTES = 20 << 20
_SECONDS = 30.0
_REDIRECTS = 3


def inline(messages: list[dict[str, Any]]) -> None:
    """Put the bytes of linked images in the place of their links, in place.

    Raises:
        RequestError: for links that are not followed, or lead to no image.
    """
    for index, message in enumerate(messages):
        content = message.get("content")
        for place, part in enumerate(content if isinstance(content, list) else ()):
            if part.get("type") == "text":
                continue
            param = f"messages.{index}.content.{place}"
            given = part.get("image_url", part.get("image"))
            url = given.get("url") if isinstance(given, dict) else given
            if not isinstance(url, str):
                raise RequestError(f"{param} has no image", "add its url", param=param)
            part.clear()
            part.update(type="image_url", image_url={"url": as_data_url(url, param)})


def as_data_url(url: str, param: str) -> str:
    """An image's bytes as a data URL.

    Args:
        url: A ``data:`` URL, which stays as it is, or an http or https one.
        param: Where the request has it, for errors.

    Raises:
        RequestError: as `inline`.
    """
    deadline = time.monotonic() + _SECONDS
    for _ in range(_REDIRECTS + 1):
        if url.startswith("data:"):
            return url
        try:
            status, headers, data = _get(url, param, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = f"image {_short(url)} cannot be read ({error})"
            raise _refusal(why, param) from None
        if status in (301, 302, 303, 307, 308) and headers.get("Location"):
            url = urljoin(url, headers["Location"])
            if url.startswith("data:"):
                break
            continue
        if status != 200:
            raise _refusal(f"image {_short(url)} gave status {status}", param)
        kind = headers.get_content_type()
        if not kind.startswith("image/"):
            raise _refusal(f"image {_short(url)} is {kind}", param)
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"
    raise _refusal(f"image {_short(url)} is behind too many redirects", param)


def _get(
    url: str, param: str, deadline: float
) -> tuple[int, http.client.HTTPMessage, bytes]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _refusal(f"image {_short(url)} is no http, https or data link", param)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = _public_address(parts.hostname, port, param)
    connection = _Pinned(parts.hostname, port, address, parts.scheme == "https")
    try:
        path = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
        agent = {"User-Agent": f"mlx-tq/{__version__}", "Accept": "image/*"}
        connection.request("GET", path, headers=agent)
        answer = connection.getresponse()
        chunks: list[bytes] = []
        size = 0
        while chunk := answer.read1(1 << 16):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_BYTES:
                raise _refusal(
                    f"image {_short(url)} has more than {MAX_BYTES} bytes", param
                )
            if time.monotonic() > deadline:
                raise TimeoutError(f"longer than {_SECONDS:g} s")
        return answer.status, answer.headers, b"".join(chunks)
    finally:
        connection.close()


def _public_address(host: str, port: int, param: str) -> str:
    """Where a host is; all of its addresses must be public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in found]
    for address in addresses:
        if not is_public(address):
            raise _refusal(f"image host {host} is at {address}, not public", param)
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to no machine's or site's own network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        in_nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
        if in_nat64:
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inside:
            return is_public(str(inside))
    return ip.is_global and not ip.is_multicast


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, under the host's name."""

    def __init__(self, host: str, port: int, address: str, is_secure: bool) -> None:
        super().__init__(host, port, timeout=_SECONDS / 3)
        self._address, self._is_secure = address, is_secure
        self.default_port = 443 if is_secure else 80  # left out of the Host header

    def connect(self) -> None:
        """Connect to the address that was checked."""
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._is_secure:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)


def _refusal(reason: str, param: str) -> RequestError:
    return RequestError(reason, "send the image as a data URL", param=param)


def _short(url: str) -> str:
    return repr(url if len(url) <= 80 else f"{url[:77]}...")
