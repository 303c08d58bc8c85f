"""Running a server on this machine: a Ray of its own, from the first line to the last answered request."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from bitfast.images.files import one_line
from bitfast.serving.settings import CannotStartError, Settings, places_on, usable_cpus

SUCCESS = 0
LOST = 1
OBJECT_STORE_BYTES = 80 * 2**20
"""Little more than the least that Ray takes: requests and answers do not go through it."""

LONGEST_TEMPORARY_FOLDER = 20
"""Characters: Ray makes sockets in the folder, whose paths have at most 107."""

APPLICATION = "bitfast"
READY_SECONDS = 60.0
WATCH_SECONDS = 10.0
LOST_SECONDS = 120.0
"""Ray Serve starts a proxy or replicas that have died again sooner."""

QUIET_PROBES = 3
PROBE_SECONDS = 10.0


class StoppedError(BaseException):
    """A signal says that the server must end without answering what it has accepted."""


def serve(settings: Settings, host: str, port: int) -> int:
    """Serve until SIGTERM or SIGINT, then answer what has been accepted; return the exit status.

    Args:
        settings: How the server runs.
        host: Address to listen on.
        port: 0: one that is free.

    Raises:
        CannotStartError: the model cannot be loaded, the port is taken, or Ray or a replica cannot start.
    """
    with Signals() as signals:
        try:
            settings = settings.resolved()
            check_gpus(settings)
            check_model(settings)
            with reserved_port(host, port) as port, local_ray(settings, signals):
                handle = deploy(settings, host, port)
                signals.are_awaited = True
                print(f"bitfast serves {settings.served_name} on {url(host, port)}", flush=True)
                if not serves_until_signal(signals, host, port):
                    return LOST
                drain(handle, host, port, settings)
        except StoppedError:
            pass
    return 128 + signal.SIGINT if signals.first == signal.SIGINT else SUCCESS


class Signals:
    """SIGTERM and SIGINT while a server runs.

    The first sets ``came`` where it is awaited, and raises StoppedError where not, as the second always does.
    The third one ends the process, and with it Ray's, though not their files.

    Attributes:
        first: The number of the first signal; None: none has come.
        came: Set by the first signal.
        are_awaited: Whether somebody looks at ``came``.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._count = 0
        self.came = threading.Event()
        self.are_awaited = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Handle the signals; again, after a library has put handlers of its own in place."""
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, self._handle)
            self._before.setdefault(number, before)

    def _handle(self, number: int, frame: Any) -> None:
        self._count += 1
        if self._count == 1:
            self.first = number
            self.came.set()
            if not self.are_awaited:
                raise StoppedError
        elif self._count == 2:
            raise StoppedError
        else:
            os._exit(128 + number)


# ---- starting ---------------------------------------------------------------------------------------


def check_gpus(settings: Settings) -> None:
    """Find out whether all replicas have a place, since Ray waits for those that have none without end.

    Raises:
        CannotStartError: they have not.
    """
    import torch

    gpus, share = torch.cuda.device_count(), settings.gpus_per_replica or 0
    most = settings.replica_range[1]
    if places_on(gpus, share) < most:
        raise CannotStartError(
            f"there is no place for {most} replicas with {share:g} GPUs each; this machine has {gpus}"
        )


def check_model(settings: Settings) -> None:
    """Load and run the model once, since an error here is clear, and one in a replica is not.

    Raises:
        CannotStartError: it cannot be loaded, or takes no image that its processor makes.
    """
    from bitfast.serving.engine import Engine

    try:
        engine = Engine.load(settings)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise CannotStartError(
            f"the model {settings.model!r} cannot be loaded: {one_line(error)}"
        ) from error
    try:
        engine.run(engine.example())
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise CannotStartError(
            f"the model {settings.model!r} cannot be run: {one_line(error)}"
        ) from error


@contextlib.contextmanager
def reserved_port(host: str, port: int) -> Iterator[int]:
    """Hold a port for Ray Serve's proxy, which shares it, and yield it; a free one for 0.

    Raises:
        CannotStartError: somebody listens on it, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # Alone: Ray's proxies share ports, so a second server would not notice the first.
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((host, port))
            port = alone.getsockname()[1]
        held = socket.socket(family, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
    except OSError as error:
        raise CannotStartError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    with held:
        yield port


@contextlib.contextmanager
def local_ray(settings: Settings, signals: Signals) -> Iterator[None]:
    """Start a Ray on this machine, with the cores that the replicas take; end it and remove its files after.

    Args:
        settings: How the server runs.
        signals: Installed anew, since Ray handles SIGTERM by itself.

    Raises:
        CannotStartError: it does not start.
    """
    os.environ.update(private_ray())
    # The model's threads share their cores with decoding and the proxy: to spin while they wait costs more.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import ray

    parent = tempfile.gettempdir()
    if len(parent) > LONGEST_TEMPORARY_FOLDER:
        parent = "/tmp"
    # Ray lets everybody into its folder, so that lies in one which only this user may enter.
    folder = tempfile.mkdtemp(prefix="bitfast-", dir=parent)
    most = settings.replica_range[1]
    try:
        _start_ray(
            num_cpus=max(usable_cpus(), most * (settings.cpus_per_replica or 1)),
            folder=os.path.join(folder, "r"),
        )
        signals.install()
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def private_ray() -> dict[str, str]:
    """Return the environment of a Ray that nobody else can use: who reaches Ray can run code in it.

    Ray reads it when it is imported.
    """
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own ports, apart from that of HTTP, are on the loopback interface only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def _start_ray(num_cpus: int, folder: str) -> None:
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
    except SystemExit as error:  # raised by Ray's handler of SIGTERM
        raise StoppedError from error
    except (ConnectionError, OSError, RuntimeError, TimeoutError, ValueError) as error:
        raise CannotStartError(f"Ray does not start: {one_line(error)}") from error


def deploy(settings: Settings, host: str, port: int) -> Any:
    """Start the proxy and the replicas, wait until they answer, and return the application's handle.

    Raises:
        CannotStartError: they do not start.
    """
    from ray import serve

    from bitfast.serving.application import application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={
                "host": host,
                "port": port,
                # Replicas answer by then; this ends a request whose replica does not.
                "request_timeout_s": settings.request_timeout + 5,
            },
            logging_config=quiet,
        )
        handle = serve.run(
            application(settings), name=APPLICATION, route_prefix="/", logging_config=quiet
        )
    except (RuntimeError, TimeoutError) as error:
        raise CannotStartError(f"the server does not start: {one_line(error)}") from error
    wait_until_ready(host, port)
    return handle


def wait_until_ready(host: str, port: int) -> None:
    """Wait until the server says that it is ready.

    Raises:
        CannotStartError: it does not.
    """
    deadline = time.monotonic() + READY_SECONDS
    while probe(host, port) != 200:
        if time.monotonic() > deadline:
            raise CannotStartError(f"the server does not answer within {READY_SECONDS:g} seconds")
        time.sleep(0.05)


def probe(host: str, port: int) -> int | None:
    """Return the status of GET /v2/health/ready; None if there is no answer."""
    connection = http.client.HTTPConnection(_reachable(host), port, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def serves_until_signal(signals: Signals, host: str, port: int) -> bool:
    """Wait for the first signal. Return False if before it the server stops answering at all.

    Without the raylet, Ray's other processes may hang on rather than end.
    """
    heard = time.monotonic()
    while not signals.came.wait(WATCH_SECONDS):
        if probe(host, port) is not None:
            heard = time.monotonic()
        elif time.monotonic() - heard > LOST_SECONDS:
            message = f"{url(host, port)} has not answered for {LOST_SECONDS:g} seconds"
            print(f"bitfast: error: {message}; ending", file=sys.stderr, flush=True)
            return False
    return True


def url(host: str, port: int) -> str:
    """Return the server's URL."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


# ---- draining ---------------------------------------------------------------------------------------


def drain(handle: Any, host: str, port: int, settings: Settings) -> None:
    """Let all replicas refuse new requests, and wait until the accepted ones have been answered."""
    print("bitfast: answering the accepted requests, then ending", file=sys.stderr, flush=True)
    timeout = settings.request_timeout + 5
    with contextlib.suppress(Exception):  # a replica that has died has nothing to answer
        handle.broadcast("drain").results(timeout_s=timeout, return_exceptions=True)
    # The proxy passes answers on in their order: these come after those of the accepted requests.
    for _ in range(QUIET_PROBES):
        probe(host, port)
        time.sleep(0.1)
