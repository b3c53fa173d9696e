# SPDX-License-Identifier: Apache-2.0
"""A real OpenSearch with the k-NN plugin, for tests and for trying the product.

`python -m tests.opensearch_server start 3.6.0 --port 9200 [--security]` runs one until Ctrl-C;
`python -m tests.opensearch_server assemble 3.6.0` only fetches what it takes.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import json
import os
import pwd
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from opensearchpy import OpenSearch

from tests.knn_bridge import SETTINGS as BRIDGE_SETTINGS
from tests.knn_bridge import BridgeTrainer, compile_bridge
from tests.opensearch_home import RELEASES, Missing, Release, assemble

START_TIMEOUT = 180.0
_PR_SET_PDEATHSIG = 1


class OpenSearchServer:
    """One node with its own data, configuration and log. It keeps its port and its data over a restart."""

    scheme = "http"

    def __init__(
        self, version: str, port: int | None = None, settings: dict[str, Any] | None = None, heap: str = "768m"
    ):
        self.version = version
        self.release: Release = RELEASES[version]
        self.heap = heap
        self._chosen_port = port
        self._settings = settings or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: tuple[int, int] | None = None
        self._java = find_java(self.release)
        self._user = unprivileged_user()
        self.run_dir = Path(tempfile.mkdtemp(prefix=f"opensearch-{version}-", dir=_shared_temp()))
        self.run_dir.chmod(0o755)
        atexit.register(self.close)
        self.trainer = BridgeTrainer()
        self.home = self._place_home()
        self._prepare()

    # What tests use

    @property
    def url(self) -> str:
        if self._ports is None:
            raise RuntimeError("the server was never started")
        return f"{self.scheme}://localhost:{self._ports[0]}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def client(self, **options: Any) -> OpenSearch:
        return OpenSearch(self.url, **{"timeout": 60, **options})

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def start(self) -> None:
        if self._process is not None:
            return
        attempts = 1 if self._ports or self._chosen_port else 3
        for attempt in range(1, attempts + 1):
            http, transport = self._ports or (self._chosen_port or _free_port(), _free_port())
            self._launch(http, transport)
            try:
                self._wait_until_healthy(http)
            except BaseException as error:
                self._kill(signal.SIGKILL)
                port_was_taken = isinstance(error, RuntimeError) and "Address already in use" in str(error)
                if not port_was_taken or attempt == attempts:
                    raise
                continue
            self._ports = http, transport
            return

    def stop(self) -> None:
        """Ends the node in its own time, so that what it holds is on disk for the next `start`."""
        self._kill(signal.SIGTERM)

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        """Ends the node at once and removes all it wrote."""
        self._kill(signal.SIGKILL)
        self.trainer.close()
        shutil.rmtree(self.run_dir, ignore_errors=True)
        atexit.unregister(self.close)

    # How it is run

    @property
    def log_path(self) -> Path:
        return self.run_dir / "node.log"

    def _assembled(self) -> Path:
        return assemble(self.version)

    def _place_home(self) -> Path:
        """The cached home, or a copy where the server's user cannot reach it (a checkout under /root)."""
        home = self._assembled()
        if self._user is None or _open_to_others(home):
            return home
        return Path(shutil.copytree(home, self.run_dir / "home"))

    def _prepare(self) -> None:
        shutil.copytree(self.home / "config", self.run_dir / "config")
        compile_bridge(self.run_dir / "native", list(java_homes()))
        for name in ("data", "logs", "tmp"):
            (self.run_dir / name).mkdir()
        self._configure()
        lines = [f"{name}: {json.dumps(value)}\n" for name, value in self.settings().items()]
        (self.run_dir / "config" / "opensearch.yml").write_text("".join(lines))
        self.log_path.touch()
        if self._user:
            for path in (self.run_dir, *self.run_dir.rglob("*")):
                shutil.chown(path, *self._user)

    def _configure(self) -> None:
        """Writes what else belongs into the node's configuration folder."""

    def settings(self) -> dict[str, Any]:
        return {
            "cluster.name": f"knn-train-{self.version}",
            "cluster.routing.allocation.disk.threshold_enabled": False,
            "discovery.type": "single-node",
            "network.host": "127.0.0.1",
            "path.data": str(self.run_dir / "data"),
            "path.logs": str(self.run_dir / "logs"),
            **BRIDGE_SETTINGS,
            **self._settings,
        }

    def _java_options(self) -> list[str]:
        options = {
            "file.encoding": "UTF-8",
            "io.netty.allocator.numDirectArenas": 0,
            "io.netty.noKeySetOptimization": "true",
            "io.netty.noUnsafe": "true",
            "io.netty.recycler.maxCapacityPerThread": 0,
            "java.awt.headless": "true",
            "java.library.path": self.run_dir / "native",
            "java.io.tmpdir": self.run_dir / "tmp",
            "jna.nosys": "true",
            "jna.tmpdir": self.run_dir / "tmp",
            "log4j.shutdownHookEnabled": "false",
            "log4j2.disable.jmx": "true",
            "opensearch.distribution.type": "tar",
            "opensearch.path.conf": self.run_dir / "config",
            "opensearch.path.home": self.home,
        }
        if self.release.has_security_manager:
            options["java.security.manager"] = "allow"
        native = [] if self.release.has_security_manager else ["--enable-native-access=ALL-UNNAMED"]
        memory = [f"-Xms{self.heap}", f"-Xmx{self.heap}", "-XX:+UseSerialGC"]
        return memory + native + [f"-D{name}={value}" for name, value in options.items()]

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.defpath, "HOME": str(self.run_dir), "KNN_BRIDGE_PORT": str(self.trainer.port)}

    def _launch(self, http: int, transport: int) -> None:
        command = [str(self._java / "bin" / "java"), *self._java_options(), "-cp", f"{self.home}/lib/*"]
        command += ["org.opensearch.bootstrap.OpenSearch", f"-Ehttp.port={http}", f"-Etransport.port={transport}"]
        user, group = self._user or (None, None)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.run_dir,
                env=self._environment(),
                start_new_session=True,
                user=user,
                group=group,
                extra_groups=[] if user is not None else None,
                preexec_fn=die_with_parent(),  # only makes system calls
            )

    def _wait_until_healthy(self, port: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"OpenSearch {self.version} ended with {self._process.returncode}:\n{self.log_tail()}"
                )
            if self._is_healthy(f"{self.scheme}://localhost:{port}"):
                return
            time.sleep(0.2)
        raise TimeoutError(f"OpenSearch {self.version} is not up after {START_TIMEOUT:.0f} s:\n{self.log_tail()}")

    def _is_healthy(self, url: str) -> bool:
        query = f"{url}/_cluster/health?wait_for_status=yellow&timeout=5s"
        request = urllib.request.Request(query, headers=self._health_headers())
        try:
            with urllib.request.urlopen(request, timeout=10, context=self._tls()) as response:
                return not json.load(response)["timed_out"]
        except (OSError, urllib.error.URLError):
            return False

    def _health_headers(self) -> dict[str, str]:
        return {}

    def _tls(self) -> ssl.SSLContext | None:
        return None

    def _kill(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for number in (how, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            try:
                process.wait(30)
                return
            except subprocess.TimeoutExpired:
                continue


def find_java(release: Release) -> Path:
    """The oldest JDK here that can run this release."""
    user = unprivileged_user()
    fitting = []
    for home in java_homes():
        version = java_version(home)
        fits = version >= release.oldest_java and version <= (release.newest_java or version)
        if fits and (user is None or _open_to_others(home / "bin" / "java")):
            fitting.append((version, home))
    if not fitting:
        upper = f" to {release.newest_java}" if release.newest_java else " or later"
        raise Missing(f"OpenSearch {release.version} needs Java {release.oldest_java}{upper}: none found")
    return min(fitting)[1]


def java_homes() -> Iterator[Path]:
    candidates = [Path(value) for name, value in os.environ.items() if name.startswith("JAVA_HOME") and value]
    on_path = shutil.which("java")
    if on_path:
        candidates.append(Path(on_path).resolve().parent.parent)
    for folder in ("/usr/lib/jvm", "/opt", str(Path.home() / ".sdkman/candidates/java")):
        candidates += sorted(Path(folder).glob("*"))
    candidates += sorted(Path("/Library/Java/JavaVirtualMachines").glob("*/Contents/Home"))
    for home in dict.fromkeys(path.resolve() for path in candidates):
        if os.access(home / "bin" / "java", os.X_OK):
            yield home


def java_version(home: Path) -> int:
    """The feature release: 17 for `17.0.15`, 8 for `1.8.0`; 0 if it cannot be told."""
    try:
        text = (home / "release").read_text()
    except OSError:
        text = subprocess.run([home / "bin" / "java", "-version"], check=False, capture_output=True, text=True).stderr
    found = re.search(r'(?:JAVA_VERSION=|version )"(?:1\.)?(\d+)', text)
    return int(found[1]) if found else 0


def unprivileged_user() -> tuple[int, int] | None:
    """OpenSearch refuses to run as root; this is who runs it then."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _open_to_others(path: Path) -> bool:
    path = path.resolve()
    return all(folder.stat().st_mode & 0o001 for folder in path.parents) and bool(path.stat().st_mode & 0o001)


def _shared_temp() -> str | None:
    """A temporary folder that the server's user can reach: $TMPDIR may be private to us."""
    if unprivileged_user() is None or _open_to_others(Path(tempfile.gettempdir())):
        return None
    return "/tmp"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> Callable[[], None] | None:
    """On Linux the kernel ends the node when we end, however we end: a killed test run leaves no JVM behind."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork, where loading a library is not safe
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.opensearch_server", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (("assemble", "fetch the parts and lay them out"), ("start", "run until Ctrl-C")):
        command = commands.add_parser(name, help=summary)
        command.add_argument("version", choices=list(RELEASES))
        command.add_argument("--security", action="store_true", help="with TLS and users (2.19.1 only)")
        if name == "start":
            command.add_argument("--port", type=int, default=9200)
            command.add_argument("--heap", default="1g")
    options = parser.parse_args(arguments)
    if options.security and not RELEASES[options.version].security_plugin:
        parser.error(f"the security plugin is not published for {options.version}")
    if options.command == "assemble":
        print(assemble(options.version, security=options.security))
        return
    from tests.opensearch_security import SecureOpenSearchServer  # it builds on this module

    kind = SecureOpenSearchServer if options.security else OpenSearchServer
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with closing(kind(options.version, port=options.port, heap=options.heap)) as server:
            server.start()
            print(f"OpenSearch {server.version} is at {server.url}, its log is {server.log_path}", flush=True)
            if isinstance(server, SecureOpenSearchServer):
                print(f"Certificates are in {server.certificates}. Users and passwords: {server.users}", flush=True)
            signal.pause()
    except Missing as missing:
        raise SystemExit(str(missing)) from None
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
