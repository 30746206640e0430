"""guarded_fetch against a real server: each attack is refused, good pictures arrive as without the guard."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from data_tools.fetch import guarded_fetch
from data_tools.fetch.addresses import may_connect, may_connect_now, why_not
from data_tools.fetch.guarded_fetch import Limits, Refused, opener
from data_tools.fetch.reasons import OTHER, reason_of
from tests.data_tools.hostile_server import ATTACKS, GOOD, KINDS, picture

HERE = ("127.0.0.1/32",)
LIMITS = Limits(max_bytes=2_000_000, deadline=0.6, allow=HERE)
# Attacks that only a decoder detects are in tests/data_tools/test_download.py.
DECODED = {"huge", "truncated", "html", "empty", "tiny", "long", "gzip_bomb", "noai"}


def fetched(url: str, limits: Limits = LIMITS, timeout: float = 5) -> bytes:
    with opener(limits).open(url, timeout=timeout) as response:
        return response.read()


def refusal(url: str, limits: Limits = LIMITS, timeout: float = 5) -> str:
    """The reason with which a fetch ends, within its deadline."""
    start = time.monotonic()
    with pytest.raises((OSError, ValueError, urllib.error.URLError, Exception)) as raised:
        fetched(url, limits, timeout)
    assert time.monotonic() - start < limits.deadline + 2
    return reason_of(str(raised.value))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in GOOD and kind not in DECODED])
def test_each_attack_is_refused_with_its_reason(server, kind):
    assert refusal(server.url(kind, 3)) == KINDS[kind]


@pytest.mark.parametrize("kind", [*GOOD, "truncated", "html", "empty", "gzip_bomb"])
def test_good_pictures_arrive_byte_for_byte(server, kind):
    plain = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(server.url(kind, 3), timeout=5)
    assert fetched(server.url(kind, 3)) == plain.read()


def test_failures_read_as_they_do_without_the_guard(server):
    for kind in ("not_found", "error", "refused", "reset", "short_body"):
        messages = []
        for open_ in (opener(LIMITS).open, urllib.request.build_opener(urllib.request.ProxyHandler({})).open):
            with pytest.raises(Exception) as raised, open_(server.url(kind, 3), timeout=5) as response:
                response.read()
            messages.append(str(raised.value))
        assert messages[0] == messages[1], kind


def test_this_machine_is_not_public(server):
    before = len(server.requests)
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f000001"):
        url = f"http://{host}:{server.port}/jpg/1"
        assert refusal(url, Limits(deadline=5)) in ("not_public_address", "unreachable"), host
    assert len(server.requests) == before


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *[(address, True) for address in ("8.8.8.8", "93.184.216.34", "2606:4700::1111", "64:ff9b::8.8.8.8")],
        *[(address, False) for address in ("10.0.0.1", "172.16.0.1", "192.168.1.1", "127.0.0.1", "0.0.0.0")],
        *[(address, False) for address in ("169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255")],
        *[(address, False) for address in ("192.0.0.8", "192.0.2.1", "198.18.0.1", "203.0.113.5", "240.0.0.1")],
        *[(address, False) for address in ("::", "::1", "fe80::1%eth0", "fc00::1", "ff02::1", "2001:db8::1")],
        *[(address, False) for address in ("::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::10.0.0.1")],
        *[(address, False) for address in ("168.63.129.16", "::ffff:168.63.129.16", "64:ff9b::168.63.129.16")],
        *[(address, False) for address in ("2002:7f00:1::", "2001:0:7f00:1::", "::127.0.0.1", "nonsense", "")],
    ],
)
def test_which_addresses_are_public(address, public):
    assert may_connect(address) == public


def test_an_intranet_may_be_allowed():
    allow = ("10.1.0.0/16", "fd00::/8")
    assert may_connect("10.1.2.3", allow) and may_connect("::ffff:10.1.2.3", allow) and may_connect("fd00::5", allow)
    assert not may_connect("10.2.2.3", allow) and not may_connect("127.0.0.1", allow)


@pytest.mark.parametrize(
    "address",
    ["20.1.2.3", "::ffff:20.1.2.3", "64:ff9b::20.1.2.3", "2002:1401:203::1", "2001:0:1:1::ebfe:fdfc", "2606:4700::1"],
)
def test_a_refused_network_wins_in_whatever_form_it_is_written(address):
    """The inside of some clusters uses public numbers."""
    refuse = ("20.0.0.0/8", "2606:4700::/32")
    everything = ("0.0.0.0/0", "::/0")
    assert may_connect(address, everything) and not may_connect(address, everything, refuse)
    assert why_not(address, (), refuse) == "refused_address"
    assert may_connect("21.1.2.3", (), refuse) and may_connect("2606:4701::1", (), refuse)


def test_a_refused_address_is_not_asked(server):
    before = len(server.requests)
    assert refusal(server.url("jpg", 1), Limits(allow=HERE, refuse=("127.0.0.0/8",))) == "refused_address"
    assert len(server.requests) == before


@pytest.mark.parametrize(
    ("message", "again"),
    [
        ("<urlopen error guard: not_public_address 10.1.2.3>", True),
        ("guard: not_public_address 10.2.2.3", False),
        ("guard: not_public_address 10.2.2.3,10.1.2.3", True),
        ("<urlopen error guard: refused_address 10.1.2.3>", True),
        ("<urlopen error guard: refused_address 20.1.2.3>", False),
        ("guard: refused_address 8.8.8.8", True),
        ("guard: not_public_address fe80::1%eth0,fd00::1", True),
        ("guard: not_public_address", False),
        ("guard: too_many_bytes 10", False),
        ("HTTP Error 404: Not Found", False),
        (None, False),
    ],
)
def test_which_rows_may_be_tried_again(message, again):
    assert may_connect_now(message, ("10.1.0.0/16", "fd00::/8"), ("20.0.0.0/8",)) == again


def test_a_refusal_names_every_address(monkeypatch):
    answered(monkeypatch, [["10.0.0.1", "127.0.0.1"]], OSError())
    with pytest.raises(urllib.error.URLError, match=r"guard: not_public_address 10\.0\.0\.1,127\.0\.0\.1>"):
        fetched("http://both.example/", Limits(deadline=5))


def answered(monkeypatch, addresses: list[list[str]], error: OSError) -> tuple[list, list]:
    """(names looked up, places connected to); the n-th look-up gives the n-th addresses, and connections the error."""
    lookups, places = [], []

    def getaddrinfo(host, port, *args, **kwargs):
        lookups.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses[len(lookups) - 1]]

    def connect(self, place):
        places.append(place)
        raise error

    monkeypatch.setattr(guarded_fetch.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(guarded_fetch._Socket, "connect", connect)
    return lookups, places


def test_a_name_that_changes_its_address_is_looked_up_once(server, monkeypatch):
    """DNS rebinding: public for the check, private for the connection."""
    lookups, places = answered(
        monkeypatch, [["93.184.216.34"], ["127.0.0.1"]], ConnectionRefusedError(111, "Connection refused")
    )
    assert refusal(f"http://rebinding.example:{server.port}/jpg/1", Limits(deadline=5)) == "refused"
    assert lookups == ["rebinding.example"] and places == [("93.184.216.34", server.port)]
    assert refusal(f"http://rebinding.example:{server.port}/jpg/1", Limits(deadline=5)) == "not_public_address"
    assert len(places) == 1


def test_of_several_addresses_only_the_public_ones_are_tried(monkeypatch):
    addresses = ["10.0.0.1", "8.8.8.8", "127.0.0.1"]
    _, places = answered(monkeypatch, [addresses], OSError(101, "Network is unreachable"))
    assert refusal("http://both.example/", Limits(deadline=5)) == "unreachable"
    assert places == [("8.8.8.8", 80)]


def test_proxies_of_the_environment_are_ignored(server, monkeypatch):
    """A proxy would connect to addresses that the guard never sees."""
    before = len(server.requests)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.port}")
    assert refusal("http://10.255.255.1/secret") == "not_public_address"
    assert len(server.requests) == before
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetched(server.url("jpg", 1)) == picture(1)


def test_the_limit_is_on_received_bytes(server):
    for kind in ("jpg", "no_length", "chunked"):
        size = len(picture(5))
        assert len(fetched(server.url(kind, 5), Limits(max_bytes=size, allow=HERE))) == size
        assert refusal(server.url(kind, 5), Limits(max_bytes=size - 1, allow=HERE)) == "too_many_bytes"


def test_redirects_are_counted_from_the_first(server):
    assert fetched(server.url("redirect", 1), Limits(max_redirects=1, allow=HERE)) == picture(1)
    assert refusal(server.url("redirect", 1), Limits(max_redirects=0, allow=HERE)) == "too_many_redirects"
    before = len(server.requests)
    refusal(server.url("redirect_loop", 1), Limits(max_redirects=5, allow=HERE))
    assert len(server.requests) - before == 6


def test_a_redirect_shares_the_deadline(server):
    quick = Limits(deadline=0.02, max_redirects=1000, allow=HERE)  # a redirect takes about a millisecond
    assert refusal(server.url("redirect_loop", 1), quick) == "deadline"


def test_a_read_may_time_out_before_the_deadline(server):
    assert refusal(server.url("slow_headers", 1), Limits(deadline=20, allow=HERE), timeout=0.01) == "timeout"


@pytest.mark.parametrize(
    "url", ["http:///nohost.jpg", "http://a b/", "http://[::1", "http://x:y/", "nothing", "http://é.\x00/"]
)
def test_broken_urls_have_a_reason(url):
    assert refusal(url) in ("bad_url", "not_http", "dns")


def test_wrong_limits_are_one_sentence():
    for wrong, words in (({"max_bytes": 0}, "--max-bytes=0"), ({"deadline": 0}, "--deadline=0")):
        with pytest.raises(ValueError, match=words):
            Limits(**wrong)
    with pytest.raises(ValueError, match=r"--allow-address=10\.0\.0\.1/8: .*write 10\.1\.0\.0/16"):
        Limits(allow=("10.0.0.1/8",))
    with pytest.raises(ValueError, match="--refuse-address=here: "):
        Limits(refuse=("here",))


def test_every_kind_has_a_name_and_unknown_words_are_other():
    assert reason_of(None) == "success" and reason_of("a tree fell") == OTHER
    assert reason_of(str(urllib.error.URLError(Refused("too_many_bytes", 7)))) == "too_many_bytes"
    assert reason_of("HTTP Error 418: I'm a teapot") == "http_418"
    assert {*ATTACKS.values()} >= {"deadline", "not_public_address", "too_many_bytes", "too_many_redirects"}


@pytest.fixture(scope="module")
def pem(tmp_path_factory) -> str:
    """Key and certificate of a server on 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    home = tmp_path_factory.mktemp("pem")
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    line += f" -addext subjectAltName=IP:127.0.0.1 -keyout {home}/key.pem -out {home}/cert.pem"
    subprocess.run(line.split(), check=True, capture_output=True)
    return (home / "key.pem").read_text() + (home / "cert.pem").read_text()


@contextlib.contextmanager
def secure(tmp_path, pem: str, answer: bytes, pause: float = 0, handshake: bool = True) -> Iterator[str]:
    """A TLS server that sends `answer` byte by byte, or that never shakes hands."""
    (tmp_path / "server.pem").write_text(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connections = []  # so that they stay open

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = listening.accept()[0]
                    connections.append(connection)
                    if handshake:
                        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
                            tls.recv(65_536)
                            for at in range(0, len(answer), 1 if pause else len(answer)):
                                tls.sendall(answer[at : at + 1] if pause else answer)
                                time.sleep(pause)

        threading.Thread(target=serve, daemon=True).start()
        yield f"https://127.0.0.1:{listening.getsockname()[1]}/a.jpg"


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n" + b"x" * 20


@pytest.fixture
def trusted(monkeypatch, pem):
    context = ssl.create_default_context(cadata=pem[pem.index("-----BEGIN CERT") :])
    context.sslsocket_class = guarded_fetch._TlsSocket
    monkeypatch.setattr(guarded_fetch, "_tls", lambda: context)


def test_https_works(tmp_path, pem, trusted):
    with secure(tmp_path, pem, ANSWER) as url:
        assert fetched(url) == b"x" * 20
        assert refusal(url, Limits(deadline=5)) == "not_public_address"


def test_an_unknown_certificate_is_refused(tmp_path, pem):
    with secure(tmp_path, pem, ANSWER) as url:
        assert refusal(url) == "tls"


def test_a_slow_drip_through_tls_is_stopped(tmp_path, pem, trusted):
    with secure(tmp_path, pem, ANSWER, pause=0.1) as url:
        assert refusal(url) == "deadline"


def test_a_missing_handshake_is_stopped(tmp_path, pem, trusted):
    with secure(tmp_path, pem, ANSWER, handshake=False) as url:
        assert refusal(url) in ("timeout", "deadline")
