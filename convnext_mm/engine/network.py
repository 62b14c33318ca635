"""This machine in its network: addresses, interfaces and ports."""

import contextlib
import os
import socket
import struct

from .errors import ConfigError

LOOPBACK = '127.'
ANYWHERE = '192.0.2.1'  # nobody's (RFC 5737)
SIOCGIFADDR = 0x8915  # Linux: asks an interface for its address


def own_address(towards: str) -> str | None:
    """The address of this machine in the network of another one; its name, which
    PyTorch would take, need not resolve. None where nothing leads there, or the name
    of this machine only to itself, as of many in ``/etc/hosts``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # sends nothing
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    if address.startswith(LOOPBACK) and not towards.startswith((LOOPBACK, 'localhost')):
        return None
    return address


def interface_of(address: str | None) -> str | None:
    """The name of the network interface that has an address; None if none has."""
    import fcntl  # not on Windows

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack('256s', name.encode())
            with contextlib.suppress(OSError):  # one without an address
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def choose_interface() -> None:
    """Has gloo speak to other machines where they are: it would take the address
    that this machine's name resolves to, which on many is one that only itself
    can reach. ``GLOO_SOCKET_IFNAME``, where set, stays."""
    main = os.environ.get('MASTER_ADDR', '')
    address = own_address(main) or own_address(ANYWHERE)
    name = interface_of(address) if main else None
    if name is not None:
        os.environ.setdefault('GLOO_SOCKET_IFNAME', name)


def free_port(wanted: int) -> int:
    """A port of this machine: the one that is wanted, where it is free.

    Args:
        wanted: 0: any.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', wanted))
        except OSError:
            probe.bind(('', 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(port: int) -> None:
    """
    Raises:
        ConfigError: It is in use, and the other machines know no other one.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError as error:
            raise ConfigError(
                f'PORT={port} cannot be used ({error.strerror}): give another one, the '
                'same on every machine'
            ) from error
