"""What answers at a server's address, looked at before Flower's node is started: that one tries for ever where it should not.

Flower's node takes a server that wants TLS for one that is not there yet, and tells of a certificate it does not trust after
half a minute in the middle of its log.
"""

import socket
import ssl
import sys
import time
import urllib.request

from fl.errors import UserError

_SILENCE = (
    10.0  # seconds after which a server that says nothing counts as not there yet: a busy machine starts it slowly
)
_PAUSE = 1.0  # seconds between attempts


def split_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port"; an IPv6 host stands in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"join: the server must be host:port, got {text!r}")
    return host.strip("[]"), int(port)


def meet(server: str, trusted: str | None, *, patient: bool = True) -> None:
    """Wait until something answers at host:port; UserError, one sentence, where a node cannot talk to it.

    trusted: file with the certificates that must have signed the server's; None: the server must speak plain HTTP.
    patient: without it, a server that is not there is left to Flower. So is one behind a proxy of this environment.
    """
    host, port = split_address(server)
    if "http" + "s" * (trusted is not None) in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    told, before = False, None
    while True:
        try:
            problem = refusal(host, port, trusted)
        except socket.gaierror as error:
            raise UserError(f"join: {server} cannot be found: {error.strerror}") from error
        except OSError:
            if not patient:
                return
            if not told:
                print(f"join: nothing answers at {server} yet, trying on", file=sys.stderr, flush=True)
            told, problem = True, None
        else:
            if problem is None:
                return
            if problem == before:  # twice: not that of a server that was just ending
                raise UserError(f"join: {server} {problem}")
        before = problem
        time.sleep(_PAUSE)


def refusal(host: str, port: int, trusted: str | None) -> str | None:
    """What is wrong with the server there, the rest of a sentence about it; None if nothing. OSError: nothing answers there."""
    with socket.create_connection((host, port), timeout=_SILENCE) as connection:
        return _plain_refusal(connection, host) if trusted is None else _tls_refusal(connection, host, trusted)


def _tls_refusal(connection: socket.socket, host: str, trusted: str) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and name, as Flower's client does
    try:
        context.load_verify_locations(trusted)
    except OSError as error:  # ssl.SSLError is one
        raise UserError(f"join: {trusted} must be a file of certificates in PEM, got: {error}") from error
    try:
        with context.wrap_socket(connection, server_hostname=host):
            return None
    except TimeoutError:
        raise
    except ssl.SSLCertVerificationError as error:
        return f"has a certificate that does not pass with {trusted}: {error.verify_message}"
    except OSError as error:
        return f"does not answer in TLS ({error}), start it with certificates or the node without"


def _plain_refusal(connection: socket.socket, host: str) -> str | None:
    try:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = connection.recv(5)
    except TimeoutError:
        raise
    except OSError:  # a TLS server may cut the connection
        answer = b""
    return None if answer == b"HTTP/" else "does not speak plain HTTP, if it has a certificate give --root-certificates"
