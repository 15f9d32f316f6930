"""The container file, its lock and the compose file: what they say, and their steps as they run here, without containers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import image as steps
import lock
import pytest
import yaml
from packaging.requirements import Requirement
from store_servers import POSTGRES_BIN, end, free_port

from loraweave.serving.limits import read_keys

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]


@pytest.fixture
def image():
    """{instruction: what follows it, one for each time} of the container file."""
    told = {}
    for name, rest in steps.instructions():
        told.setdefault(name, []).append(rest)
    return told


@pytest.fixture
def packages():
    """{name: (the rest of its line, its hashes)} of the lock."""
    text = lock.LOCK.read_text().replace(" \\\n    --hash=", " ")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {re.match(r"[\w-]+", line)[0]: (line.split(" sha256:")[0], line.split(" sha256:")[1:]) for line in lines}


def test_the_image_is_of_a_named_version_and_runs_as_a_user_without_rights(image):
    assert re.fullmatch(
        rf"docker\.io/library/python:{re.escape(lock.PYTHON)}-slim-\w+@sha256:[0-9a-f]{{64}}", *image["FROM"]
    )
    assert int(*image["USER"]) >= 1000
    assert not {"ADD", "VOLUME"} & set(image)
    assert json.loads(*image["ENTRYPOINT"]) == ["loraweave"]
    assert json.loads(*image["CMD"]) == SERVICES["server"]["command"]


def test_all_that_is_installed_has_a_hash_and_nothing_else_is_looked_for(image, packages):
    pips = [shlex.split(line) for line in image["RUN"] if line.startswith("pip")]
    assert [words[:3] for words in pips] == [["pip", "install", "--no-deps"]] * 2
    assert {"--require-hashes", "--only-binary"} <= set(pips[0])
    assert {"--no-index", "--no-build-isolation"} <= set(pips[1])
    assert not [name for name, (_, hashes) in packages.items() if not hashes]
    assert {len(digest) for _, hashes in packages.values() for digest in hashes} == {64}
    kinds = {line.split("==")[0] == name for name, (line, _) in packages.items() if name != "torch"}
    assert kinds == {True}
    # of no index beside PyPI, and without what a GPU needs
    assert packages["torch"] == (f"torch @ {lock.TORCH_FILE}", [lock.TORCH_SHA256])
    assert "%2Bcpu-" in lock.TORCH_FILE
    assert not set(lock.LEFT_OUT) & set(packages)
    assert not [name for name in packages if name.startswith(lock.LEFT_OUT_BEGINNINGS)]


def test_the_lock_has_what_the_server_names_in_versions_that_it_allows(packages):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in lock.EXTRAS for name in project["optional-dependencies"][extra]]
    for text in (*project["dependencies"], *extras, *lock.MORE):
        wanted = Requirement(text)
        version = packages[wanted.name.lower().replace("_", "-")][0].split("==")[-1]
        assert wanted.specifier.contains(lock.TORCH if wanted.name == "torch" else version), text


def test_the_image_gets_every_room_and_nothing_else_of_the_repository():
    ignored = (ROOT / "deploy" / "Containerfile.dockerignore").read_text().split("\n")
    rooms = re.findall(r'"(\w+)"', re.search(r"ROOMS = \((.*)\)", (ROOT / "setup.py").read_text())[1])
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == {
        *("loraweave", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "deploy/requirements.txt"),
        *rooms,
    }


def test_the_compose_file_opens_one_port_to_this_machine_and_has_no_password_of_its_own():
    assert [service.get("ports", []) for service in SERVICES.values()] == [[], [], [], ["127.0.0.1:8000:8000"]]
    for name, service in SERVICES.items():
        assert service["image"] == "loraweave" or re.search(r":[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}$", service["image"])
        assert set(service.get("depends_on", ())) <= set(SERVICES)
        for hidden in service.get("secrets", ()):
            assert any(
                f"/run/secrets/{hidden}" in str(service[kind]) for kind in ("command", "environment") if kind in service
            )
        assert set(service.get("secrets", ())) <= set(yaml.safe_load(COMPOSE.read_text())["secrets"]), name
    # no password comes through the environment of who starts it
    assert "${" not in COMPOSE.read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined_and_says_whether_it_is_well(name, image):
    service = SERVICES[name]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"cap_add", "privileged", "network_mode", "pid"} & set(service)
    assert service["pids_limit"] <= 512
    assert re.fullmatch(r"\d+g", service["mem_limit"])
    # no user is root: the image's own, or a number
    assert service["image"] == "loraweave" or int(service["user"].split(":")[0]) > 0
    if name == "bucket":
        assert SERVICES["server"]["depends_on"][name] == {"condition": "service_completed_successfully"}
        assert service["healthcheck"] == {"disable": True}
    else:
        assert service["healthcheck"]["test"][0] == "CMD"


def test_what_the_image_writes_lies_in_volumes(image):
    mounted = dict(volume.split(":") for volume in SERVICES["server"]["volumes"])
    assert set(mounted) == set(yaml.safe_load(COMPOSE.read_text())["volumes"])
    told = dict(word.split("=", 1) for line in image["ENV"] for word in line.split())
    for name in ("LORAWEAVE_CACHE", "HF_HOME", "LORAWEAVE_HUB"):
        assert f"/{told[name].split('/')[1]}" in mounted.values()


def test_secrets_are_made_at_random_closed_to_others_and_kept(tmp_path):
    script = tmp_path / "secrets.sh"
    shutil.copyfile(ROOT / "deploy" / "secrets.sh", script)
    # who may not give a file away is told so
    (tmp_path / "bin").mkdir()
    for name, status in (("sudo", 1), ("chown", 0)):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\nexit {status}\n")
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    texts = []
    for _ in range(2):
        subprocess.run(["sh", script], env=environment, capture_output=True, check=False)
        texts.append({path.name: path.read_text() for path in sorted((tmp_path / "secrets").iterdir())})
    assert texts[0] == texts[1]
    assert set(texts[0]) == set(yaml.safe_load(COMPOSE.read_text())["secrets"])
    assert re.fullmatch(r"\*:\*:loraweave:loraweave:[0-9a-f]{48}\n", texts[0]["pgpass"])
    assert texts[0]["role_password"] in texts[0]["pgpass"]
    assert texts[0]["role_password"] != texts[0]["postgres_password"]
    assert set(read_keys(tmp_path / "secrets" / "keys")) == {"client"}
    folder = tmp_path / "secrets"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "pgpass")] == [0o700, 0o400]


def test_the_compose_file_keeps_the_compose_specification():
    said = yaml.safe_load(COMPOSE.read_text())
    # extensions are free, by its rules
    known = {name: value for name, value in said.items() if not name.startswith("x-")}
    # made from its JSON schema
    schema = pytest.importorskip("compose_pydantic").ComposeSpecification
    assert len(schema.model_validate(known).services) == len(SERVICES)


def test_the_container_file_has_nothing_that_its_linter_would_change():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, ROOT / "deploy" / "Containerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
@pytest.mark.apart
@pytest.mark.timeout(1500)
def test_the_steps_of_the_image_serve_a_hub_in_a_folder(image, tmp_path):
    """The lock's packages are fetched; torch, of another index than PyPI's, is the one that is here."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" != lock.PYTHON:
        pytest.skip(f"the lock is for Python {lock.PYTHON}")
    port = free_port()
    built = subprocess.run(
        [sys.executable, ROOT / "scripts" / "image.py", tmp_path / "image", "--own-torch"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "ConnectionError" in built.stdout + built.stderr or "Retrying" in built.stdout + built.stderr:
        pytest.skip("PyPI cannot be reached")
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    programs = Path(built.stdout.splitlines()[-1])
    told = dict(word.split("=", 1) for line in image["ENV"] for word in line.split())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {name: str(tmp_path / value[1:]) if value[0] == "/" else value for name, value in told.items()}
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    keys = tmp_path / "keys"
    keys.write_text(json.dumps({"client": {"key": "a-key-of-a-client"}}))
    program = json.loads(*image["ENTRYPOINT"])

    def run(words):
        return subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (made := run([*program, "hub", "add", ROOT / "examples" / "pool" / "passive"])).returncode == 0, made.stderr
    replaced = {"/run/secrets/keys": str(keys), "8000": str(port), "0.0.0.0": "127.0.0.1"}
    words = [replaced.get(word, word) for word in json.loads(*image["CMD"])]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*program, *words], env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        healthy = [word.replace("8000", str(port)) for word in json.loads(image["HEALTHCHECK"][0].partition("CMD ")[2])]
        wait_for(lambda: run(healthy).returncode == 0, process, tmp_path / "log")
        assert answer_of(port, "a-key-of-a-client") == (" The doctor was thanked by the judge", "passive")
    finally:
        end(process, signal.SIGTERM)
    assert process.returncode == 0


@pytest.mark.slow
def test_the_command_lines_serve_a_hub_on_postgresql_and_s3(image, postgres_server, s3_server, tmp_path):
    port = free_port()
    given = dict(SERVICES["server"]["environment"])
    assert given["AWS_ENDPOINT_URL"] == "http://store:5000"
    assert SERVICES["store"]["command"] == ["-H", "0.0.0.0", "-p", "5000"]
    given["LORAWEAVE_HUB"] = given["LORAWEAVE_HUB"].replace("catalogue", f"127.0.0.1:{postgres_server.port}")
    hidden = {
        "keys": '{"client": {"key": "a-key-of-a-client"}}',
        "role_password": "pass-word",
        "pgpass": "*:*:*:*:pass-word",
    }
    for name, text in hidden.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    assert given["PGPASSFILE"] == "/run/secrets/pgpass"
    given["PGPASSFILE"] = str(tmp_path / "pgpass")
    make_role(postgres_server, tmp_path / "role_password")
    environment = {**os.environ, **given, "AWS_ENDPOINT_URL": s3_server, "LORAWEAVE_CACHE": str(tmp_path / "cache")}
    loraweave = [sys.executable, "-m", "loraweave"]

    def here(words):
        words = [word.replace("/run/secrets", str(tmp_path)) for word in words]
        return [word.replace("0.0.0.0", "127.0.0.1").replace("8000", str(port)) for word in words]

    def run(words):
        return subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    program, *rest = SERVICES["bucket"]["entrypoint"]
    assert program == "python"
    # a second start finds the bucket
    for _ in range(2):
        assert (made := run([sys.executable, *rest])).returncode == 0, made.stderr
    added = re.search(r"server (hub add .*)$", COMPOSE.read_text(), re.MULTILINE)[1].replace(
        "/pool/", f"{ROOT}/examples/pool/"
    )
    with (tmp_path / "log").open("wb") as log:
        words = [*loraweave, *here(SERVICES["server"]["command"])]
        process = subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        program, *rest = here(json.loads(image["HEALTHCHECK"][0].partition("CMD ")[2]))
        wait_for(lambda: run([sys.executable, *rest]).returncode == 0, process, tmp_path / "log")
        assert (made := run([*loraweave, *added.split()])).returncode == 0, made.stderr
        assert answer_of(port, "a-key-of-a-client") == (" The doctor was thanked by the judge", "passive")
        with postgres_server.connect() as connection:
            asked = "SELECT rolsuper, rolcreaterole, rolcreatedb FROM pg_roles WHERE rolname = 'loraweave'"
            assert connection.execute(asked).fetchone() == (False, False, False)
    finally:
        end(process, signal.SIGINT)


def make_role(postgres_server, password_file):
    """Do what the catalogue's container does with role.sql when it is made."""
    psql = shutil.which("psql", path=f"{POSTGRES_BIN}{os.pathsep}{os.environ['PATH']}")
    place = ["--host", "127.0.0.1", "--port", str(postgres_server.port), "--username", postgres_server.user]
    place += ["--dbname", "postgres", "--file", ROOT / "deploy" / "role.sql"]
    given = {"PGPASSWORD": postgres_server.password, "ROLE_PASSWORD_FILE": str(password_file)}
    words = [psql, "-v", "ON_ERROR_STOP=1", "--no-psqlrc", *place]
    done = subprocess.run(words, env={**os.environ, **given}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def wait_for(ready, process, log):
    ending = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < ending
        # each look starts a Python
        time.sleep(0.5)


def answer_of(port, key):
    """(text, formula) of a greedy answer."""
    asked = {
        "model": "passive",
        "prompt": "Input: The judge thanked the doctor.\nOutput:",
        "max_tokens": 7,
        "temperature": 0,
    }
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), head)
    with urllib.request.urlopen(request, timeout=300) as answer:
        body = json.load(answer)
    return body["choices"][0]["text"], body["system_fingerprint"]
