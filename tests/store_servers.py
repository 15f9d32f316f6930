"""A PostgreSQL server with pgvector and an S3 server of one's own on free loopback ports, for tests of hubs on them.

Where a server cannot be had, its tests skip and say why; in CI (CI=true) they fail.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from installed import require_entry

POSTGRES_BIN = Path("/usr/lib/postgresql/17/bin")
START_S = 60.0


class PostgresServer:
    """`url("name")` is the address of a hub in a schema of its own; the password is in it."""

    user = "weaver"
    # has characters that a URL must escape
    password = "s3cr:t/p@ss"

    def __init__(self, port: int) -> None:
        self.port = port

    def url(self, schema: str, **options: str) -> str:
        given = "".join(f"&{key}={value}" for key, value in options.items())
        password = self.password.replace(":", "%3A").replace("/", "%2F").replace("@", "%40")
        return f"postgresql://{self.user}:{password}@127.0.0.1:{self.port}/postgres?schema={schema}{given}"

    def connect(self):
        import psycopg

        return psycopg.connect(
            host="127.0.0.1", port=self.port, user=self.user, password=self.password, dbname="postgres", autocommit=True
        )


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    require_entry("catalogues", "postgresql")
    if importlib.util.find_spec("psycopg") is None:
        absent("psycopg is not installed: pip install 'loraweave[postgres]'")
    # Debian's place for version 17; elsewhere what PATH has
    found = shutil.which("initdb", path=f"{POSTGRES_BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        absent("PostgreSQL 17 is not installed (Debian: postgresql-17)")
    binaries = Path(found).resolve().parent
    extension = subprocess.run([binaries / "pg_config", "--sharedir"], capture_output=True, text=True, check=False)
    if not (Path(extension.stdout.strip()) / "extension" / "vector.control").is_file():
        absent("pgvector is not installed (Debian: postgresql-17-pgvector)")
    # not below pytest's folder, which nobody else may enter: the server refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="loraweave-postgres-"))
    identity = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    if identity:
        shutil.chown(folder, "nobody", "nogroup")
    server = PostgresServer(free_port())
    process = None
    try:
        run_initdb(binaries / "initdb", folder, server, identity)
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(folder),
            # the tests end processes and sessions, not the machine
            "fsync": "off",
            "jit": "off",
        }
        given = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [binaries / "postgres", "-D", folder / "data", "-p", str(server.port), *given],
                stdout=log,
                stderr=log,
                cwd=folder,
                **identity,
            )
        wait_until(lambda: answers(server.connect), process, folder / "log")
        yield server
    finally:
        if process is not None:
            # a fast shutdown: sessions that are still open are ended
            end(process, signal.SIGINT)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[str]:
    """The address of a server that speaks S3, with the environment that leads s3fs to it."""
    require_entry("blobs", "fsspec")
    for package in ("moto", "s3fs", "flask"):
        if importlib.util.find_spec(package) is None:
            absent(f"{package} is not installed: pip install 'loraweave[test]'")
    port = free_port()
    log_path = tmp_path_factory.mktemp("s3") / "log"
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    with log_path.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    own = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-store",
        "AWS_DEFAULT_REGION": "us-east-1",
        # nothing of the user's account, and no question to a machine of Amazon's
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        wait_until(lambda: answers(lambda: socket.create_connection(("127.0.0.1", port), 1)), process, log_path)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in own.items():
                patch.setenv(name, value)
            yield address
    finally:
        end(process, signal.SIGTERM)


def absent(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; in CI it must be there (.ci/run installs it)")
    pytest.skip(reason)


def run_initdb(initdb, folder, server, identity) -> None:
    secret = folder / "password"
    secret.write_text(server.password)
    command = [initdb, "-D", folder / "data", "-U", server.user, "-E", "UTF8", "--locale=C", "--no-sync"]
    command += ["-A", "scram-sha-256", f"--pwfile={secret}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, **identity)
    secret.unlink()
    assert done.returncode == 0, done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(connect) -> bool:
    try:
        connect().close()
    except Exception:
        return False
    return True


def wait_until(ready, process, log) -> None:
    ending = time.monotonic() + START_S
    while not ready():
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < ending, log.read_text(errors="replace")
        time.sleep(0.05)


def end(process, how) -> None:
    process.send_signal(how)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
