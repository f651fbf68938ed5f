"""The pages as a site: built without a network, whole, loading nothing from outside."""

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from helpers import ROOT

import mlx_turboquant as tq

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None,
    reason="the extra docs is not installed: make docs",
)

#: MkDocs where every connection is refused. Not ``--quiet``: that takes warnings, which
#: are errors here, for none.
WITHOUT_NETWORK = """
import socket, sys
def refuse(*args):
    raise OSError("the build asked for the network: %s" % (args[1:],))
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *args, **kw: refuse(None, *args)
from mkdocs.__main__ import cli
cli(["build", "--config-file", sys.argv[1], "--site-dir", sys.argv[2]])
"""
#: What a browser fetches by itself, by tag.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "link": "href"}


class Page(HTMLParser):
    """Addresses that a browser fetches, ids, and the text."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.ids, self.text = [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        fetched = attrs.get(FETCHED.get(tag, ""), "")
        if fetched and attrs.get("rel") != "canonical":
            self.fetched.append(fetched)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK, ROOT / "mkdocs.yml", folder],
        capture_output=True,
        text=True,
        env={"PATH": "", "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 18
    for path in pages:
        for address in Page(path.read_text()).fetched:
            assert "//" not in address, f"{path.name} loads {address}"
    for path in site.rglob("*.css"):
        fetched = re.findall(r"url\((?!['\"]?data:)([^)]*)\)", path.read_text())
        assert not [address for address in fetched if "//" in address], path


def test_every_picture_and_log_is_there(site):
    for path in site.glob("*.html"):
        for address in Page(path.read_text()).fetched:
            local = address.partition("?")[0].lstrip("/")
            assert (site / local).is_file(), f"{path.name}: {address}"
    assert (site / "repository/benchmarks/results/step-h100.txt").is_file()


def test_the_python_page_has_every_public_name(site):
    page = Page((site / "api.html").read_text())
    named = {name.rpartition(".")[2] for name in page.ids if name}
    assert set(tq.__all__) - {"errors"} <= named
    for error in ("SpecError", "FormatError", "UnsupportedModelError"):
        assert f"mlx_turboquant.errors.{error}" in page.ids


def test_the_readme_is_the_first_page(site):
    text = Page((site / "index.html").read_text()).text
    assert "How much longer" in text
