# SPDX-License-Identifier: Apache-2.0
"""Assembles an OpenSearch home with the k-NN plugin out of its Maven artifacts.

A distribution tarball is needed nowhere: every part of a server is published as a Maven artifact, so one `mvn` run
over a generated multi-module project fetches them all. The result is cached and never written to again.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "opensearch"


class Missing(Exception):
    """Something this machine would need to run a real server is not there; the message names it."""


@dataclass(frozen=True)
class Release:
    """What differs between the versions we test against."""

    version: str
    log4j: str
    oldest_java: int
    newest_java: int | None
    has_security_manager: bool
    security_plugin: bool

    @property
    def libraries(self) -> list[str]:
        names = ["opensearch", "opensearch-plugin-classloader"]
        if not self.has_security_manager:
            names.append("opensearch-agent-bootstrap")
        logging = f"org.apache.logging.log4j:log4j-core:{self.log4j}"
        return [*(f"org.opensearch:{name}:{self.version}" for name in names), logging]

    @property
    def modules(self) -> dict[str, str]:
        """Module name -> artifact name. The k-NN plugin extends lang-painless, and on 3.x transport-grpc too."""
        common = {
            "transport-netty4": "transport-netty4-client",
            "lang-painless": "lang-painless",
            "reindex": "reindex-client",
            "mapper-extras": "mapper-extras-client",
        }
        return common if self.has_security_manager else {**common, "transport-grpc": "transport-grpc"}


RELEASES = {
    release.version: release
    for release in (
        Release("2.19.1", "2.21.0", 11, 21, has_security_manager=True, security_plugin=True),
        Release("3.6.0", "2.25.3", 21, None, has_security_manager=False, security_plugin=False),
    )
}

# The published module jars carry no policy. These grant what the modules do at start and in our requests, no more.
_RUNTIME = 'permission java.lang.RuntimePermission "{}";'
_REFLECT = 'permission java.lang.reflect.ReflectPermission "suppressAccessChecks";'
POLICIES = {
    "transport-netty4": [
        'permission java.net.SocketPermission "*", "accept,connect,listen,resolve";',
        'permission java.util.PropertyPermission "*", "read,write";',
        *map(
            _RUNTIME.format,
            ("accessClassInPackage.sun.misc", "accessClassInPackage.sun.nio.ch", "accessDeclaredMembers"),
        ),
        *map(_RUNTIME.format, ("getClassLoader", "modifyThread", "setContextClassLoader")),
        _REFLECT,
    ],
    "lang-painless": [
        *map(_RUNTIME.format, ("accessDeclaredMembers", "createClassLoader", "getClassLoader")),
        'permission org.opensearch.script.ClassPermission "<<STANDARD>>";',
    ],
    "reindex": [
        'permission java.net.SocketPermission "*", "connect";',
        _RUNTIME.format("accessDeclaredMembers"),
        _REFLECT,
    ],
}

LOGGING = """\
status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d{ISO8601}][%-5p][%c{1.}] %m%n
rootLogger.level = info
rootLogger.appenderRef.console.ref = console
"""


def assemble(version: str, security: bool = False) -> Path:
    """The home of `version`, assembled on the first call and reused from then on. Safe to call concurrently."""
    if version not in RELEASES:
        raise ValueError(f"OpenSearch {version} is not one of {', '.join(RELEASES)}")
    release = RELEASES[version]
    if security and not release.security_plugin:
        raise ValueError(f"the security plugin for OpenSearch {version} is not published as a Maven artifact")
    home = CACHE / (f"{version}-security" if security else version)
    if home.is_dir():
        return home
    with _locked(home.with_name(home.name + ".lock")):
        if home.is_dir():
            return home
        base = assemble(version) if security else None
        with tempfile.TemporaryDirectory(prefix=f"{home.name}.", dir=CACHE) as scratch:
            built = Path(scratch, "home")
            if base is None:
                _build(release, Path(scratch, "maven"), built)
            else:
                shutil.copytree(base, built, copy_function=os.link)
                _add_security(release, Path(scratch, "maven"), built)
            built.rename(home)
    return home


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(release: Release, maven: Path, home: Path) -> None:
    version = release.version
    groups = {"lib": release.libraries, "knn": [f"org.opensearch.plugin:opensearch-knn:{version}.0:zip"]}
    groups |= {name: [f"org.opensearch.plugin:{artifact}:{version}"] for name, artifact in release.modules.items()}
    fetched = fetch(maven, groups)

    shutil.copytree(fetched["lib"], home / "lib")
    in_lib = {jar.name for jar in (home / "lib").iterdir()}
    for name, artifact in release.modules.items():
        module = home / "modules" / name
        # A class that is found twice ends the node ("jar hell"), so a module holds only what lib/ does not.
        shutil.copytree(fetched[name], module, ignore=lambda _, names: in_lib.intersection(names))
        descriptor = {
            "name": name,
            "description": name,
            "classname": _plugin_class(next(module.glob(f"{artifact}-*.jar"))),
            "version": version,
            "opensearch.version": version,
            "java.version": release.oldest_java,
            "has.native.controller": "false",
        }
        properties = "".join(f"{key}={value}\n" for key, value in descriptor.items())
        (module / "plugin-descriptor.properties").write_text(properties)
        if release.has_security_manager and name in POLICIES:
            policy = "grant {\n" + "".join(f"  {line}\n" for line in POLICIES[name]) + "};\n"
            (module / "plugin-security.policy").write_text(policy)
    _unzip(fetched["knn"], home / "plugins" / "opensearch-knn")
    for name in ("bin", "config", "extensions"):  # the node makes those it misses, and here it may not
        (home / name).mkdir()
    (home / "config" / "log4j2.properties").write_text(LOGGING)


def _add_security(release: Release, maven: Path, home: Path) -> None:
    groups = {"security": [f"org.opensearch.plugin:opensearch-security:{release.version}.0:zip"]}
    plugin = home / "plugins" / "opensearch-security"
    _unzip(fetch(maven, groups)["security"], plugin)
    (plugin / "config").rename(home / "config" / "opensearch-security")


def fetch(workdir: Path, groups: dict[str, list[str]]) -> dict[str, Path]:
    """Resolves each group of `group:artifact:version[:zip]` on its own and returns the folder its files are in.

    One Maven run does them all: each group is a module of a throw-away project.
    """
    if shutil.which("mvn") is None:
        raise Missing("mvn (Apache Maven) is not on PATH")
    for name, artifacts in groups.items():
        _write_pom(workdir / name, name, "dependencies", map(_dependency, artifacts))
    _write_pom(workdir, "all", "modules", (f"<module>{escape(name)}</module>" for name in groups))
    command = ["mvn", "-q", "-B", "-f", str(workdir), "dependency:copy-dependencies", "-DincludeScope=runtime"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Missing(f"mvn could not fetch {', '.join(groups)}:\n{done.stdout[-2000:]}")
    return {name: workdir / name / "target" / "dependency" for name in groups}


def _dependency(coordinates: str) -> str:
    group, artifact, version, *kind = coordinates.split(":")
    text = f"<groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{version}</version>"
    if kind:  # A plugin's zip is complete as it is.
        everything = "<exclusion><groupId>*</groupId><artifactId>*</artifactId></exclusion>"
        text += f"<type>{kind[0]}</type><exclusions>{everything}</exclusions>"
    return f"<dependency>{text}</dependency>"


def _write_pom(folder: Path, name: str, section: str, entries: Iterator[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pom.xml").write_text(
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
        f"<groupId>knn-train.tests</groupId><artifactId>{escape(name)}</artifactId><version>1</version>"
        f"<packaging>pom</packaging><{section}>{''.join(entries)}</{section}></project>"
    )


def _plugin_class(jar: Path) -> str:
    """The module's entry class: the shortest class name ending in Plugin (`Netty4ModulePlugin` on 3.x)."""
    with zipfile.ZipFile(jar) as archive:
        classes = [name for name in archive.namelist() if re.search(r"/\w+Plugin\.class$", name)]
    if not classes:
        raise RuntimeError(f"no plugin class in {jar}")
    return min(classes, key=len).removesuffix(".class").replace("/", ".")


def _unzip(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(next(folder.glob("*.zip"))) as archive:
        archive.extractall(target)
