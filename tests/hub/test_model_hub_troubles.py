"""What goes wrong with the model hub: each trouble by its name, with the way out, and without the token."""

from __future__ import annotations

import time

import model_hub_server as model_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from loraweave.errors import AdapterNotFound, HubFull, SourceUnavailable
from loraweave.hub import sources as client
from loraweave.hub.adapter import Adapter
from loraweave.hub.sources import open_source
from loraweave.types import Factors


def local_folder(source, **options):
    with open_source(source, **options) as opened:
        return opened.folder


def adapter(value):
    return Adapter("plural", "org/base", {"q": Factors(torch.full((2, 16), value), torch.ones(16, 2))})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each call gave in a process of its own, and what the server saw."""
    served, home = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("home")
    for name in ("lora", "limited", "flooded", "down", "gated", "cut", "severed", "private", "moving"):
        adapter(1.0).save_pretrained(served / "tiny" / name)
    adapter(2.0).save_pretrained(served / "tiny" / "second")
    with model_hub.serving(served) as (address, _, ranges):
        found = model_hub.loaded_from(address, home, "troubles", served, HF_HUB_VERBOSITY="debug")
    return {**found, "ranges": ranges, "server": model_hub}


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("gated", "AdapterNotFound", ["tiny/gated", "is gated", "accept its terms", "token="]),
        ("flooded", "SourceUnavailable", ["tiny/flooded", "limits how often", "refused", "4 times", "wait"]),
        ("down", "SourceUnavailable", ["tiny/down", "cannot be reached", "run it again"]),
        ("severed", "SourceUnavailable", ["tiny/severed", "broke off", "goes on where it stopped"]),
    ],
)
def test_a_trouble_is_a_named_error_on_one_line_with_the_way_out(found, case, error, words):
    outcome = found[case]
    assert outcome["error"] == error, outcome
    assert "\n" not in outcome["message"]
    assert [word for word in words if word not in outcome["message"]] == []


def test_a_limit_of_requests_is_waited_for(found):
    assert found["limited"]["hash"] == adapter(1.0).hash


def test_a_download_that_broke_off_goes_on_where_it_stopped(found):
    assert found["cut"]["hash"] == adapter(1.0).hash
    first, second = [asked for repository, asked in found["ranges"] if repository == "cut"]
    assert (first, second) == ("", "bytes=128-")


def test_a_repository_that_moved_is_found_under_its_new_name(found):
    assert found["old"]["hash"] == adapter(1.0).hash


def test_the_commit_that_a_branch_stood_for_is_kept_with_the_adapter(found):
    assert found["before"]["source"] == {
        "repository": "tiny/moving",
        "revision": found["server"].COMMIT,
        "asked": "main",
    }


def test_a_branch_that_moved_gives_its_new_commit_and_the_old_one_stays_reachable(found):
    assert found["after"]["hash"] == adapter(2.0).hash
    assert found["after"]["source"]["revision"] == found["server"].LATER_COMMIT
    assert found["the commit before"]["hash"] == found["before"]["hash"] == adapter(1.0).hash


def test_the_token_is_in_no_log_error_or_card(found):
    assert found["private"]["hash"] == adapter(1.0).hash
    assert "tiny/private" in found["printed"]
    assert found["server"].TOKEN not in found["printed"]


@pytest.fixture
def failing(monkeypatch):
    """Makes the model hub's client raise, and counts."""
    calls = []

    def fail_with(error, cause=None):
        def fail(repository, **keywords):
            calls.append(keywords)
            raise error from cause

        monkeypatch.setattr(client, "snapshot_download", fail)
        return calls

    return fail_with


def test_offline_says_which_switch_forbids_the_download(failing):
    failing(LocalEntryNotFoundError("not there"), OfflineModeIsEnabled("off"))
    with pytest.raises(AdapterNotFound, match=r"offline mode \(HF_HUB_OFFLINE\) forbids .* download it first"):
        local_folder("owner/name")
    with pytest.raises(AdapterNotFound, match="local_files_only=True forbids"):
        local_folder("owner/name", local_files_only=True)


def test_what_cannot_be_reached_may_work_later(failing):
    failing(LocalEntryNotFoundError("An error happened"), OSError("connection refused"))
    with pytest.raises(SourceUnavailable, match="cannot be reached"):
        local_folder("owner/name")


def test_a_full_disk_is_no_missing_repository(failing):
    failing(OSError(28, "No space left on device"))
    with pytest.raises(HubFull, match="set HF_HOME"):
        local_folder("owner/name")


@pytest.mark.parametrize("secret", ["hf_abcdefgh", "a secret of another form"])
def test_a_token_in_the_clients_own_message_is_not_passed_on(failing, secret):
    failing(HFValidationError(f"illegal header value 'Bearer {secret}'"))
    with pytest.raises(AdapterNotFound, match=r"\*\*\*") as caught:
        local_folder("owner/name", token=secret)
    assert secret not in str(caught.value)


def limited(wait):
    error = LocalEntryNotFoundError("x")
    error.response = type("Response", (), {"status_code": 429, "headers": {"Retry-After": wait}})
    return error


@pytest.mark.parametrize(("wait", "waits"), [("", [1, 2, 4]), ("7", [7, 7, 7]), ("86400", [30, 30, 30])])
def test_the_wait_for_a_limit_is_the_hubs_own_and_has_a_bound(failing, monkeypatch, wait, waits):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    calls = failing(limited(wait))
    with pytest.raises(SourceUnavailable, match="4 times"):
        local_folder("owner/name")
    assert (waited, len(calls)) == (waits, 4)
