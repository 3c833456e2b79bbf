"""Bind the socket that the page is served on, before anything heavy is imported. Imports nothing heavy."""

import ipaddress
import socket

PORTS = range(65536)  # 0 stands for any free port


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on host and port. Raises ValueError if they are not available here, or taken."""
    if port not in PORTS:
        raise ValueError(f"--port: {port}; allowed: 0 (a free one) to {PORTS[-1]}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host: {host!r}; allowed: a name or an address of this machine") from error
    try:
        return socket.create_server(address[:2], family=family)
    except PermissionError as error:
        raise ValueError(f"--port: {port}; allowed for you: 0 (a free one), or 1024 and above") from error
    except OSError as error:
        if isinstance(error, OSError) and error.errno == socket.errno.EADDRINUSE:
            raise ValueError(f"--port: {port} is taken; --port 0 takes a free one") from error
        raise ValueError(f"--host: {host!r} is no address of this machine") from error


def url(listening: socket.socket) -> str:
    """The address to type into a browser on this machine."""
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else name}:{port}"


def is_local(listening: socket.socket) -> bool:
    """Whether only this machine can reach the socket (a loopback address)."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback
