"""URLs with blanks and letters of any script reach the server as a browser's would."""

from __future__ import annotations

import socket

import pytest

from data_tools.fetch import guarded_fetch
from data_tools.fetch.guarded_fetch import Limits, opener
from data_tools.fetch.reasons import reason_of
from data_tools.fetch.urls import as_browsers_send
from tests.data_tools.hostile_server import picture


# Expected: by the URL standard.
@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://a.example/plain/~b-c_d.jpg?x=1&y=a+b", "http://a.example/plain/~b-c_d.jpg?x=1&y=a+b"),
        ("http://a.example/a b.jpg", "http://a.example/a%20b.jpg"),
        ("  http://a.example/b.jpg \n", "http://a.example/b.jpg"),
        ("http://a.example/a\tb\r\nc.jpg", "http://a.example/abc.jpg"),
        ("http://a.example/café/日本.jpg", "http://a.example/caf%C3%A9/%E6%97%A5%E6%9C%AC.jpg"),
        ("http://a.example/cafe\u0301.jpg", "http://a.example/cafe%CC%81.jpg"),
        ("http://a.example/😀.jpg?q=é ü", "http://a.example/%F0%9F%98%80.jpg?q=%C3%A9%20%C3%BC"),
        ("http://a.example/caf%C3%A9 %20%zz%.jpg", "http://a.example/caf%C3%A9%20%20%zz%.jpg"),
        ("http://a.example/%E9.jpg?%E9", "http://a.example/%E9.jpg?%E9"),
        ("http://a.example/\"<`{}>'()[]|.jpg", "http://a.example/%22%3C%60%7B%7D%3E'()[]|.jpg"),
        ("http://a.example/?\"<`{}>'()[]|\\^", "http://a.example/?%22%3C`{}%3E%27()[]|\\^"),
        ("http://a.example/a?b?c#d é", "http://a.example/a?b?c"),
        ("http://a.example#d", "http://a.example"),
        ("HTTP://A.example?é", "HTTP://A.example?%C3%A9"),
        ("http:\\\\a.example\\b\\c.jpg?d\\e", "http://a.example/b/c.jpg?d\\e"),
        ("https://bücher.example:8443/ü", "https://xn--bcher-kva.example:8443/%C3%BC"),
        ("https://BÜCHER.example/", "https://xn--bcher-kva.example/"),
        ("https://bu\u0308cher.example/", "https://xn--bcher-kva.example/"),
        ("https://b%C3%BCcher.example/", "https://xn--bcher-kva.example/"),
        ("https://faß.example/", "https://xn--fa-hia.example/"),
        ("https://ΣΊΣΥΦΟΣ.example/", "https://xn--kxa6akbbkh.example/"),
        ("https://日本語。jp/", "https://xn--wgv71a119e.jp/"),
        ("https://i\u2764\ufe0f.ws/", "https://xn--i-7iq.ws/"),
        ("https://\uff47\uff4f.com/", "https://go.com/"),
        ("http://a%2Eexample/", "http://a.example/"),
        ("http://[::1]:80/é", "http://[::1]:80/%C3%A9"),
        ("http://me:sécret@a.example/", "http://me:sécret@a.example/"),
        ("http:///b c.jpg", "http:///b%20c.jpg"),
        ("file:///a b", "file:///a b"),
        ("no url é", "no url é"),
    ],
)
def test_a_url_is_sent_as_browsers_send_it(url, sent):
    assert as_browsers_send(url) == sent
    assert as_browsers_send(sent) == sent


@pytest.mark.parametrize(
    "host", ["a%2Fb.example", "a%00.example", "é%40b.example", "é b.example", "%ff.example", "é<.x"]
)
def test_a_host_that_no_browser_takes_is_a_bad_url(host):
    with pytest.raises(ValueError, match="no browser takes") as raised:
        as_browsers_send(f"http://{host}/")
    assert reason_of(str(raised.value)) == "bad_url"


def fetched(url: str) -> bytes:
    with opener(Limits(deadline=5, allow=("127.0.0.1/32",))).open(url, timeout=5) as response:
        return response.read()


def test_the_picture_arrives(server):
    body = picture(7)
    server.serve("caf%C3%A9%20au%20lait.jpg", body)
    assert fetched(f"http://127.0.0.1:{server.port}/own/café au lait.jpg?größe=1 x") == body
    assert fetched(f"http://127.0.0.1:{server.port}/own/caf%C3%A9 au%20lait.jpg") == body
    assert server.requests[-2:] == ["/own/caf%C3%A9%20au%20lait.jpg"] * 2


def test_a_host_is_looked_up_by_its_ascii_name(server, monkeypatch):
    asked = []

    def getaddrinfo(host, port, **kwargs):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(guarded_fetch.socket, "getaddrinfo", getaddrinfo)
    assert fetched(f"http://bücher.example:{server.port}/jpg/7") == picture(7)
    assert asked == ["xn--bcher-kva.example"]
