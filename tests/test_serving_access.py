"""Who may ask the server, by which names, and what it reads for them."""

import contextlib
import dataclasses
import gc
import http.client
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from helpers import MODEL
from serving_tools import LIMIT, STORY, Running, until

from mlx_turboquant.errors import RequestError
from mlx_turboquant.integrations.rows import GuardedBatch
from mlx_turboquant.serving import images, lingering
from mlx_turboquant.serving.guard import Access
from mlx_turboquant.serving.service import Limits

PIXEL = b"\x89PNG\r\n\x1a\n" + b"0" * 100


@pytest.fixture(scope="module")
def running():
    made = Running(
        access=Access(
            api_keys=("one", "zwei-ü"),
            hosts=("mac.local",),
            origins=("https://chat.example",),
            max_body=10_000,
        ),
        limits=Limits(max_body=10_000),
        allowed=("gpt-4o=default_model", "other=/no/such/model"),
    )
    yield made
    made.close()


KEY = {"Authorization": "Bearer one"}
BODY = json.dumps({"prompt": "The", "max_tokens": 1})


def status_of(running, headers, **request):
    return running.raw(BODY, headers, **request)[0]


def test_a_key_is_asked_for(running):
    assert status_of(running, {}) == 401
    assert status_of(running, {"Authorization": "Bearer two"}) == 401
    assert status_of(running, {"Authorization": "one"}) == 401
    assert status_of(running, {"Authorization": "Bearer"}) == 401
    assert status_of(running, {"x-api-key": "on"}) == 401
    assert status_of(running, KEY) == 200
    assert status_of(running, {"x-api-key": "one"}) == 200
    status, answer = running.raw(None, {}, "GET", "/metrics")
    assert status == 401
    assert answer["error"]["code"] == "invalid_api_key"
    assert running.raw(None, {}, "GET", "/health") == (200, {"status": "ok"})
    status, answer = running.raw("{}", {}, path="/v1/messages")
    assert (status, answer["error"]["type"]) == (401, "authentication_error")


def test_names_that_are_not_the_servers_are_refused(running):
    """A page of another site reaches the server by a name of that site's."""
    for host in ("evil.example", "evil.example:80", "", "127.0.0.1.evil.example"):
        status, answer = running.raw(BODY, {**KEY, "Host": host})
        assert status == 403, host
        assert "--allowed-hosts" in answer["error"]["message"]
    for host in ("localhost", "LOCALHOST:8080", "mac.local:1", "127.0.0.1", "[::1]:80"):
        assert status_of(running, {**KEY, "Host": host}) == 200, host


def test_pages_of_other_origins_are_refused(running):
    evil = {**KEY, "Origin": "https://evil.example"}
    assert status_of(running, evil) == 403
    assert status_of(running, {**KEY, "Origin": "https://chat.example"}) == 200
    connection = http.client.HTTPConnection("127.0.0.1", running.port)
    asks = {"Access-Control-Request-Method": "POST", "Origin": "https://chat.example"}
    connection.request("OPTIONS", "/v1/chat/completions", headers=asks)
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200
    assert answer.getheader("Access-Control-Allow-Origin") == "https://chat.example"
    connection.close()


def test_wrong_methods_and_paths_get_openais_error_form(running):
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("PATCH", "/nothing", 404),
        ("GET", "/v1/models/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
    ):
        got, answer = running.raw(None, KEY, method, path)
        assert got == status, path
        assert answer["error"]["type"] in ("invalid_request_error", "not_found_error")
        assert answer["error"]["message"]


def test_bodies_are_bounded_in_size_and_time(running):
    status, answer = running.raw(b"", {**KEY, "Content-Length": str(1 << 40)})
    assert status == 413
    assert "at most 10000" in answer["error"]["message"]
    chunks = (b"x" * 1000 for _ in range(100))  # no length is said
    status, answer = running.raw(chunks, KEY)
    assert status == 413
    before = running.service._limits
    running.service._limits = dataclasses.replace(before, body_seconds=1.0)
    try:
        status, answer = running.raw(b"{", {**KEY, "Content-Length": "100"})
    finally:
        running.service._limits = before
    assert status == 408
    assert "longer than 1 s" in answer["error"]["message"]
    for wrong in ("-5", "ten"):
        assert running.raw(None, {**KEY, "Content-Length": wrong})[0] == 400


@pytest.mark.parametrize("key", ["one", "two"])
def test_a_client_that_sends_on_reads_why_it_was_refused(running, key, monkeypatch):
    """Not a reset connection, which a socket closed with bytes unread would give."""
    monkeypatch.setattr(lingering, "SECONDS", LIMIT)
    sock = socket.create_connection(("127.0.0.1", running.port), timeout=LIMIT)
    with contextlib.closing(sock):
        head = (
            "POST /v1/completions HTTP/1.1",
            "Host: localhost",
            f"Authorization: Bearer {key}",
            "Transfer-Encoding: chunked",
        )
        sock.sendall("\r\n".join((*head, "", "")).encode())
        for _ in range(40):
            sock.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
            time.sleep(0.01)
        sock.sendall(b"0\r\n\r\n")
        answer = sock.recv(10_000)
    assert b" 413 " in answer if key == "one" else b" 401 " in answer


def test_only_what_the_server_was_started_with_is_loaded(running):
    for name in ("default_model", str(MODEL), "gpt-4o", None):
        fields = {"prompt": "The", "max_tokens": 1, "model": name}
        status, answer = running.raw(json.dumps(fields), KEY)
        assert (status, answer["model"]) == (200, name or "default_model")
    for field in ("model", "adapters", "draft_model"):
        for name in ("/etc", "../books-20m", "mlx-community/other", "a" * 500):
            fields = {"prompt": "The", field: name}
            status, answer = running.raw(json.dumps(fields), KEY)
            assert status == 404, (field, name)
            assert answer["error"]["param"] == field
            assert answer["error"]["code"] == "model_not_found"
    status, answer = running.raw(None, KEY, "GET", "/v1/models")
    listed = [model["id"] for model in answer["data"]]
    assert listed == [str(MODEL), "gpt-4o", "other"]
    status, answer = running.raw(None, KEY, "GET", "/v1/models/gpt-4o")
    assert (status, answer["id"]) == (200, "gpt-4o")


def test_a_listed_model_that_is_not_there_and_back(running):
    client = running.client.with_options(api_key="one")
    with pytest.raises(openai.InternalServerError, match="no/such"):
        client.completions.create(model="other", prompt="a")
    answer = client.completions.create(model="gpt-4o", prompt="The", max_tokens=2)
    assert answer.usage.completion_tokens == 2


def test_image_links_are_no_way_into_the_network(running, monkeypatch):
    monkeypatch.setattr(running.generator.model_provider, "processor", object())
    for url, says in (
        ("file:///etc/passwd", "no http, https or data link"),
        ("ftp://example.com/a.png", "no http, https or data link"),
        ("/etc/passwd", "no http, https or data link"),
        (f"http://127.0.0.1:{running.port}/health", "not public"),
        ("http://localhost/a.png", "not public"),
        ("http://169.254.169.254/latest/meta-data", "not public"),
        ("http://[::1]/a.png", "not public"),
        ("http://[::ffff:127.0.0.1]/a.png", "not public"),
        ("http://2130706433/a.png", "not public"),
        ("http://10.0.0.1/a.png", "not public"),
        ("http://127.0.0.1:99999/a.png", "cannot be read"),
    ):
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        fields = {"messages": [{"role": "user", "content": parts}]}
        status, answer = running.raw(
            json.dumps(fields), KEY, path="/v1/chat/completions"
        )
        assert status == 400, url
        assert says in answer["error"]["message"], url
        assert answer["error"]["param"] == "messages.0.content.0"


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
    ],
)
def test_which_addresses_are_public(address, is_public):
    assert images.is_public(address) == is_public


@pytest.fixture
def pictures(monkeypatch):
    """A site of pictures at 127.0.0.1, which counts as public here; 127.0.0.2 not."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            to = {
                "/inside": "http://127.0.0.2/",
                "/file": "file:///etc/passwd",
                "/round": "/round",
                "/once": "/a.png",
            }.get(self.path)
            self.send_response(302 if to else 200)
            if to:
                self.send_header("Location", to)
            kind = "text/html" if self.path == "/page" else "image/png"
            self.send_header("Content-Type", kind)
            self.end_headers()
            if self.path == "/large":
                self.wfile.write(b"0" * 5000)
            elif not to:
                self.wfile.write(PIXEL)

        def log_message(self, *ignored):
            pass

    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever).start()
    monkeypatch.setattr(images, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(images, "MAX_BYTES", 4000)
    yield f"http://127.0.0.1:{site.server_address[1]}"
    site.shutdown()
    site.server_close()


def test_pictures_are_fetched(pictures):
    for path in ("/a.png", "/once"):
        url = images.as_data_url(pictures + path, "here")
        assert url.startswith("data:image/png;base64,iVBORw0KGgowMDAw")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/inside", "127.0.0.2, not public"),
        ("/file", "no http, https or data link"),
        ("/round", "too many redirects"),
        ("/page", "is text/html"),
        ("/large", "more than 4000 bytes"),
    ],
)
def test_what_is_no_picture_is_refused(pictures, path, says):
    with pytest.raises(RequestError, match=says):
        images.as_data_url(pictures + path, "here")


def test_a_name_is_resolved_once(pictures, monkeypatch):
    """A second answer of its name server's leads nowhere: the address is kept."""
    answers = iter(["127.0.0.1", "127.0.0.2"])
    real = socket.getaddrinfo

    def resolve(host, *rest, **named):
        return real(next(answers) if host == "two.example" else host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = pictures.replace("127.0.0.1", "two.example") + "/a.png"
    assert images.as_data_url(url, "here").startswith("data:image/png")


def test_a_client_that_hangs_up_frees_its_row(running):
    """Streamed or not, while its prompt is read and while it is answered."""
    for is_streamed in (False, True):
        for wait in (0.0, 0.5):
            body = {"prompt": STORY[:400], "max_tokens": 6000, "stream": is_streamed}
            connection = http.client.HTTPConnection("127.0.0.1", running.port)
            connection.request(
                "POST", "/v1/completions", body=json.dumps(body), headers=KEY
            )
            time.sleep(wait)
            connection.close()
            until(lambda: not running.generator.open_tickets())
    # The rows are gone, not only their readers.
    until(lambda: not rows_of_batches())
    assert status_of(running, KEY) == 200


def rows_of_batches():
    """Rows that any server of this process is reading or writing."""
    batches = [one for one in gc.get_objects() if type(one) is GuardedBatch]
    return sum(len(one._generation_batch) + len(one._prompt_batch) for one in batches)
