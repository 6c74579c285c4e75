"""What `join` and `serve` say of a server that they cannot talk to, on servers of this process."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fl.engines import contact
from fl.engines.contact import meet, split_address
from fl.engines.deployment import free_port
from fl.errors import UserError

ANSWER = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact, "_PAUSE", 0.02)
    monkeypatch.setattr("urllib.request.getproxies", dict)


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], None], port: int = 0) -> Iterator[str]:
    """A server that answers each connection so; its address."""

    def work() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    answer(connection)

    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(20)
    assert not thread.is_alive()


def plain(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(ANSWER)


def tls(folder: Path, name: str) -> Callable[[socket.socket], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            plain(secure)

    return answer


def hang_up(connection: socket.socket) -> None:
    connection.recv(1)


def refused(server: str, trusted: Path | None) -> str:
    """The sentence, in good time and without the server's address."""
    since = time.monotonic()
    with pytest.raises(UserError) as caught:
        meet(server, None if trusted is None else str(trusted))
    assert time.monotonic() - since < 5
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"join: {server} ", "")


def test_servers_that_a_node_can_talk_to_are_met(certificates: Path) -> None:
    with listening(plain) as server:
        meet(server, None)
    with listening(tls(certificates, "server")) as server:
        meet(server, str(certificates / "ca.pem"))
        meet(server.replace("127.0.0.1", "localhost"), str(certificates / "ca.pem"))


def test_a_certificate_that_does_not_pass_is_one_sentence_with_the_reason(certificates: Path) -> None:
    with listening(tls(certificates, "server")) as server:
        other = certificates / "other.pem"
        expected = f"has a certificate that does not pass with {other}: unable to get local issuer certificate"
        assert refused(server, other) == expected
    with listening(tls(certificates, "elsewhere")) as server:
        said = refused(server, certificates / "ca.pem")
        assert said.startswith(f"has a certificate that does not pass with {certificates / 'ca.pem'}: ")
        assert "IP address mismatch" in said


def test_a_server_that_speaks_otherwise_than_the_node_is_one_sentence(certificates: Path) -> None:
    for answer in (tls(certificates, "server"), hang_up, lambda connection: connection.sendall(b"SSH-2.0-x\r\n")):
        with listening(answer) as server:
            assert (
                refused(server, None) == "does not speak plain HTTP, if it has a certificate give --root-certificates"
            )
    for answer in (plain, hang_up):
        with listening(answer) as server:
            said = refused(server, certificates / "ca.pem")
            assert said.startswith("does not answer in TLS (")
            assert said.endswith("), start it with certificates or the node without")


def test_a_server_that_says_nothing_yet_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, certificates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contact, "_SILENCE", 0.2)
    for then, trusted in ((plain, None), (tls(certificates, "server"), str(certificates / "ca.pem"))):
        asked: list[None] = []

        def slow(connection: socket.socket, then: Any = then, asked: Any = asked) -> None:
            asked.append(None)
            time.sleep(0.5) if len(asked) < 3 else then(connection)

        with listening(slow) as server:
            meet(server, trusted, patient=False)
            assert len(asked) <= 1
            meet(server, trusted)
        assert len(asked) >= 3  # one that came while it slept is in its queue
        assert capsys.readouterr().err == f"join: nothing answers at {server} yet, trying on\n"


def test_a_server_that_was_just_ending_is_waited_for_anew() -> None:
    asked: list[None] = []

    def ending(connection: socket.socket) -> None:
        asked.append(None)
        hang_up(connection) if len(asked) == 1 else plain(connection)

    with listening(ending) as server:
        meet(server, None)
    assert len(asked) == 2


def test_certificates_that_cannot_be_read_are_one_sentence(tmp_path: Path, certificates: Path) -> None:
    with listening(plain) as server:
        for path in (tmp_path / "absent.pem", certificates / "server.key"):
            with pytest.raises(UserError, match=f"join: {path} must be a file of certificates in PEM, got: "):
                meet(server, str(path))


def test_a_server_that_is_not_there_yet_is_waited_for_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    meet(f"127.0.0.1:{port}", None, patient=False)
    assert capsys.readouterr().err == ""
    met = threading.Thread(target=meet, args=(f"127.0.0.1:{port}", None), daemon=True)
    met.start()
    time.sleep(0.3)
    assert met.is_alive()
    with listening(plain, port):
        met.join(20)
        assert not met.is_alive()
    assert capsys.readouterr().err == f"join: nothing answers at 127.0.0.1:{port} yet, trying on\n"


def test_a_host_that_has_no_address_is_one_sentence() -> None:
    assert refused("no-such-host.invalid:9092", None).startswith("cannot be found: ")


def test_what_lies_behind_a_proxy_is_not_looked_at(monkeypatch: pytest.MonkeyPatch, certificates: Path) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy.example:3128"})
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: host == "127.0.0.1")
    meet("no-such-host.invalid:9092", str(certificates / "ca.pem"))
    with listening(hang_up) as server:
        assert "does not answer in TLS" in refused(server, certificates / "ca.pem")


def test_an_address_is_a_host_and_a_port() -> None:
    assert split_address("server.example:9092") == ("server.example", 9092)
    assert split_address("[::1]:80") == ("::1", 80)
    for text in ("server.example", ":9092", "[]:9092", "server.example:", "server.example:x", "a:0", "a:65536"):
        with pytest.raises(UserError, match="join: the server must be host:port, got "):
            split_address(text)
