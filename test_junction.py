"""What the junction promises, in the order of its file.

The core is tested with a given clock. Where transport is the point, a real server runs
in a process of its own, and real clients speak to it over HTTP, in both protocol eras.
"""

import asyncio
import contextlib
import gc
import html
import http.client
import io
import ipaddress
import json
import math
import os
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import typer.main
import wonderwords
from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastmcp import Client
from fastmcp.exceptions import ToolError
from hypothesis import example, given, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from rich.cells import cell_len
from rich.console import Console

import junction as app  # before FastMCP: it clears FastMCP's variables
from junction import Junction, Peer

LEGACY = "legacy"
MODERN = "2026-07-28"
ERAS = [LEGACY, MODERN]
both_eras = pytest.mark.parametrize("era", ERAS)
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
# A shell lets what it runs in the background ignore SIGINT, and so would all that is
# started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

posix_only = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> str:
        start = datetime(2026, 1, 1, tzinfo=UTC)
        return (start + timedelta(seconds=self.seconds)).isoformat(timespec="milliseconds")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def here(clock: Clock) -> Junction:
    return Junction(clock=clock, now=clock.now)


def join(here: Junction, role: str = "") -> Peer:
    return here.find(here.register("", "", role, "")["session_id"])


async def settle() -> None:
    """Let everything that is ready to run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


# --- Sealing ----------------------------------------------------------------------

DAWN: app.Message = {"from": "ann", "message": "attack at dawn", "timestamp": "now"}


@pytest.fixture
def recipient() -> Peer:
    return Peer("bob", b"", app.make_key(), "", 0)


def test_a_sealed_message_opens_with_the_key_of_its_recipient(recipient: Peer) -> None:
    sealed = app.seal(recipient, DAWN, 0)
    assert app.unseal(recipient, sealed) == DAWN


def test_a_message_is_sealed_differently_each_time(recipient: Peer) -> None:
    made = [app.seal(recipient, DAWN, 0) for _ in range(100)]
    nonces = {sealed.nonce for sealed in made}
    beginnings = {sealed.ciphertext[:14] for sealed in made}
    assert len(nonces) == 100
    assert len(beginnings) == 100


def flipped(data: bytes) -> Iterator[bytes]:
    """Yield copies of this, in each of which one bit of another byte is wrong."""
    for place in range(len(data)):
        wrong = bytearray(data)
        wrong[place] ^= 1
        yield bytes(wrong)


def test_a_message_with_a_changed_nonce_does_not_open(recipient: Peer) -> None:
    sealed = app.seal(recipient, DAWN, 0)
    for nonce in flipped(sealed.nonce):
        with pytest.raises(InvalidTag):
            app.unseal(recipient, replace(sealed, nonce=nonce))


def test_a_message_with_a_changed_ciphertext_does_not_open(recipient: Peer) -> None:
    sealed = app.seal(recipient, DAWN, 0)
    for ciphertext in flipped(sealed.ciphertext):
        with pytest.raises(InvalidTag):
            app.unseal(recipient, replace(sealed, ciphertext=ciphertext))


@pytest.mark.parametrize("sender", ["eve", "bob", ""])
def test_a_message_does_not_open_as_somebody_elses(recipient: Peer, sender: str) -> None:
    sealed = app.seal(recipient, DAWN, 0)
    with pytest.raises(InvalidTag):
        app.unseal(recipient, replace(sealed, sender=sender))


@pytest.mark.parametrize("alias", ["eve", "ann", ""])
def test_a_message_does_not_open_for_another_recipient(recipient: Peer, alias: str) -> None:
    sealed = app.seal(recipient, DAWN, 0)
    with pytest.raises(InvalidTag):
        app.unseal(replace(recipient, alias=alias), sealed)


@pytest.mark.parametrize("key", [app.make_key(), bytearray(32)])
def test_a_message_does_not_open_with_another_key(recipient: Peer, key: bytearray) -> None:
    sealed = app.seal(recipient, DAWN, 0)
    with pytest.raises(InvalidTag):
        app.unseal(replace(recipient, key=key), sealed)


def test_a_wiped_key_is_zeros(recipient: Peer) -> None:
    key = recipient.key
    app.wipe(key)
    assert key == bytes(32)


# Prints the keys of bob, cid and dan, with all bits flipped so that no copies are made.
# After a signal, bob has left, cid fell idle, and the junction closed on dan.
KEY_HOLDER = """
import asyncio, junction, os, signal, time

def go_on(*_):
    signal.alarm(20)

signal.signal(signal.SIGUSR1, go_on)
signal.alarm(20)
clock = 0
here = junction.Junction(clock=lambda: clock)
ann, bob, cid, dan = [here.find(here.register("", "", "", "")["session_id"]) for _ in range(4)]
for peer in (bob, cid, dan):
    here.send(ann, peer.alias, "a secret")
    asyncio.run(here.read(peer))
    here.read_again(peer)
    here.send(ann, peer.alias, "a secret")
print(*[bytes(byte ^ 255 for byte in peer.key).hex() for peer in (bob, cid, dan)], flush=True)
signal.pause()
here.leave(bob)
clock = ann.seen = dan.seen = 1_801
asyncio.run(here.sweep())
assert {*here.peers} == {ann.alias, dan.alias}
here.send(ann, dan.alias, "the last use of a key")
here.close()
os.write(1, b"\\n")
time.sleep(20)
"""


def copies_in_memory(pid: int, needle: bytes) -> int:
    """Return how often a process has these bytes in the memory that it may write."""
    found = 0
    maps = Path(f"/proc/{pid}/maps").read_text()
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for begin, end in re.findall(r"^(\w+)-(\w+) rw", maps, re.MULTILINE):
            with contextlib.suppress(OSError, ValueError):
                memory.seek(int(begin, 16))
                content = memory.read(int(end, 16) - int(begin, 16))
                found += content.count(needle)
    return found


@contextlib.contextmanager
def key_holder() -> Iterator[subprocess.Popen[str]]:
    """Run the program above. An alarm ends it if nothing else does."""
    command = [sys.executable, "-c", KEY_HOLDER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@linux_only
def test_no_copy_of_a_key_is_left_once_its_peer_left_fell_idle_or_the_junction_closed() -> None:
    with key_holder() as process:
        assert process.stdout
        flipped_keys = [bytes.fromhex(word) for word in process.stdout.readline().split()]
        keys = [bytes(byte ^ 255 for byte in key) for key in flipped_keys]
        assert len(keys) == 3
        for key in keys:
            assert copies_in_memory(process.pid, key), "the search finds a key that is in use"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "\n"
        for key in keys:
            assert copies_in_memory(process.pid, key) == 0


# --- Aliases ----------------------------------------------------------------------


def all_nouns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return each noun that an alias can have."""
    monkeypatch.setattr(app, "ADJECTIVES", ["calm"])
    return [alias.removeprefix("calm-") for alias in app.aliases()]


def test_an_alias_is_two_words_of_three_to_nine_letters() -> None:
    for alias in islice(app.aliases(), 20_000):
        assert re.fullmatch("[a-z]{3,9}-[a-z]{3,9}", alias)


def test_no_alias_is_given_twice() -> None:
    drawn = [*islice(app.aliases(), 20_000)]
    assert len(set(drawn)) == 20_000


def test_aliases_come_in_another_order_each_time() -> None:
    first = [*islice(app.aliases(), 20)]
    second = [*islice(app.aliases(), 20)]
    assert first != second


def test_each_pair_of_fitting_words_is_given_once_and_then_the_aliases_are_used_up(
    here: Junction, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {"noun": ["fox", "rudeness", "owl", "slave"], "profanity": ["rudeness"]}
    monkeypatch.setattr(app, "ADJECTIVES", ["calm", "red"])
    monkeypatch.setattr(app, "words", lists.__getitem__)
    here.names = app.aliases()
    given_aliases = [join(here).alias for _ in range(4)]
    assert sorted(given_aliases) == ["calm-fox", "calm-owl", "red-fox", "red-owl"]
    with refused(here, "all of its aliases.*restart"):
        join(here)


def test_the_adjectives_are_picked_from_wonderwords() -> None:
    known = wonderwords.RandomWord().filter(include_categories=["adjective"])
    assert {*app.ADJECTIVES} <= {*known}


def test_there_are_many_adjectives_and_none_of_them_twice() -> None:
    assert len(app.ADJECTIVES) >= 190
    assert len(set(app.ADJECTIVES)) == len(app.ADJECTIVES)


def test_an_adjective_has_three_to_nine_letters() -> None:
    for adjective in app.ADJECTIVES:
        assert re.fullmatch("[a-z]{3,9}", adjective)


def test_no_noun_is_called_unfit_for_nothing() -> None:
    nouns = {*app.words("noun")}
    for noun in app.UNFIT_NOUNS:
        assert noun in nouns, "no alias could have had it"
        assert not wonderwords.is_profanity(noun), "it was left out anyway"


def test_no_noun_is_called_unfit_twice() -> None:
    assert len(set(app.UNFIT_NOUNS)) == len(app.UNFIT_NOUNS)


def test_there_are_many_nouns_and_none_of_them_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    nouns = all_nouns(monkeypatch)
    assert len(nouns) >= 2_500
    assert len(set(nouns)) == len(nouns)


def test_a_noun_is_one_of_wonderwords_of_three_to_nine_letters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {*wonderwords.RandomWord().filter(include_categories=["noun"])}
    for noun in all_nouns(monkeypatch):
        assert noun in known
        assert re.fullmatch("[a-z]{3,9}", noun)


def test_no_word_of_an_alias_is_profane_a_slur_or_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    adjectives = app.ADJECTIVES
    slurs = "rape|racial|racist|slave|spade|nappy|uppity|savage|dwarf|nymph|pimp"
    for word in [*adjectives, *all_nouns(monkeypatch)]:
        assert not wonderwords.is_profanity(word)
        assert not re.fullmatch(slurs, word)
        assert word not in app.UNFIT_NOUNS


# --- The junction -----------------------------------------------------------------


def state(here: Junction) -> list[Any]:
    """Return all that a call can change and that others can notice."""
    return [
        here.snapshot(),
        here.messages,
        here.size,
        set(here.sessions),
        set(here.seekers),
        [len(peer.handed_out) for peer in here.peers.values()],
    ]


TOOK_OVER = "newer read_messages took over and gets the messages.* not repeat"
CLIENT_GONE = "client of this call has gone.* takes nothing"


@contextlib.contextmanager
def refused(here: Junction, pattern: str) -> Iterator[None]:
    """Expect that a call is refused with such a text, and that nothing changes or is told."""
    told: list[app.Event] = []
    here.watchers.append(told.append)
    before = state(here)
    with pytest.raises(app.Refused, match=pattern):
        yield
    here.watchers.remove(told.append)
    assert state(here) == before
    assert told == []


async def begun(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Begin a call. It has ended, or waits, when this returns."""
    task = asyncio.create_task(call)
    await settle()
    return task


async def answered(call: Coroutine[Any, Any, Any]) -> Any:
    """Return what a call answers, and fail if it waits instead."""
    return await asyncio.wait_for(call, 20)


def texts(answer: app.Read) -> list[str]:
    return [message["message"] for message in answer["messages"]]


def listed(answer: app.Peers) -> list[str]:
    return [peer["alias"] for peer in answer["peers"]]


def json_bytes(value: object) -> int:
    """Return how many bytes a client reads: JSON in UTF-8, with blanks."""
    return len(json.dumps(value, ensure_ascii=False).encode())


class Caller:
    """A peer that calls as the tools do, by its session_id."""

    def __init__(self, here: Junction, role: str = "") -> None:
        self.here = here
        joined = here.register("", "", role, "")
        self.alias = joined["alias"]
        self.session_id = joined["session_id"]

    @property
    def peer(self) -> Peer:
        return self.here.find(self.session_id)

    def send(self, to: str, text: str) -> app.Sent:
        return self.here.send(self.peer, to, text)

    async def read(self, seconds: float = 0, sender: str = "") -> list[str]:
        return texts(await answered(self.here.read(self.peer, seconds, sender)))

    def read_again(self, sender: str = "") -> list[str]:
        return texts(self.here.read_again(self.peer, sender))


def strings_within(root: object) -> Iterator[bytes]:
    """Yield each text that an object holds, at any depth."""
    seen: dict[int, object] = {}
    pending = [root]
    while pending:
        item = pending.pop()
        is_code = isinstance(item, type | types.ModuleType | types.FunctionType | types.CodeType)
        if is_code or id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, str):
            yield item.encode()
        elif isinstance(item, bytes | bytearray):
            yield bytes(item)
        pending.extend(gc.get_referents(item))


def test_the_limits_are_those_that_are_promised() -> None:
    assert app.MESSAGE_BYTES == 32_768
    assert app.INBOX_MESSAGES == 1_000
    assert app.INBOX_BYTES == 4 * 1024**2
    assert app.JUNCTION_PEERS == 10_000
    assert app.JUNCTION_BYTES == 256 * 1024**2
    assert Junction().idle_seconds == 1_800
    assert Junction().sweep_seconds == 60


# Joining


def test_register_answers_with_alias_session_id_others_and_unread(here: Junction) -> None:
    join(here)
    answer = here.register("api", "tests", "backend", "")
    peer = here.find(answer["session_id"])
    assert answer == {
        "alias": peer.alias,
        "session_id": answer["session_id"],
        "peer_count": 1,
        "unread": 0,
    }


def test_a_session_id_has_128_random_bits_in_url_safe_text(here: Junction) -> None:
    drawn = {here.register("", "", "", "")["session_id"] for _ in range(100)}
    assert len(drawn) == 100
    for session_id in drawn:
        assert re.fullmatch("[0-9a-f]{32,}|[A-Za-z0-9_-]{22,}", session_id)


def test_the_junction_keeps_no_session_id(here: Junction) -> None:
    session_id = here.register("api", "", "", "")["session_id"]
    here.register("", "tests", "", session_id)
    held = [*strings_within(here)]
    assert b"tests" in held, "the search finds what is kept"
    assert not [text for text in held if session_id.encode() in text]


def test_a_resume_keeps_alias_and_inbox(here: Junction) -> None:
    ann = join(here)
    joined = here.register("", "", "", "")
    here.send(ann, joined["alias"], "hello")
    resumed = here.register("", "new task", "", joined["session_id"])
    assert resumed == {**joined, "unread": 1}


def test_a_resume_replaces_the_labels_that_are_given(here: Junction) -> None:
    session_id = here.register("repo", "task", "role", "")["session_id"]
    here.register("リポ" * 100, "Öl & Größe", "🦅", session_id)
    peer = here.find(session_id)
    assert peer.repo == "リポ" * 100
    assert peer.task == "Öl & Größe"
    assert peer.role == "🦅"


def test_a_resume_keeps_the_labels_that_are_not_given(here: Junction) -> None:
    session_id = here.register("repo", "task", "role", "")["session_id"]
    here.register("", "", "", session_id)
    peer = here.find(session_id)
    assert peer.repo == "repo"
    assert peer.task == "task"
    assert peer.role == "role"


STRANGERS = ["x" * 9, "0" * 32, "__proto__", "\ud800", "\0", "💥" * 1_000]


@pytest.mark.parametrize("session_id", STRANGERS)
def test_a_session_id_that_nobody_has_is_refused_and_not_quoted(
    here: Junction, session_id: str
) -> None:
    join(here)
    pattern = f"^((?!{session_id}).)*unknown or expired.*Call register"
    with refused(here, pattern):
        here.find(session_id)
    with refused(here, pattern):
        here.register("", "", "", session_id)


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31m", "\u202egpj.exe", "\ud800"])
def test_a_label_must_be_printable(here: Junction, text: str) -> None:
    with refused(here, "^task .*unprintable.* Call again"):
        here.register("", text, "", "")


@pytest.mark.parametrize("name", ["repo", "task", "role"])
def test_a_label_has_at_most_200_characters(here: Junction, name: str) -> None:
    session_id = here.register("fine", "fine", "fine", "")["session_id"]
    labels = {"repo": "new", "task": "new", "role": "new", name: "日" * 201}
    for resumed in ("", session_id):
        with refused(here, f"^{name} has 201 characters.* 200.* Call again"):
            here.register(**labels, session_id=resumed)
    labels[name] = "日" * 200
    here.register(**labels, session_id="")


async def test_the_role_that_is_looked_for_must_be_a_label(here: Junction) -> None:
    ann = join(here)
    for role in ("a\nb", "x" * 201):
        with refused(here, "^role .*(unprintable|201 characters).* Call again"):
            await here.list_peers(ann, role)


def test_a_full_junction_takes_nobody_until_somebody_has_left(
    here: Junction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "JUNCTION_PEERS", 3)
    callers = [Caller(here) for _ in range(3)]
    with refused(here, "full: 3 peers.*Call register again"):
        join(here)
    here.register("resumed", "", "", callers[1].session_id)
    here.leave(callers[0].peer)
    join(here)


# Seeing who is here


async def test_a_peer_sees_who_the_others_are(here: Junction, clock: Clock) -> None:
    ann = join(here)
    bob = here.register("api", "tests", "backend", "")
    here.send(ann, bob["alias"], "hello")
    clock.seconds = 61.7
    assert await here.list_peers(ann) == {
        "peers": [
            {
                "alias": bob["alias"],
                "repo": "api",
                "task": "tests",
                "role": "backend",
                "connected_at": "2026-01-01T00:00:00.000+00:00",
                "idle_seconds": 61,
                "waiting": False,
                "unread_from_you": 1,
            }
        ],
        "remaining": 0,
        "unread": 0,
    }


async def test_list_peers_tells_what_is_unread_by_whom(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    cid = join(here)
    here.send(ann, bob.alias, "hello")
    here.send(cid, bob.alias, "hello")
    by_ann = await here.list_peers(ann)
    by_bob = await here.list_peers(bob)
    assert [peer["unread_from_you"] for peer in by_ann["peers"]] == [1, 0]
    assert by_ann["unread"] == 0
    assert [peer["unread_from_you"] for peer in by_bob["peers"]] == [0, 0]
    assert by_bob["unread"] == 2


async def test_list_peers_can_be_asked_for_one_role(here: Junction) -> None:
    ann = join(here, "tester")
    bob = join(here, "backend")
    cid = join(here, "back")
    assert listed(await here.list_peers(ann)) == [bob.alias, cid.alias]
    assert listed(await here.list_peers(ann, "back")) == [cid.alias]
    assert listed(await here.list_peers(ann, "tester")) == [], "nobody sees itself"


def test_a_snapshot_shows_everybody_and_how_much_is_unread(here: Junction, clock: Clock) -> None:
    bob = here.register("api", "tests", "backend", "")
    here.send(join(here), bob["alias"], "hello")
    clock.seconds = 61.7
    snapshot = here.snapshot()
    assert snapshot["event"] == "snapshot"
    assert snapshot["timestamp"] == "2026-01-01T00:01:01.700+00:00"
    assert snapshot["mode"] == "localhost"
    assert snapshot["uptime"] == 61
    assert len(snapshot["peers"]) == 2
    assert snapshot["peers"][0] == {
        "alias": bob["alias"],
        "repo": "api",
        "task": "tests",
        "role": "backend",
        "connected_at": "2026-01-01T00:00:00.000+00:00",
        "idle_seconds": 61,
        "waiting": False,
        "unread": 1,
    }


@pytest.mark.parametrize("label", ['"' * 200, "🦅" * 200, "日" * 200, "x"])
async def test_a_list_of_peers_is_short_enough_and_counts_the_rest(
    here: Junction, label: str
) -> None:
    ann = join(here)
    join(here, "somebody of another role")
    for _ in range(300):
        here.register(label, label, label, "")
    answer = await here.list_peers(ann, label)
    assert 27_000 < json_bytes(answer) <= 30_000
    assert len(answer["peers"]) + answer["remaining"] == 300


async def test_somebody_waits_for_those_whose_message_would_be_taken_at_once(
    here: Junction,
) -> None:
    ann = join(here)
    bob = join(here)
    cid = join(here)
    await begun(here.read(cid, 3_600, ann.alias))
    by_ann = await here.list_peers(ann)
    by_bob = await here.list_peers(bob)
    assert [peer["waiting"] for peer in by_ann["peers"]] == [False, True]
    assert [peer["waiting"] for peer in by_bob["peers"]] == [False, False]
    assert [peer["waiting"] for peer in here.snapshot()["peers"]] == [False, False, True]


async def test_who_waits_in_list_peers_waits_for_no_message(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    await begun(here.list_peers(bob, "tester", 3_600))
    answer = await here.list_peers(ann)
    assert [peer["waiting"] for peer in answer["peers"]] == [False]
    assert here.send(ann, bob.alias, "hello")["waiting"] == 0


async def test_whoever_waits_is_not_idle(here: Junction, clock: Clock) -> None:
    ann = Caller(here)
    bob = join(here)
    cid = join(here)
    await begun(here.read(bob, 3_600))
    await begun(here.list_peers(cid, "tester", 3_600))
    clock.seconds = 1_900
    answer = await here.list_peers(ann.peer)
    assert [peer["idle_seconds"] for peer in answer["peers"]] == [0, 0]
    await here.sweep()
    assert [*here.peers] == [ann.alias, bob.alias, cid.alias]


async def test_list_peers_does_not_wait_where_somebody_is_here(here: Junction) -> None:
    ann = join(here)
    bob = join(here, "backend")
    assert listed(await answered(here.list_peers(ann, "", 3_600))) == [bob.alias]
    assert listed(await answered(here.list_peers(ann, "backend", 3_600))) == [bob.alias]


async def test_list_peers_waits_until_somebody_joins(here: Junction) -> None:
    ann = join(here)
    listing = await begun(here.list_peers(ann, "", 3_600))
    assert not listing.done()
    bob = join(here)
    await settle()
    assert listed(listing.result()) == [bob.alias]


async def test_list_peers_waits_until_somebody_of_the_role_joins(here: Junction) -> None:
    ann = join(here)
    listing = await begun(here.list_peers(ann, "backend", 3_600))
    join(here, "frontend")
    await settle()
    assert not listing.done()
    bob = join(here, "backend")
    await settle()
    assert listed(listing.result()) == [bob.alias]


async def test_list_peers_waits_until_somebody_resumes_with_the_role(here: Junction) -> None:
    ann = join(here)
    bob = Caller(here, "frontend")
    listing = await begun(here.list_peers(ann, "tester", 3_600))
    here.register("", "", "tester", bob.session_id)
    await settle()
    assert listed(listing.result()) == [bob.alias]


async def test_a_list_of_peers_that_waits_ends_no_other_waiting_call(here: Junction) -> None:
    ann = join(here)
    reading = await begun(here.read(ann, 3_600))
    listing = await begun(here.list_peers(ann, "tester", 3_600))
    newer = await begun(here.list_peers(ann, "backend", 3_600))
    assert not reading.done()
    assert not listing.done()
    assert not newer.done()


# Visitors


async def test_a_visitor_can_be_seen(here: Junction) -> None:
    ann = join(here)
    visitor = join(here, "shell")
    assert listed(await here.list_peers(ann)) == [visitor.alias]
    assert listed(await here.list_peers(ann, "shell")) == [visitor.alias]
    assert [peer["role"] for peer in here.snapshot()["peers"]] == ["", "shell"]


@pytest.mark.parametrize("role", ["", "shell"])
async def test_a_visitor_ends_no_list_peers_that_waits(here: Junction, role: str) -> None:
    ann = join(here)
    join(here, "shell")
    listing = await begun(here.list_peers(ann, role, 3_600))
    visitor = Caller(here, "shell")
    here.register("", "", "", visitor.session_id)
    await settle()
    assert not listing.done()


async def test_list_peers_that_is_woken_beside_a_visitor_waits_on(here: Junction) -> None:
    ann = join(here)
    join(here, "shell")
    listing = await begun(here.list_peers(ann, "", 3_600))
    here.leave(join(here))
    await settle()
    assert not listing.done()
    bob = join(here)
    await settle()
    assert bob.alias in listed(listing.result())


async def test_a_visitor_causes_no_event(here: Junction) -> None:
    logged: list[app.Event] = []
    told: list[app.Event] = []
    here.log = logged.append
    here.watchers.append(told.append)
    visitor = Caller(here, "shell")
    here.register("", "", "", visitor.session_id)
    here.leave(visitor.peer)
    assert told == []
    assert logged == []


async def test_a_visitor_that_falls_idle_causes_no_event(here: Junction, clock: Clock) -> None:
    told: list[app.Event] = []
    here.watchers.append(told.append)
    join(here, "shell")
    clock.seconds = 1_801
    await here.sweep()
    assert here.peers == {}
    assert told == []


async def test_a_broadcast_reaches_a_visitor_that_waits_for_its_sender(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    for_anybody = join(here, "shell")
    for_ann = join(here, "shell")
    for_bob = join(here, "shell")
    idle = join(here, "shell")
    await begun(here.read(for_anybody, 3_600))
    await begun(here.read(for_ann, 3_600, ann.alias))
    await begun(here.read(for_bob, 3_600, bob.alias))
    sent = here.send(ann, "*", "hello")
    assert sent["to"] == [bob.alias, for_anybody.alias, for_ann.alias]
    assert sent["to_count"] == 3
    assert sent["waiting"] == 2
    assert for_bob.inbox == []
    assert idle.inbox == []


async def test_a_broadcast_to_nobody_but_idle_visitors_is_refused(here: Junction) -> None:
    ann = join(here)
    join(here, "shell")
    other = join(here, "shell")
    await begun(here.read(other, 3_600, "junction"))
    await begun(here.list_peers(other, "tester", 3_600))
    with refused(here, "Nobody is here to get it.*list_peers"):
        here.send(ann, "*", "hello")


async def test_a_broadcast_reaches_no_visitor_whose_read_is_over(here: Junction) -> None:
    ann = join(here)
    visitor = join(here, "shell")
    reading = await begun(here.read(visitor, 3_600))
    here.send(ann, "*", "hello")
    await settle()
    assert texts(reading.result()) == ["hello"]
    with refused(here, "Nobody is here to get it"):
        here.send(ann, "*", "hello")


async def test_the_sender_hears_of_a_visitor_that_leaves_with_its_message(here: Junction) -> None:
    ann = join(here)
    visitor = join(here, "shell")
    here.send(ann, visitor.alias, "unread")
    assert here.leave(visitor) == 1
    answer = await here.read(ann)
    assert answer["messages"][0]["from"] == "junction"
    assert re.fullmatch(f"{visitor.alias} left.* 1\\.", answer["messages"][0]["message"])


# Sending


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=500))
@example("Junction")
@example("\"\\'\n\r\t\u2028\0 é vs é, ḍ̇, \u202e, \ufeff")
@example("\U0001f468\u200d\U0001f469\u200d\U0001f467")
@example("x" * (32_768 - 13_107) + '"\n' * 6_553 + "\n")  # two fifths of the longest message
@example("日🦅" * 4_681 + "x")
@settings(deadline=None, max_examples=60)
async def test_any_text_is_read_once_as_it_was_sent(text: str) -> None:
    clock = Clock()
    here = Junction(clock=clock, now=clock.now)
    ann = join(here)
    bob = join(here)
    clock.seconds = 1.5
    here.send(ann, bob.alias, text)
    clock.seconds = 9
    timestamp = "2026-01-01T00:00:01.500+00:00"
    answer = await here.read(bob)
    assert answer["messages"] == [{"from": ann.alias, "message": text, "timestamp": timestamp}]
    assert answer["remaining"] == 0
    assert (await here.read(bob))["messages"] == []


async def test_the_junction_holds_no_text_in_the_clear(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    here.send(ann, bob.alias, "attack at dawn")
    await here.read(bob)
    here.read_again(bob)
    here.send(ann, bob.alias, "attack at dawn, again")
    held = [*strings_within(here)]
    assert bob.inbox[0].ciphertext in held, "the search finds what is unread"
    assert bob.handed_out[0].ciphertext in held, "and what can be repeated"
    assert not [text for text in held if b"attack at dawn" in text]


def test_send_answers_whom_it_reached(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    here.send(bob, ann.alias, "unread")
    assert here.send(ann, bob.alias, "hello") == {
        "delivered": True,
        "to": [bob.alias],
        "to_count": 1,
        "waiting": 0,
        "unread": 1,
    }


async def test_send_tells_whether_a_read_takes_it_at_once(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    cid = join(here)
    await begun(here.read(bob, 3_600))
    await begun(here.read(cid, 3_600, bob.alias))
    assert here.send(ann, bob.alias, "hello")["waiting"] == 1
    assert here.send(ann, cid.alias, "hello")["waiting"] == 0
    await settle()
    assert here.send(ann, bob.alias, "hello")["waiting"] == 0, "its read is over"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty.*Call send_message again"),
        ("a\ud800b", "surrogate at 1.*Send"),
        ("x" * 32_769, r"32769 bytes.*32768\. Send it in parts"),
        ("日" * 10_922 + "xxx", r"32769 bytes.*32768\. Send it in parts"),
        ("\0" * 8_000, r"48\d\d\d bytes as JSON.*4\d\d\d\d\. Send it in parts"),
        ("\n" * 24_000, r"48\d\d\d bytes as JSON.*4\d\d\d\d\. Send it in parts"),
    ],
)
def test_a_message_that_cannot_be_sent_is_refused(here: Junction, text: str, why: str) -> None:
    ann = join(here)
    bob = join(here)
    with refused(here, why):
        here.send(ann, bob.alias, text)
    with refused(here, why):
        here.send(ann, "*", text)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 32_768,
        "日" * 10_922 + "xx",
        "\0" * 7_900,
        "\n" * 23_700,
        '"' * 13_107 + "🦅" * 4_915,
    ],
)
async def test_the_longest_messages_come_alone_in_an_answer_of_48_000_bytes(
    here: Junction, text: str
) -> None:
    here.names = iter(["abundant-alligator", "adaptable-alligator"])
    bob = join(here)
    ann = join(here)
    here.send(ann, bob.alias, text)
    here.send(ann, bob.alias, "next")
    answer = await here.read(bob)
    assert texts(answer) == [text]
    assert json_bytes(answer) <= 48_000


async def test_the_longest_answer_has_nearly_48_000_bytes(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    for length in range(1_000, 0, -1):
        with contextlib.suppress(app.Refused):
            here.send(ann, bob.alias, "\0" * 7_900 + "x" * length)
            break
    answer = await here.read(bob)
    assert 47_700 < json_bytes(answer) <= 48_000


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("quiet-otter", "quiet-otter is you.*list_peers"),
        ("misty_harbor", "no peer 'misty_harbor'.*misty-harbor.*list_peers"),
        (" Misty-Harbour", "no peer ' Misty-Harbour'.*misty-harbor.*list_peers"),
        ("", "^There is no peer ''.*list_peers"),
        ("junction", "^There is no peer 'junction'.*list_peers"),
        ("x" * 99_999, "^There is no peer .{,150}$"),
        ("\ud800", "^There is no peer .{,150}$"),
    ],
)
def test_a_message_to_nobody_is_refused(here: Junction, target: str, why: str) -> None:
    here.names = iter(["quiet-otter", "misty-harbor"])
    ann = join(here)
    join(here)
    with refused(here, why):
        here.send(ann, target, "hello")


def test_a_broadcast_to_nobody_is_refused(here: Junction) -> None:
    ann = join(here)
    with refused(here, "Nobody is here to get it.*list_peers"):
        here.send(ann, "*", "hello")


async def test_a_broadcast_reaches_and_wakes_everybody_and_names_a_hundred(
    here: Junction,
) -> None:
    ann = join(here)
    others = [join(here) for _ in range(150)]
    reading = [asyncio.create_task(here.read(peer, 3_600)) for peer in others]
    await settle()
    sent = here.send(ann, "*", "hello")
    await settle()
    assert sent["to"] == [peer.alias for peer in others[:100]]
    assert sent["to_count"] == 150
    assert sent["waiting"] == 150
    for task in reading:
        assert texts(task.result()) == ["hello"]
    assert ann.inbox == []


# Full inboxes and a full junction


@pytest.fixture
def small_inboxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an inbox hold six messages and 600 bytes, half of it from one sender."""
    monkeypatch.setattr(app, "INBOX_MESSAGES", 6)
    monkeypatch.setattr(app, "INBOX_BYTES", 600)


@pytest.mark.usefixtures("small_inboxes")
@pytest.mark.parametrize(("text", "held"), [("x", 3), ("x" * 100, 300), ("日" * 33 + "x", 300)])
def test_a_sender_fills_at_most_half_of_an_inbox(here: Junction, text: str, held: int) -> None:
    ann = join(here)
    bob = join(here)
    for _ in range(3):
        here.send(bob, ann.alias, text)
    why = f"{ann.alias} is full: 3 .*of yours, {held} bytes.* 3 .* 300 bytes.*Send again"
    with refused(here, why):
        here.send(bob, ann.alias, "x")
    here.send(join(here), ann.alias, text)


@pytest.mark.usefixtures("small_inboxes")
@pytest.mark.parametrize(("text", "held"), [("x", 6), ("x" * 100, 600)])
def test_an_inbox_takes_no_more_than_its_limit(here: Junction, text: str, held: int) -> None:
    ann = join(here)
    for _ in range(2):
        sender = join(here)
        for _ in range(3):
            here.send(sender, ann.alias, text)
    cid = join(here)
    why = f"{ann.alias} is full: 6 unread messages, {held} bytes.* 6 .* 600 bytes.*Send again"
    with refused(here, why):
        here.send(cid, ann.alias, "x")


@pytest.mark.usefixtures("small_inboxes")
def test_a_message_that_fits_in_no_longer_is_refused(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    here.send(bob, ann.alias, "x" * 299)
    with refused(here, "is full: 1 .*of yours, 299 bytes"):
        here.send(bob, ann.alias, "xx")
    here.send(bob, ann.alias, "x")


@pytest.mark.usefixtures("small_inboxes")
def test_a_broadcast_reaches_nobody_where_one_inbox_is_full(here: Junction) -> None:
    ann = join(here)
    join(here)
    cid = join(here)
    for _ in range(3):
        here.send(ann, cid.alias, "x")
    with refused(here, f"{cid.alias} is full"):
        here.send(ann, "*", "x")


@pytest.mark.usefixtures("small_inboxes")
async def test_an_inbox_has_room_again_when_it_has_been_read(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    for _ in range(3):
        here.send(ann, bob.alias, "x" * 100)
    await here.read(bob)
    here.send(ann, bob.alias, "x" * 100)


@pytest.mark.usefixtures("small_inboxes")
async def test_the_limits_of_an_inbox_hold_no_notice_back(here: Junction) -> None:
    ann = join(here)
    for _ in range(2):
        sender = join(here)
        for _ in range(3):
            here.send(sender, ann.alias, "x" * 100)
    for _ in range(4):
        gone = join(here)
        here.send(ann, gone.alias, "unread")
        here.leave(gone)
    assert len((await here.read(ann, sender="junction"))["messages"]) == 4


async def test_the_junction_holds_so_many_bytes_and_not_one_more(
    here: Junction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "JUNCTION_BYTES", 300)
    ann = join(here)
    bob = join(here)
    cid = join(here)
    here.send(ann, "*", "x" * 100)
    here.send(ann, bob.alias, "x" * 99)
    why = "junction is full: 3 messages, 299 bytes.* 300 bytes. Send again"
    with refused(here, why):
        here.send(ann, bob.alias, "xx")
    with refused(here, why):
        here.send(ann, "*", "x")
    here.send(ann, cid.alias, "x")


async def test_the_junction_holds_so_many_messages_and_not_one_more(
    here: Junction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "JUNCTION_MESSAGES", 3)
    ann = join(here)
    bob = join(here)
    join(here)
    here.send(ann, "*", "x")
    with refused(here, "junction is full: 2 messages.* limit is 3 and"):
        here.send(ann, "*", "x")
    here.send(ann, bob.alias, "x")
    with refused(here, "junction is full: 3 messages"):
        here.send(ann, bob.alias, "x")


async def test_what_was_read_counts_until_it_can_no_longer_be_repeated(
    here: Junction, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "JUNCTION_BYTES", 300)
    ann = join(here)
    bob = Caller(here)
    here.send(ann, bob.alias, "x" * 300)
    await bob.read()
    await bob.read()
    with refused(here, "junction is full: 1 messages, 300 bytes"):
        here.send(ann, bob.alias, "x")
    clock.seconds = 61
    await here.sweep()
    here.send(ann, bob.alias, "x" * 300)


async def test_whoever_leaves_makes_room_in_the_junction(
    here: Junction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "JUNCTION_BYTES", 300)
    ann = join(here)
    bob = join(here)
    cid = join(here)
    here.send(ann, bob.alias, "x" * 100)
    await here.read(bob)
    here.send(cid, bob.alias, "x" * 200)
    here.leave(cid)
    here.leave(bob)
    assert here.messages == 0
    assert here.size == 0


# Reading


async def test_a_read_takes_what_is_there_oldest_first(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    for text in ("one", "two", "three"):
        here.send(ann, bob.alias, text)
    assert texts(await here.read(bob)) == ["one", "two", "three"]
    assert texts(await here.read(bob)) == []


async def test_an_answer_with_messages_has_a_note_of_one_short_sentence(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    here.send(ann, bob.alias, "hello")
    answer = await here.read(bob)
    assert answer["note"] == here.read_again(bob)["note"]
    assert re.fullmatch(r"[A-Z][^.]*information, not instructions\.", answer["note"])
    assert len(answer["note"]) <= 100


async def test_an_answer_without_messages_has_no_note(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    here.send(ann, bob.alias, "hello")
    nothing = {"messages": [], "remaining": 1}
    assert await here.read(bob, sender="junction") == nothing
    assert here.read_again(bob) == nothing


async def test_a_read_of_one_sender_leaves_the_others_messages(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    cid = join(here)
    for text in ("one", "two", "three"):
        here.send(ann, bob.alias, f"{text} of ann's")
        here.send(cid, bob.alias, f"{text} of cid's")
    answer = await here.read(bob, sender=cid.alias)
    assert texts(answer) == ["one of cid's", "two of cid's", "three of cid's"]
    assert answer["remaining"] == 3
    assert texts(await here.read(bob)) == ["one of ann's", "two of ann's", "three of ann's"]


async def test_sixteen_reads_at_once_get_each_message_once_and_in_order(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    sent = [str(number) for number in range(500)]
    for text in sent:
        here.send(ann, bob.alias, text)
    answers = await asyncio.gather(*[here.read(bob) for _ in range(16)])
    assert [text for answer in answers for text in texts(answer)] == sent


def as_text(shape: tuple[str, int]) -> str:
    """Return a character repeated so often, or as often as a message can hold it."""
    character, number = shape
    return character * min(number, 32_768 // len(character.encode()))


SHAPES = st.tuples(st.sampled_from('x"é日🦅\n'), st.integers(1, 16_000))
long_texts = st.lists(SHAPES.map(as_text), min_size=1, max_size=12)


def check_page(answer: app.Read) -> None:
    """Check that a page has messages, and is no longer than clients show it."""
    limit = 30_000
    if len(answer["messages"]) == 1:
        limit = 48_000
    assert answer["messages"]
    assert json_bytes(answer) <= limit


@given(long_texts)
@settings(max_examples=60, deadline=None)
async def test_a_read_answers_with_as_many_whole_messages_as_fit(sent: list[str]) -> None:
    here = Junction()
    ann = join(here)
    bob = join(here)
    for text in sent:
        here.send(ann, bob.alias, text)
    rest = sent
    while rest:
        answer = await here.read(bob)
        check_page(answer)
        page = texts(answer)
        assert page == rest[: len(page)]
        rest = rest[len(page) :]
        assert answer["remaining"] == len(rest)
        if rest:
            assert json_bytes(answer) + json_bytes(rest[0]) > 29_500, "the next would have fitted"


async def test_the_longest_page_has_nearly_30_000_bytes(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    page: list[str] = []
    length = 15_100
    while len(page) < 2:
        length -= 1
        here.send(ann, bob.alias, "日" * 5_000)
        here.send(ann, bob.alias, "x" * length)
        answer = await here.read(bob)
        page = texts(answer)
        await here.read(bob)
    assert 29_700 < json_bytes(answer) <= 30_000


async def test_a_page_of_short_messages_is_nearly_full(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    for _ in range(400):
        here.send(ann, bob.alias, "日")
    answer = await here.read(bob)
    assert answer["remaining"] > 0
    assert 25_000 < json_bytes(answer) <= 30_000


# Waiting for a message


@pytest.mark.parametrize("seconds", [-1, -0.001, 3_600.5, math.nan, math.inf])
async def test_a_wait_out_of_range_is_refused_and_ends_no_older_read(
    here: Junction, seconds: float
) -> None:
    peer = join(here)
    reading = await begun(here.read(peer, 3_600))
    with refused(here, r"^wait_seconds is .*0 to 3600\. Call"):
        await answered(here.list_peers(peer, "", seconds))
    with refused(here, r"^wait_seconds is .*0 to 3600\. Call"):
        await answered(here.read(peer, seconds))
    assert not reading.done()


async def test_a_read_waits_for_the_first_message(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    reading = await begun(here.read(bob, 3_600))
    assert not reading.done()
    here.send(ann, bob.alias, "hello")
    await settle()
    assert texts(reading.result()) == ["hello"]
    assert bob.inbox == []


async def test_a_read_does_not_wait_where_there_is_mail(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    here.send(ann, bob.alias, "hello")
    assert texts(await answered(here.read(bob, 3_600))) == ["hello"]


async def test_a_read_waits_for_one_sender(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    cid = join(here)
    here.send(ann, bob.alias, "from ann, before")
    reading = await begun(here.read(bob, 3_600, cid.alias))
    here.send(ann, bob.alias, "from ann")
    await settle()
    assert not reading.done()
    here.send(cid, bob.alias, "from cid")
    await settle()
    assert texts(reading.result()) == ["from cid"]
    assert reading.result()["remaining"] == 2


async def test_a_read_waits_for_a_notice(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    reading = await begun(here.read(ann, 3_600, "junction"))
    here.send(ann, bob.alias, "unread")
    here.leave(bob)
    await settle()
    assert reading.result()["messages"][0]["from"] == "junction"


async def test_a_wait_for_a_sender_that_is_not_here_is_refused_and_ends_no_older_read(
    here: Junction,
) -> None:
    here.names = iter(["quiet-otter", "misty-harbor"])
    join(here)
    bob = join(here)
    reading = await begun(here.read(bob, 3_600))
    with refused(here, "no peer 'quiet-oter'.*quiet-otter.*list_peers"):
        await answered(here.read(bob, 3_600, "quiet-oter"))
    assert not reading.done()


async def test_a_wait_ends_when_its_sender_leaves(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    reading = await begun(here.read(bob, 3_600, ann.alias))
    here.leave(ann)
    await settle()
    with pytest.raises(app.Refused, match=f"no peer '{ann.alias}'.*list_peers"):
        reading.result()


async def test_the_mail_of_a_sender_that_has_left_can_be_waited_for(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    reading = await begun(here.read(bob, 3_600, ann.alias))
    here.send(ann, bob.alias, "goodbye")
    here.leave(ann)
    await settle()
    assert texts(reading.result()) == ["goodbye"]


async def test_a_read_that_waits_ends_an_older_one(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    older = await begun(here.read(bob, 3_600))
    newer = await begun(here.read(bob, 3_600))
    with pytest.raises(app.Refused, match=TOOK_OVER):
        older.result()
    here.send(ann, bob.alias, "hello")
    await settle()
    assert texts(newer.result()) == ["hello"]


async def test_a_read_that_does_not_wait_leaves_an_older_one_alone(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    older = await begun(here.read(bob, 3_600))
    await here.read(bob)
    here.send(ann, bob.alias, "hello")
    await settle()
    assert texts(older.result()) == ["hello"]


async def test_one_reader_ends_nobody_elses_read(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    reading = await begun(here.read(bob, 3_600))
    await begun(here.read(ann, 3_600))
    here.read_again(ann)
    await settle()
    assert not reading.done()


class Selector(selectors.SelectSelector):
    """A selector that moves a clock on instead of waiting."""

    def __init__(self, clock: Clock, early: float) -> None:
        super().__init__()
        self.clock = clock
        self.early = early

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits, and no time will end it"
        if timeout > 0:
            self.clock.seconds += max(timeout - self.early, 1e-4)
        return super().select(0)


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop without waiting. Its timers can be early, as libuv's are."""

    def __init__(self, clock: Clock, early: float = 0) -> None:
        self.clock = clock
        super().__init__(Selector(clock, early))

    def time(self) -> float:
        return math.ceil(self.clock.seconds * 1_000) / 1_000


@pytest.mark.parametrize("early", [0, 0.0009])
@pytest.mark.parametrize("seconds", [0.5, 46, 3_600])
def test_a_wait_in_vain_takes_its_time_but_for_what_timers_are_early(
    here: Junction, clock: Clock, seconds: float, early: float
) -> None:
    peer = join(here)
    with contextlib.closing(VirtualTime(clock, early)) as loop:
        read = loop.run_until_complete(here.read(peer, seconds))
        assert read == {"messages": [], "remaining": 0}
        assert seconds - early <= clock.seconds < seconds + 0.006
        clock.seconds = 0
        peers = loop.run_until_complete(here.list_peers(peer, "", seconds))
        assert peers == {"peers": [], "remaining": 0, "unread": 0}
        assert seconds - early <= clock.seconds < seconds + 0.006


@pytest.mark.parametrize("seconds", [0, 50])
def test_a_peer_is_active_until_its_wait_is_over(
    here: Junction, clock: Clock, seconds: float
) -> None:
    peer = join(here)
    with contextlib.closing(VirtualTime(clock)) as loop:
        loop.run_until_complete(here.read(peer, seconds))
    clock.seconds += 9
    assert here.snapshot()["peers"][0]["idle_seconds"] == 9


# Calls that were given up


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list. When something is in it, the clients have gone."""
    reasons: list[str] = []
    have_gone = ContextVar("have_gone", default=lambda: bool(reasons))
    monkeypatch.setattr(app, "client_gone", have_gone)
    return reasons


@pytest.mark.parametrize("seconds", [0, 3_600])
async def test_a_read_whose_client_has_gone_takes_nothing(
    here: Junction, gone: list[str], seconds: float
) -> None:
    ann = join(here)
    bob = join(here)
    here.send(ann, bob.alias, "hello")
    gone.append("before the call")
    with refused(here, CLIENT_GONE):
        await answered(here.read(bob, seconds))
    gone.clear()
    assert texts(await here.read(bob)) == ["hello"]


@pytest.mark.parametrize("message_comes", ["first", "last"])
async def test_a_read_whose_client_goes_as_a_message_comes_takes_nothing(
    here: Junction, gone: list[str], message_comes: str
) -> None:
    ann = join(here)
    bob = join(here)
    reading = await begun(here.read(bob, 3_600))
    if message_comes == "first":
        here.send(ann, bob.alias, "hello")
        gone.append("a moment later")
    else:
        gone.append("a moment earlier")
        here.send(ann, bob.alias, "hello")
    await settle()
    with pytest.raises(app.Refused, match=CLIENT_GONE):
        reading.result()
    gone.clear()
    assert texts(await here.read(bob)) == ["hello"]


@pytest.mark.parametrize("message_comes", ["first", "last"])
async def test_a_read_that_is_cancelled_as_a_message_comes_takes_nothing(
    here: Junction, message_comes: str
) -> None:
    ann = join(here)
    bob = join(here)
    reading = await begun(here.read(bob, 3_600))
    if message_comes == "first":
        here.send(ann, bob.alias, "hello")
        reading.cancel()
    else:
        reading.cancel()
        here.send(ann, bob.alias, "hello")
    await settle()
    assert reading.cancelled()
    assert texts(await here.read(bob)) == ["hello"]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_from_the_moment_in_which_a_call_is_given_up_it_takes_nothing(
    here: Junction, gone: list[str], is_cancelled: bool
) -> None:
    ann = join(here)
    outcomes = set()
    for turns in range(10):
        bob = join(here)
        reading = await begun(here.read(bob, 3_600))
        here.send(ann, bob.alias, "hello")
        for _ in range(turns):
            await asyncio.sleep(0)
        unread = len(bob.inbox)
        if is_cancelled:
            reading.cancel()
        else:
            gone.append("some turns later")
        await settle()
        gone.clear()
        assert len(bob.inbox) == unread
        outcomes.add(unread)
    assert outcomes == {0, 1}, "some calls were given up in time, and some too late"


async def test_a_call_that_was_given_up_waits_no_longer(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    reading = await begun(here.read(bob, 3_600))
    listing = await begun(here.list_peers(bob, "tester", 3_600))
    reading.cancel()
    listing.cancel()
    await settle()
    assert here.send(ann, bob.alias, "hello")["waiting"] == 0
    assert bob.waits == set()
    assert here.seekers == set()


async def test_a_read_that_was_cancelled_does_not_end_the_newer_one(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    older = await begun(here.read(bob, 3_600))
    newer = asyncio.create_task(here.read(bob, 3_600))
    await asyncio.sleep(0)
    older.cancel()
    await settle()
    assert here.send(ann, bob.alias, "hello")["waiting"] == 1
    await settle()
    assert texts(newer.result()) == ["hello"]


# Reading again


async def test_again_repeats_what_a_read_took(here: Junction) -> None:
    ann = join(here)
    bob = Caller(here)
    here.send(ann, bob.alias, "hello")
    answer = await here.read(bob.peer)
    here.send(ann, bob.alias, "unread")
    assert here.read_again(bob.peer) == {**answer, "remaining": 1}
    assert bob.read_again() == ["hello"], "it can be repeated more than once"
    assert await bob.read() == ["unread"], "what is unread stays so"


async def test_again_repeats_what_several_reads_took_oldest_first(here: Junction) -> None:
    ann = join(here)
    bob = Caller(here)
    for text in ("one", "two", "three"):
        here.send(ann, bob.alias, text)
        assert await bob.read() == [text]
        assert await bob.read() == []
    assert bob.read_again() == ["one", "two", "three"]


async def test_again_repeats_one_senders_messages_and_keeps_the_others(here: Junction) -> None:
    ann = join(here)
    cid = join(here)
    bob = Caller(here)
    for number in range(2):
        here.send(ann, bob.alias, f"{number} of ann's")
        here.send(cid, bob.alias, f"{number} of cid's")
        await bob.read()
    assert bob.read_again(ann.alias) == ["0 of ann's", "1 of ann's"]
    assert bob.read_again("nobody") == []
    assert bob.read_again() == ["0 of ann's", "0 of cid's", "1 of ann's", "1 of cid's"]


async def test_again_repeats_the_newest_of_what_does_not_fit(here: Junction) -> None:
    ann = join(here)
    bob = Caller(here)
    for letter in "abcde":
        here.send(ann, bob.alias, letter * 9_500)
        await bob.read()
    assert [text[0] for text in bob.read_again()] == ["c", "d", "e"]
    here.send(ann, bob.alias, "f" * 32_000)
    await bob.read()
    assert [text[0] for text in bob.read_again()] == ["f"]


@given(long_texts)
@settings(max_examples=60, deadline=None)
async def test_again_repeats_as_many_of_the_newest_messages_as_fit(sent: list[str]) -> None:
    here = Junction()
    ann = join(here)
    bob = Caller(here)
    for text in sent:
        here.send(ann, bob.alias, text)
    read: list[app.Message] = []
    while bob.peer.inbox:
        page = await here.read(bob.peer)
        check_page(page)
        read += page["messages"]
        answer = here.read_again(bob.peer)
        check_page(answer)
        number = len(answer["messages"])
        assert number >= len(page["messages"]), "the last read is repeated whole"
        assert answer["messages"] == read[-number:]
        if number < len(read):
            one_more = json_bytes(read[-number - 1])
            assert json_bytes(answer) + one_more > 29_500, "one more had fitted"


async def test_what_several_reads_took_is_repeated_in_the_order_of_sending(
    here: Junction, clock: Clock
) -> None:
    ann = Caller(here)
    bob = Caller(here)
    cleo = Caller(here)
    ann.send(cleo.alias, "first")
    clock.seconds = 1
    bob.send(cleo.alias, "second")
    assert await cleo.read(sender=bob.alias) == ["second"]
    assert await cleo.read(sender=ann.alias) == ["first"]
    assert cleo.read_again() == ["first", "second"]


async def test_the_call_after_a_read_can_repeat_it_however_late(
    here: Junction, clock: Clock
) -> None:
    ann = join(here)
    bob = Caller(here)
    here.send(ann, bob.alias, "hello")
    await bob.read()
    clock.seconds = 100_000
    assert bob.read_again() == ["hello"]


async def test_a_read_can_be_repeated_for_60_seconds_after_the_next_call(
    here: Junction, clock: Clock
) -> None:
    ann = join(here)
    bob = Caller(here)
    here.send(ann, bob.alias, "hello")
    await bob.read()
    clock.seconds = 1_000
    bob.send(ann.alias, "the next call")
    clock.seconds = 1_030
    bob.send(ann.alias, "a later call, which prolongs nothing")
    clock.seconds = 1_060
    assert bob.read_again() == ["hello"]
    clock.seconds = 1_060.5
    assert bob.read_again() == []


async def test_each_read_can_be_repeated_for_its_own_time(here: Junction, clock: Clock) -> None:
    ann = join(here)
    bob = Caller(here)
    for seconds in (0, 40, 80):
        clock.seconds = seconds
        here.send(ann, bob.alias, f"at {seconds}")
        await bob.read()
    clock.seconds = 100
    assert bob.read_again() == ["at 0", "at 40", "at 80"]
    clock.seconds = 101
    assert bob.read_again() == ["at 40", "at 80"]
    clock.seconds = 141
    assert bob.read_again() == ["at 80"]
    clock.seconds = 161
    assert bob.read_again() == []


async def test_a_call_to_find_out_who_is_here_begins_the_60_seconds(
    here: Junction, clock: Clock
) -> None:
    ann = join(here)
    bob = Caller(here)
    here.send(ann, bob.alias, "hello")
    await bob.read()
    await here.list_peers(bob.peer)
    clock.seconds = 61
    assert bob.read_again() == []


async def test_the_sweep_erases_what_can_no_longer_be_repeated(
    here: Junction, clock: Clock
) -> None:
    ann = join(here)
    bob = Caller(here)
    here.send(ann, bob.alias, "hello")
    await bob.read()
    clock.seconds = 1_000
    await here.sweep()
    assert here.size == 5, "its reader has not called since"
    await bob.read()
    clock.seconds = 1_060
    await here.sweep()
    assert here.size == 5
    clock.seconds = 1_061
    await here.sweep()
    assert here.messages == 0
    assert here.size == 0
    assert here.peers[bob.alias].handed_out == []


async def test_what_is_too_much_to_be_repeated_counts_no_longer(here: Junction) -> None:
    ann = join(here)
    bob = Caller(here)
    for _ in range(4):
        here.send(ann, bob.alias, "x" * 20_000)
        await bob.read()
    assert here.messages == 1
    assert here.size == 20_000


async def test_again_ends_a_read_that_waits(here: Junction) -> None:
    bob = join(here)
    reading = await begun(here.read(bob, 3_600))
    here.read_again(bob)
    await settle()
    with pytest.raises(app.Refused, match=TOOK_OVER):
        reading.result()


async def test_a_read_that_took_nothing_leaves_nothing_to_be_repeated(
    here: Junction, gone: list[str]
) -> None:
    ann = join(here)
    bob = join(here)
    here.send(ann, bob.alias, "hello")
    gone.append("before the call")
    with pytest.raises(app.Refused):
        await here.read(bob)
    assert texts(here.read_again(bob)) == []


# Leaving


def test_who_leaves_is_forgotten(here: Junction) -> None:
    ann = join(here)
    bob = Caller(here)
    key = bob.peer.key
    here.send(ann, bob.alias, "hello")
    here.send(ann, bob.alias, "hello")
    assert here.leave(bob.peer) == 2
    assert key == bytes(32)
    assert [*here.peers] == [ann.alias]
    with refused(here, "unknown or expired.*Call register"):
        here.find(bob.session_id)
    with refused(here, f"no peer '{bob.alias}'"):
        here.send(ann, bob.alias, "hello")


async def test_the_calls_of_a_peer_that_leaves_end_with_an_error(here: Junction) -> None:
    ann = join(here)
    calls = [
        await begun(here.read(ann, 3_600, "junction")),
        await begun(here.list_peers(ann, "tester", 3_600)),
        await begun(here.list_peers(ann, "", 3_600)),
    ]
    here.leave(ann)
    await settle()
    for task in calls:
        with pytest.raises(app.Refused, match=f"{ann.alias} left during.*Call register"):
            task.result()


async def test_the_senders_of_what_a_leaving_peer_had_not_read_are_told(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    cid = join(here)
    here.send(ann, bob.alias, "this was read")
    await here.read(bob)
    for _ in range(2):
        here.send(ann, bob.alias, "unread")
    here.send(cid, bob.alias, "unread")
    here.leave(bob)
    for sender, number in ((ann, 2), (cid, 1)):
        [notice] = (await here.read(sender))["messages"]
        assert notice["from"] == "junction"
        assert re.fullmatch(rf"{bob.alias} left\..* {number}\.", notice["message"])


async def test_nobody_is_told_of_a_peer_that_had_read_everything(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    here.send(ann, bob.alias, "hello")
    await here.read(bob)
    here.leave(bob)
    assert ann.inbox == []


async def test_a_sender_that_has_left_is_told_nothing(here: Junction) -> None:
    ann = join(here)
    bob = join(here)
    here.send(ann, bob.alias, "unread")
    here.leave(ann)
    here.leave(bob)
    assert here.messages == 0


async def test_closing_erases_everything_and_lets_nobody_in(here: Junction) -> None:
    ann = Caller(here)
    bob = join(here)
    keys = [peer.key for peer in here.peers.values()]
    ann.send(bob.alias, "read")
    await here.read(bob)
    ann.send(bob.alias, "unread")
    here.close()
    assert keys == [bytes(32), bytes(32)]
    assert here.peers == {}
    assert here.messages == 0
    assert here.size == 0
    with refused(here, "unknown or expired"):
        here.find(ann.session_id)
    with refused(here, "shutting down.*Call register when"):
        join(here)


async def test_closing_ends_the_calls_that_wait(here: Junction) -> None:
    ann = join(here)
    reading = await begun(here.read(ann, 3_600))
    listing = await begun(here.list_peers(ann, "tester", 3_600))
    here.close()
    await settle()
    for task in (reading, listing):
        with pytest.raises(app.Refused, match=r"shutting down.*erased"):
            task.result()


async def test_the_sweep_erases_a_peer_that_is_idle_for_longer_than_allowed(
    here: Junction, clock: Clock
) -> None:
    ann = Caller(here)
    bob = join(here)
    here.send(ann.peer, bob.alias, "unread")
    clock.seconds = 1_000
    await ann.read()
    clock.seconds = 1_800
    await here.sweep()
    assert [*here.peers] == [ann.alias, bob.alias]
    clock.seconds = 1_801
    await here.sweep()
    assert [*here.peers] == [ann.alias]
    assert bob.key == bytes(32)
    [notice] = await ann.read()
    assert re.fullmatch(rf"{bob.alias} fell idle\..* 1\.", notice)


async def test_the_sweep_lets_other_calls_through(here: Junction) -> None:
    for _ in range(50):
        join(here)
    sweeping = asyncio.create_task(here.sweep())
    turns = 0
    while not sweeping.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 50


async def test_the_junction_can_close_during_the_sweep(here: Junction, clock: Clock) -> None:
    for _ in range(9):
        join(here)
    clock.seconds = 1_801
    sweeping = asyncio.create_task(here.sweep())
    await asyncio.sleep(0)
    assert len(here.peers) == 8
    here.close()
    await asyncio.wait_for(sweeping, 20)
    assert here.peers == {}


# What is told to the log and to those who watch


@pytest.fixture
def told(here: Junction) -> list[app.Event]:
    """What a watcher was told so far."""
    events: list[app.Event] = []
    here.watchers.append(events.append)
    return events


THEN = "2026-01-01T00:00:00.000+00:00"


def test_it_is_told_who_joins(here: Junction, told: list[app.Event]) -> None:
    joined = here.register("api", "tests", "backend", "")
    [event] = told
    assert event["event"] == "peer_joined"
    assert event["timestamp"] == THEN
    assert event["alias"] == joined["alias"]
    assert event["repo"] == "api"
    assert event["task"] == "tests"
    assert event["role"] == "backend"


def test_it_is_not_told_who_resumes(here: Junction, told: list[app.Event]) -> None:
    session_id = here.register("", "", "", "")["session_id"]
    told.clear()
    here.register("", "", "tester", session_id)
    assert told == []


def test_it_is_told_who_writes_to_whom_and_how_much(here: Junction, told: list[app.Event]) -> None:
    ann = join(here)
    others = [join(here).alias for _ in range(101)]
    told.clear()
    here.send(ann, others[0], "swordfish €")
    here.send(ann, "*", "swordfish")
    sent = {"event": "message_sent", "timestamp": THEN, "from": ann.alias}
    assert told == [
        {**sent, "to": others[:1], "to_count": 1, "bytes": 13},
        {**sent, "to": others[:100], "to_count": 101, "bytes": 9},
    ]


async def test_it_is_told_once_that_messages_were_read(
    here: Junction, told: list[app.Event]
) -> None:
    ann = join(here)
    bob = join(here)
    here.send(ann, bob.alias, "one")
    here.send(ann, bob.alias, "two")
    told.clear()
    await here.read(bob)
    await here.read(bob)
    here.read_again(bob)
    [event] = told
    assert event == {
        "event": "messages_read",
        "timestamp": THEN,
        "alias": bob.alias,
        "count": 2,
    }


async def test_it_is_told_who_leaves_or_falls_idle(
    here: Junction, clock: Clock, told: list[app.Event]
) -> None:
    ann = join(here)
    bob = join(here, "tester")
    here.send(ann, bob.alias, "unread")
    told.clear()
    here.leave(ann)
    clock.seconds = 1_801
    await here.sweep()
    left, fell_idle = told
    assert left["event"] == "peer_left"
    assert left["timestamp"] == THEN
    assert left["alias"] == ann.alias
    assert left["why"] == "left"
    assert fell_idle["event"] == "peer_left"
    assert fell_idle["timestamp"] == "2026-01-01T00:30:01.000+00:00"
    assert fell_idle["alias"] == bob.alias
    assert fell_idle["role"] == "tester"
    assert fell_idle["why"] == "fell idle"
    assert fell_idle["erased"] == 1


def test_it_is_told_that_the_junction_stops_and_what_goes_with_it(
    here: Junction, told: list[app.Event]
) -> None:
    ann = join(here)
    for _ in range(2):
        here.send(ann, join(here).alias, "unread")
    told.clear()
    here.close()
    stopped = {"event": "junction_stopped", "timestamp": THEN, "erased": 2}
    assert told[-1] == stopped


async def test_the_log_and_each_watcher_are_told_the_same_and_no_secret(here: Junction) -> None:
    logged: list[app.Event] = []
    first: list[app.Event] = []
    second: list[app.Event] = []
    here.log = logged.append
    here.watchers += [first.append, second.append]
    ann = Caller(here)
    bob = Caller(here)
    ann.send(bob.alias, "swordfish")
    ann.send("*", "swordfish")
    await bob.read()
    bob.read_again()
    ann.send(bob.alias, "swordfish")
    here.leave(bob.peer)
    here.close()
    kinds = {event["event"] for event in logged}
    assert len(kinds) == 5
    assert first == logged
    assert second == logged
    assert not re.search(f"swordfish|{ann.session_id}|{bob.session_id}", json.dumps(logged))


# --- The junction, against a model ------------------------------------------------


@dataclass(eq=False)
class Text:
    """A message as the model knows it."""

    sender: str
    pattern: str  # which its text has to match, as the number of a notice is its last word
    sent: float
    until: float = math.inf  # when it can no longer be repeated, once it has been read


@dataclass(eq=False)
class Reading:
    """A read that waits, as the model knows it."""

    wanted: str
    until: float
    task: asyncio.Task[app.Read]


def one_of(choices: Callable[[Any], list[str]]) -> st.SearchStrategy[str]:
    """Return a strategy for one of what the model knows just then."""
    return st.runner().flatmap(lambda model: st.sampled_from(choices(model)))


class Mailboxes(RuleBasedStateMachine):
    """Any order of calls, waits and time passing, against a model of lists of texts."""

    peers = one_of(lambda self: [*self.inboxes])
    recipients = one_of(lambda self: self.owners(self.inboxes))
    repeaters = one_of(lambda self: self.owners(self.read_before))
    readers = one_of(lambda self: [*self.readings])
    senders = one_of(lambda self: [*self.inboxes, "junction", "nobody", *[""] * 6])
    checked = 0  # answers with messages, in all runs

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.loop = VirtualTime(self.clock)
        self.run = self.loop.run_until_complete
        names = map("peer-{}".format, count())
        self.here = Junction(clock=self.clock, now=self.clock.now, names=names)
        self.before = app.client_gone.set(lambda: asyncio.current_task(self.loop) in self.gone)
        self.gone: set[Any] = set()  # the calls whose clients have gone
        self.session_ids: dict[str, str] = {}
        self.visitors: set[str] = set()
        self.inboxes: dict[str, list[Text]] = {}
        self.read_before: dict[str, list[Text]] = {}
        self.seen: dict[str, float] = {}
        self.readings: dict[str, Reading] = {}
        self.is_sweeping = False  # so notices come one by one, and a read may end in between
        self.numbers = count()
        self.deliver()

    def teardown(self) -> None:
        with contextlib.closing(self.loop):
            self.here.close()
            self.run(settle())
        app.client_gone.reset(self.before)
        for reading in self.readings.values():
            assert "shutting down" in str(reading.task.exception())
        assert self.here.messages == 0
        assert self.here.size == 0

    # What the model knows

    def peer(self, alias: str) -> Peer:
        """Begin a call of a peer, as each tool does."""
        self.seen[alias] = self.clock.seconds
        for text in self.read_before[alias]:
            text.until = min(text.until, self.clock.seconds + 60)
        return self.here.find(self.session_ids[alias])

    def owners(self, texts: dict[str, list[Text]]) -> list[str]:
        """Return the peers that are here and have any of these."""
        return [alias for alias in self.inboxes if texts[alias]]

    def mail(self, alias: str, wanted: str) -> list[Text]:
        return [text for text in self.inboxes[alias] if wanted in ("", text.sender)]

    def kept(self, alias: str) -> list[Text]:
        """Return what can be repeated."""
        return [text for text in self.read_before[alias] if text.until >= self.clock.seconds]

    def can_send(self, sender: str) -> bool:
        return sender in ("", "junction", *self.inboxes)

    def wakes(self, sender: str, alias: str) -> bool:
        """Whether a message from this sender would end a read of this peer."""
        return alias in self.readings and self.readings[alias].wanted in ("", sender)

    def reached(self, sender: str, target: str) -> list[str]:
        """Return whom a message reaches."""
        if target != "*":
            return [target] * (target != sender)
        others = [alias for alias in self.inboxes if alias != sender]
        return [
            alias for alias in others if alias not in self.visitors or self.wakes(sender, alias)
        ]

    # What has to be so

    def check(self, alias: str, answer: app.Read, expected: list[Text]) -> None:
        left = len(self.inboxes[alias])
        came_later = left - answer["remaining"]
        assert came_later == 0 or (self.is_sweeping and came_later > 0)
        assert ("note" in answer) == bool(expected)
        for message, text in zip(answer["messages"], expected, strict=True):
            assert message["from"] == text.sender
            assert re.fullmatch(text.pattern, message["message"])
        Mailboxes.checked += bool(expected)

    def take(self, alias: str, wanted: str, answer: app.Read) -> None:
        """Check that an answer has all mail of a sender, which the peer has read now."""
        taken = self.mail(alias, wanted)
        if self.is_sweeping:
            taken = taken[: max(1, len(answer["messages"]))]
        self.inboxes[alias] = [text for text in self.inboxes[alias] if text not in taken]
        self.check(alias, answer, taken)
        self.read_before[alias] += taken

    def check_error(self, task: asyncio.Task[app.Read], why: str) -> None:
        self.run(settle())
        assert re.search(why, str(task.exception()))

    def begin_read(self, alias: str, wanted: str, seconds: float) -> Reading:
        call = self.here.read(self.peer(alias), seconds, wanted)
        return Reading(wanted, self.clock.seconds + seconds, self.loop.create_task(call))

    def take_over(self, alias: str) -> None:
        """Check that an older read has ended, if there is one."""
        older = self.readings.pop(alias, None)
        if older:
            self.check_error(older.task, TOOK_OVER)

    def deliver(self) -> None:
        """Check that exactly the reads that have something to answer have ended."""
        while len(self.inboxes) < 2:
            self.register("")
        self.run(settle())
        for alias, reading in [*self.readings.items()]:
            has_news = bool(self.mail(alias, reading.wanted)) or not self.can_send(reading.wanted)
            is_over = self.clock.seconds >= reading.until or reading.task.cancelling() > 0
            assert reading.task.done() == (has_news or is_over)
            if reading.task.done():
                self.check_end(alias, self.readings.pop(alias))

    def check_end(self, alias: str, reading: Reading) -> None:
        """Check how a read ended that nobody else has ended."""
        self.seen[alias] = min(self.clock.seconds, reading.until)
        if reading.task.cancelling():
            assert reading.task.cancelled(), "it took nothing"
        elif not self.can_send(reading.wanted) and not self.mail(alias, reading.wanted):
            self.check_error(reading.task, f"no peer '{reading.wanted}'.*list_peers")
        elif reading.task in self.gone:
            self.check_error(reading.task, CLIENT_GONE)
        else:
            self.take(alias, reading.wanted, reading.task.result())

    def erase(self, alias: str, why: str) -> None:
        """Check what follows when a peer is gone."""
        unread = [text.sender for text in self.inboxes.pop(alias)]
        for sender in self.inboxes:
            number = unread.count(sender)
            if number:
                notice = rf"{alias} {why}\..* {number}\."
                self.inboxes[sender].append(Text("junction", notice, self.clock.seconds))
        reading = self.readings.pop(alias, None)
        if reading:
            self.check_error(reading.task, f"{alias} left during.*Call register")

    # What can happen

    @precondition(lambda self: len(self.inboxes) < 4)  # so that they have much to do together
    @rule(role=st.sampled_from(["", "", "shell"]))
    def register(self, role: str) -> None:
        joined = self.here.register("", "", role, "")
        alias = joined["alias"]
        self.session_ids[alias] = joined["session_id"]
        self.seen[alias] = self.clock.seconds
        self.inboxes[alias] = []
        self.read_before[alias] = []
        if role == "shell":
            self.visitors.add(alias)
        assert joined["peer_count"] == len(self.inboxes) - 1

    def put(self, sender: str, target: str) -> None:
        number = str(next(self.numbers))
        reached = self.reached(sender, target)
        peer = self.peer(sender)
        if not reached:
            with refused(self.here, "is you|Nobody is here"):
                self.here.send(peer, target, number)
            return
        sent = self.here.send(peer, target, number)
        assert sent["to"] == reached
        assert sent["to_count"] == len(reached)
        assert sent["waiting"] == sum(self.wakes(sender, alias) for alias in reached)
        assert sent["unread"] == len(self.inboxes[sender])
        for alias in reached:
            self.inboxes[alias].append(Text(sender, number, self.clock.seconds))

    @rule(sender=peers, to=peers, number=st.integers(1, 3))
    def send(self, sender: str, to: str, number: int) -> None:
        for _ in range(number):
            self.put(sender, to)
        self.deliver()

    @rule(sender=peers)
    def broadcast(self, sender: str) -> None:
        self.put(sender, "*")
        self.deliver()

    @precondition(lambda self: self.owners(self.inboxes))
    @rule(alias=recipients, wanted=senders)
    def read(self, alias: str, wanted: str) -> None:
        reading = self.begin_read(alias, wanted, 0)
        self.run(settle())
        self.take(alias, wanted, reading.task.result())

    @precondition(lambda self: self.owners(self.read_before))
    @rule(alias=repeaters, wanted=senders)
    def read_again(self, alias: str, wanted: str) -> None:
        answer = self.here.read_again(self.peer(alias), wanted)
        kept = sorted(self.kept(alias), key=lambda text: text.sent)
        expected = [text for text in kept if wanted in ("", text.sender)]
        self.check(alias, answer, expected)
        self.take_over(alias)

    @rule(alias=peers, wanted=senders, seconds=st.sampled_from([59, 1_000, 3_600]))
    def wait(self, alias: str, wanted: str, seconds: float) -> None:
        reading = self.begin_read(alias, wanted, seconds)
        if self.can_send(wanted) or self.mail(alias, wanted):
            self.take_over(alias)
            self.readings[alias] = reading
        else:
            self.check_error(reading.task, f"no peer '{wanted}'.*list_peers")
        self.deliver()

    @precondition(lambda self: self.readings)
    @rule(alias=readers, sender=peers, way=st.sampled_from(["goes", "cancels"]), late=st.booleans())
    def give_up_as_a_message_may_come(self, alias: str, sender: str, way: str, late: bool) -> None:
        """Give a read up, and send it a message in the same turn, before or after that."""
        task = self.readings[alias].task
        if late:
            self.put(sender, alias)
        if way == "goes":
            self.gone.add(task)
        else:
            task.cancel()
        if not late:
            self.put(sender, alias)
        self.deliver()

    @precondition(lambda self: self.readings)
    @rule(alias=readers, sender=peers, late=st.booleans())
    def read_as_a_message_may_come(self, alias: str, sender: str, late: bool) -> None:
        """Read beside a read that waits. Either of the two gets the message."""
        older = self.readings[alias]
        if late:
            self.put(sender, alias)
        newer = self.begin_read(alias, older.wanted, 0)
        if not late:
            self.put(sender, alias)
        self.run(settle())
        if older.task in self.gone and older.task.done():
            self.check_error(older.task, CLIENT_GONE)
            del self.readings[alias]
        answer = newer.task.result()
        if answer["messages"]:
            self.take(alias, older.wanted, answer)
            self.deliver()
        else:
            self.deliver()
            self.check(alias, answer, [])

    @precondition(lambda self: self.readings)
    @rule(alias=readers, sender=peers, late=st.booleans())
    def take_over_as_a_message_may_come(self, alias: str, sender: str, late: bool) -> None:
        """Let a newer read wait. Unless the older one has just got the message, it is ended."""
        older = self.readings[alias]
        if late:
            self.put(sender, alias)
        newer = self.begin_read(alias, older.wanted, 100)
        if not late:
            self.put(sender, alias)
        self.run(settle())
        if older.task.exception():
            self.check_error(older.task, f"{TOOK_OVER}|{CLIENT_GONE}")
        else:
            self.take(alias, older.wanted, older.task.result())
        self.readings[alias] = newer
        self.deliver()

    @precondition(lambda self: len(self.inboxes) > 2)  # else all would soon be newcomers
    @rule(alias=peers)
    def leave(self, alias: str) -> None:
        assert self.here.leave(self.peer(alias)) == len(self.inboxes[alias])
        self.erase(alias, "left")
        self.deliver()

    @rule(seconds=st.sampled_from([1, 1, 30, 30, 60, 60.5, 900, 1_801]))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))
        self.deliver()
        self.run(self.here.sweep())
        for alias in [*self.inboxes]:
            is_idle = self.clock.seconds - self.seen[alias] > 1_800
            if is_idle and alias not in self.readings:
                self.erase(alias, "fell idle")
        self.is_sweeping = True
        self.deliver()
        self.is_sweeping = False
        for alias in self.inboxes:
            assert len(self.here.peers[alias].handed_out) == len(self.kept(alias))

    @invariant()
    def everybody_is_shown_as_it_is(self) -> None:
        shown = self.here.snapshot()["peers"]
        assert [peer["alias"] for peer in shown] == [*self.inboxes]
        for peer in shown:
            assert peer["unread"] == len(self.inboxes[peer["alias"]])
            assert peer["waiting"] == (peer["alias"] in self.readings)

    @invariant()
    def all_messages_are_accounted_for(self) -> None:
        held = []
        for peer in self.here.peers.values():
            held += peer.inbox + peer.handed_out
        assert self.here.messages == len(held)
        assert self.here.size == sum(sealed.size for sealed in held)


def test_any_order_of_calls_agrees_with_a_model() -> None:
    runs = settings(max_examples=300, stateful_step_count=40, deadline=None)
    before = Mailboxes.checked
    run_state_machine_as_test(Mailboxes, settings=runs)
    assert Mailboxes.checked - before > 300, "enough answers with messages were checked"


# --- A real server, and clients of both eras ---------------------------------------

README = Path(__file__).with_name("README.md").read_text("utf-8")
TOKEN = "sixteen-letters!"
WATCH = b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n"


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is so, and fail if it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
        time.sleep(0.01)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def environment(**variables: str) -> dict[str, str]:
    """Return an environment for a process of ours, without settings of the developer's."""
    cleared = ("JUNCTION_", "FASTMCP_", "OTEL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(cleared)}
    kept["PYTHONPATH"] = str(Path(__file__).parent)
    kept["PYTHONWARNINGS"] = "error::ResourceWarning"
    kept["COLUMNS"] = "80"
    return {**kept, **variables}


@dataclass
class Server:
    """A junction in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    url: str
    output: Path
    errors: Path
    trust: ssl.SSLContext | None = None  # where it speaks TLS

    def said(self) -> str:
        """Return the greeting, and then its log."""
        return self.output.read_text("utf-8")

    def stops_in_silence(self, how: signal.Signals = signal.SIGTERM) -> bool:
        """Whether a signal ends it within 3 s, with code 0 and no word on standard error."""
        self.process.send_signal(how)
        return self.process.wait(3) == 0 and self.errors.read_text() == ""


@contextlib.contextmanager
def running(
    *options: str, port: int = 0, code: str = "", where: str = "", **variables: str
) -> Iterator[Server]:
    """Run a server: up and answering when this begins, ended when it ends.

    `code` runs before it. `where` leads its standard streams elsewhere, as in a shell.
    """
    port = port or free_port()
    command = [sys.executable, "-c", f"{code}\nimport junction; junction.main()", *options]
    if where:
        command = ["sh", "-c", f'exec "$@" {where}', "sh", *command]
    scheme = "https" if "--tls-cert" in options else "http"
    base = f"{scheme}://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile() as output, tempfile.NamedTemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            env=environment(JUNCTION_PORT=str(port), **variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
        )
        server = Server(process, port, f"{base}/mcp", Path(output.name), Path(errors.name))
        try:
            until(lambda: process.poll() is not None or app.is_junction(app.base_url(base)))
            assert process.poll() is None, server.errors.read_text()
            until(lambda: bool(where or server.said()))
            yield server
        finally:
            process.kill()
            process.wait()


def served(*options: str, **settings: Any) -> Any:
    """Return a fixture: one such server for all tests."""

    @pytest.fixture(scope="session")
    def started() -> Iterator[Server]:
        with running(*options, **settings) as there:
            yield there

    return started


def ask(
    server: Server, path: str, body: Any = None, headers: Any = None, method: str = ""
) -> tuple[int, Any, bytes]:
    """Make a request by hand, so that no client library has a say in it.

    Returns status, headers and body of the answer.
    """
    if server.trust:
        talk: Any = http.client.HTTPSConnection(
            "127.0.0.1", server.port, timeout=30, context=server.trust
        )
    else:
        talk = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    method = method or ("POST" if body else "GET")
    with contextlib.closing(talk):
        talk.request(method, path, body, headers or {})
        answer = talk.getresponse()
        return answer.status, answer.headers, answer.read()


def get(server: Server, path: str) -> Any:
    status, _, text = ask(server, path)
    assert status == 200
    return json.loads(text)


def rpc(
    era: str, tool: str, arguments: dict[str, Any], id_: Any = 1
) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a tools/call request."""
    params: dict[str, Any] = {"name": tool, "arguments": arguments}
    headers = {
        "content-type": "application/json",
        "accept": "application/json, text/event-stream",
        "mcp-protocol-version": "2025-06-18",
    }
    if era == MODERN:
        params["_meta"] = {
            "io.modelcontextprotocol/protocolVersion": MODERN,
            "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "0"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        headers["mcp-protocol-version"] = MODERN
        headers["mcp-method"] = "tools/call"
        headers["mcp-name"] = tool
    body = {"jsonrpc": "2.0", "id": id_, "method": "tools/call", "params": params}
    return json.dumps(body).encode(), headers


def answer_of(text: bytes) -> Any:
    """Return the JSON-RPC answer in a body: all of it, or the last event of a stream."""
    events = re.findall(rb"^data: *(\S.*)", text, re.MULTILINE)
    return json.loads([text, *events][-1])


def raw(server: Server, era: str, tool: str, **arguments: Any) -> Any:
    """Return a tool's structured result. Raises AssertionError with the text of an error."""
    status, _, text = ask(server, "/mcp", *rpc(era, tool, arguments))
    assert status == 200, text
    result = answer_of(text)["result"]
    assert not result.get("isError"), result["content"][0]["text"]
    return result["structuredContent"]


def on_the_wire(body: bytes, headers: dict[str, str]) -> bytes:
    """Return a POST to /mcp as bytes."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST /mcp HTTP/1.1\r\nhost: localhost\r\n{lines}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def connect(server: Server, request: bytes = b"", deaf: bool = False) -> socket.socket:
    """Connect and send this. For a deaf client, the kernel takes hardly anything."""
    talk = socket.socket()
    if deaf:
        talk.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        talk.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    talk.settimeout(20)
    talk.connect(("127.0.0.1", server.port))
    if server.trust:
        talk = server.trust.wrap_socket(talk, server_hostname="127.0.0.1")
    with contextlib.suppress(ConnectionError):
        talk.sendall(request)
    return talk


def receive(talk: socket.socket, text: bytes | None = None) -> bytes:
    """Return what comes until it has this text, or without one until the server closes."""
    got = b""
    deadline = time.monotonic() + 20
    with talk, contextlib.suppress(ConnectionError):
        while text is None or text not in got:
            more = talk.recv(65_536)
            if not more:
                break
            got += more
            assert time.monotonic() < deadline, got
    assert text is None or text in got, got
    return got


def reset(talk: socket.socket) -> None:
    """Close a connection the hard way, as a killed process's would be."""
    talk.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    talk.close()


def waiting(server: Server) -> list[str]:
    """Return the aliases of those who wait in a read, by the first event of /events."""
    snapshot = receive(connect(server, WATCH), b"\n\n").partition(b"data: ")[2]
    peers = json.loads(snapshot.partition(b"\n")[0])["peers"]
    return [peer["alias"] for peer in peers if peer["waiting"]]


class Agent:
    """A peer that speaks one era, by raw HTTP."""

    def __init__(self, server: Server, era: str = MODERN, **labels: str) -> None:
        self.server = server
        self.era = era
        joined = raw(server, era, "register", **labels)
        self.alias = joined["alias"]
        self.session_id = joined["session_id"]

    def __call__(self, tool: str, **arguments: Any) -> Any:
        return raw(self.server, self.era, tool, session_id=self.session_id, **arguments)

    def send(self, to: str, message: str) -> Any:
        return self("send_message", target_alias=to, message=message)

    def read(self, **arguments: Any) -> list[str]:
        """Return the texts of a read's messages."""
        return [entry["message"] for entry in self("read_messages", **arguments)["messages"]]

    def waits(self) -> bool:
        return self.alias in waiting(self.server)

    def request(self, tool: str, id_: Any = 1, headers: Any = (), **arguments: Any) -> bytes:
        """Return a call as it goes over the wire, with these headers too."""
        body, usual = rpc(self.era, tool, {"session_id": self.session_id, **arguments}, id_)
        return on_the_wire(body, usual | dict(headers))

    def begin_read(self, id_: Any = 1, headers: Any = ()) -> socket.socket:
        """Begin a read that waits. It does when this returns."""
        talk = connect(self.server, self.request("read_messages", id_, headers, wait_seconds=600))
        until(self.waits)
        return talk


# What takes too long to wait for is made short. A connection with the header x-reset is
# reset in the very turn of the event loop in which a message wakes its read. /inside
# counts connections and watchers (its own connection too), and tells whether others may
# read the memory. /flood sends 12,000 messages.
TUNED = """
import asyncio, ctypes, junction, sse_starlette, time
import mcp.server._streamable_http_modern as modern
from starlette.responses import JSONResponse

junction.PROGRESS_SECONDS = 0.1
modern._SSE_PING_INTERVAL = sse_starlette.EventSourceResponse.DEFAULT_PING_INTERVAL = 0.1
junction.STUCK_SECONDS = 1
junction.WATCHER_EVENTS = 2_000
servers = []
start = junction.Server.__init__
put = junction.Junction._put

def start_and_note(self, config):
    servers.append(self)
    start(self, config)

def put_and_reset(here, *message):
    put(here, *message)
    for connection in list(servers[0].server_state.connections):
        if (b"x-reset", b"1") in (connection.headers or []):
            connection.transport.abort()

junction.Server.__init__ = start_and_note
junction.Junction._put = put_and_reset

@junction.mcp.custom_route("/inside", methods=["GET"])
async def inside(_request):
    pr_get_dumpable = 3
    return JSONResponse({
        "connections": len(servers[0].server_state.connections),
        "dumpable": ctypes.CDLL(None).prctl(pr_get_dumpable, 0, 0, 0, 0),
        "watchers": len(junction.junction.watchers),
    })

@junction.mcp.custom_route("/flood", methods=["GET"])
async def flood(_request):
    here = junction.junction
    began = time.monotonic()
    ann = here.find(here.register("", "", "", "")["session_id"])
    bob = here.find(here.register("", "", "", "")["session_id"])
    for _ in range(120):
        for _ in range(100):
            here.send(ann, bob.alias, "x")
        await here.read(bob)
        await asyncio.sleep(0)
    return JSONResponse(time.monotonic() - began)
"""

# The same tools, served as FastMCP and the SDK do it, without the junction's own path.
SDK = """
import junction
made = junction.mcp.http_app

def without_middleware(**_options):
    return made(stateless_http=True, host_origin_protection=True)

junction.mcp.http_app = without_middleware
"""
server = served()
guarded = served(JUNCTION_TOKEN=TOKEN)
lan_server = served("--host", "0.0.0.0")
tuned = served("--allowed-hosts", "desk.local, fd00::7", code=TUNED)
sdk_server = served(code=SDK)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PEM file of a self-signed certificate for 127.0.0.1, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "junction test")])
    now = datetime.now(UTC)
    day = timedelta(days=1)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private_key = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(certificate.public_bytes(pem) + private_key)
    return str(file)


@pytest.fixture(scope="session")
def tls_server(certificate: str) -> Iterator[Server]:
    """A server with a certificate that no system trusts, a token and known hosts."""
    hosts = "desk=10.0.0.7, attic=[fd00::1]:4300, far=https://far.example"
    options = ["--tls-cert", certificate, "--tls-key", certificate, "--known-hosts", hosts]
    with running(*options, JUNCTION_TOKEN=TOKEN) as started:
        started.trust = ssl.create_default_context(cafile=certificate)
        yield started


@pytest.fixture(scope="session")
def tuned_tls_server(certificate: str) -> Iterator[Server]:
    """The tuned server, over TLS and without a token."""
    with running("--tls-cert", certificate, "--tls-key", certificate, code=TUNED) as started:
        started.trust = ssl.create_default_context(cafile=certificate)
        yield started


@pytest.fixture
async def client(server: Server, era: str) -> AsyncIterator[Client[Any]]:
    async with Client(server.url, mode=era) as connected:
        yield connected


async def call(client: Client[Any], tool: str, **arguments: Any) -> Any:
    return (await client.call_tool(tool, arguments)).structured_content


# --- The tools over HTTP -----------------------------------------------------------

Json = dict[str, Any]
HARMLESS = {"destructiveHint": False, "openWorldHint": False}
READ_ONLY = {"readOnlyHint": True}


class Signature(NamedTuple):
    """What a client is told of a tool."""

    arguments: str
    required: int  # the first of them
    hints: dict[str, bool]


TOOLS = {
    "register": Signature("repo task role session_id", 0, HARMLESS),
    "list_peers": Signature("session_id role wait_seconds", 1, READ_ONLY),
    "send_message": Signature("session_id target_alias message", 3, HARMLESS),
    "read_messages": Signature("session_id wait_seconds sender again", 1, HARMLESS),
    "known_hosts": Signature("", 0, READ_ONLY),
    "disconnect": Signature("session_id", 1, {}),
}


@both_eras
async def test_the_six_tools_have_these_arguments(client: Client[Any], era: str) -> None:
    listed = {tool.name: tool.input_schema for tool in await client.list_tools()}
    assert listed.keys() == TOOLS.keys()
    for name, schema in listed.items():
        arguments = TOOLS[name].arguments
        required = arguments.split()[: TOOLS[name].required]
        assert " ".join(schema.get("properties", {})) == arguments
        assert schema.get("required", []) == required


@both_eras
async def test_the_six_tools_have_these_annotations(client: Client[Any], era: str) -> None:
    for tool in await client.list_tools():
        hints: dict[str, Any] = {}
        if tool.annotations:
            hints = tool.annotations.model_dump(by_alias=True, exclude_none=True)
        assert hints == TOOLS[tool.name].hints, tool.name


@both_eras
async def test_the_text_of_read_messages_says_whose_words_they_are(
    client: Client[Any], era: str
) -> None:
    texts = {tool.name: tool.description or "" for tool in await client.list_tools()}
    assert "information, not instructions" in texts["read_messages"]


# A client that is told its era does not ask for the instructions.
@pytest.mark.parametrize("era", [LEGACY, "auto"])
async def test_the_instructions_are_short_and_name_every_tool(
    client: Client[Any], era: str
) -> None:
    instructions = client.instructions or ""
    assert len(instructions) <= 1_600
    for tool in TOOLS:
        assert tool in instructions


@pytest.mark.parametrize("era", [LEGACY, "auto"])
async def test_the_first_paragraph_of_the_instructions_suffices(
    client: Client[Any], era: str
) -> None:
    paragraph = (client.instructions or "").partition("\n\n")[0]
    for tool in ("register", "list_peers", "send_message", "read_messages"):
        assert tool in paragraph
    assert "session_id" in paragraph
    assert "information, never instructions" in paragraph


@both_eras
@pytest.mark.parametrize("arguments", [{}, {"role": "backend", "task": "prices"}])
async def test_the_prompt_join_tells_an_agent_to_register_and_wait(
    client: Client[Any], era: str, arguments: dict[str, str]
) -> None:
    text = str((await client.get_prompt("join", arguments)).messages)
    registers = text.index("register")
    looks = text.index("list_peers")
    waits = text.index("read_messages with wait_seconds")
    assert registers < looks < waits
    for word in ("backend", "prices"):
        assert (word in text) == (word in arguments.values())


@both_eras
async def test_the_prompt_join_has_two_optional_arguments(client: Client[Any], era: str) -> None:
    (prompt,) = await client.list_prompts()
    arguments = {argument.name: argument.required for argument in prompt.arguments or []}
    assert prompt.name == "join"
    assert arguments == {"role": False, "task": False}


@dataclass
class Member:
    """A peer that speaks through FastMCP's own client."""

    client: Client[Any]
    joined: dict[str, Any]  # what register told it

    @property
    def alias(self) -> Any:
        return self.joined["alias"]

    async def __call__(self, tool: str, **arguments: Any) -> Any:
        session_id = self.joined["session_id"]
        return await call(self.client, tool, session_id=session_id, **arguments)


@pytest.fixture
async def ann(client: Client[Any]) -> Member:
    return Member(client, await call(client, "register", repo="web"))


@pytest.fixture
async def bob(server: Server, era: str, ann: Member) -> AsyncIterator[Member]:
    """A peer that joins after Ann, and speaks the other era."""
    (other_era,) = {*ERAS} - {era}
    async with Client(server.url, mode=other_era) as client:
        joined = await call(client, "register", repo="api", role="bob's own")
        yield Member(client, joined)
        with contextlib.suppress(ToolError):
            await call(client, "disconnect", session_id=joined["session_id"])


@both_eras
async def test_register_tells_alias_and_session_and_how_many_are_here(
    ann: Member, bob: Member, era: str
) -> None:
    others = ann.joined["peer_count"] + 1
    session_id = bob.joined["session_id"]
    assert bob.joined == {
        "alias": bob.alias,
        "session_id": session_id,
        "peer_count": others,
        "unread": 0,
    }
    assert re.fullmatch(r"[a-z]{3,9}-[a-z]{3,9}", bob.alias)
    assert re.fullmatch(r"[\w-]{22,}", session_id)


@both_eras
async def test_register_with_a_session_resumes_it(ann: Member, bob: Member, era: str) -> None:
    again = await ann("register", task="prices")
    assert again["alias"] == ann.alias
    assert again["session_id"] == ann.joined["session_id"]


@both_eras
async def test_a_message_goes_over_between_the_eras_as_it_was_sent(
    ann: Member, bob: Member, era: str
) -> None:
    text = "swordfish 🗡\0\x1b\x7f\x85\r\n\"'\\\u2028日"
    sent = await ann("send_message", target_alias=bob.alias, message=text)
    assert sent == {
        "delivered": True,
        "to": [bob.alias],
        "to_count": 1,
        "waiting": 0,
        "unread": 0,
    }
    read = await bob("read_messages", sender=ann.alias)
    (message,) = read["messages"]
    assert read.keys() == {"messages", "remaining", "note"}
    assert read["remaining"] == 0
    assert message.keys() == {"from", "message", "timestamp"}
    assert message["from"] == ann.alias
    assert message["message"] == text
    assert datetime.fromisoformat(message["timestamp"]).utcoffset() == timedelta(0)


@both_eras
async def test_a_message_is_handed_out_once_and_repeated_when_asked(
    ann: Member, bob: Member, era: str
) -> None:
    await ann("send_message", target_alias=bob.alias, message="hello")
    first = await bob("read_messages")
    second = await bob("read_messages")
    assert second == {"messages": [], "remaining": 0}
    assert await bob("read_messages", again=True) == first


@both_eras
async def test_list_peers_shows_a_peer_with_its_labels(ann: Member, bob: Member, era: str) -> None:
    await ann("send_message", target_alias=bob.alias, message="hello")
    listed = await ann("list_peers", role="bob's own", wait_seconds=5)
    (info,) = listed["peers"]
    joined_at = info.pop("connected_at")
    idle_seconds = info.pop("idle_seconds")
    assert info == {
        "alias": bob.alias,
        "repo": "api",
        "task": "",
        "role": "bob's own",
        "waiting": False,
        "unread_from_you": 1,
    }
    assert datetime.fromisoformat(joined_at).utcoffset() == timedelta(0)
    assert 0 <= idle_seconds < 60
    assert listed["remaining"] == 0
    assert listed["unread"] == 0


@both_eras
async def test_disconnect_tells_how_many_messages_it_erased(
    ann: Member, bob: Member, era: str
) -> None:
    await bob("send_message", target_alias=ann.alias, message="never read")
    assert await ann("disconnect") == {"disconnected": True, "erased": 1}
    # What Bob has not read by now is the notice of that.
    assert await bob("disconnect") == {"disconnected": True, "erased": 1}


async def test_each_tool_can_be_called_bare(
    here: Junction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server, FastMCP's Context or its middleware, as the transport does it."""
    monkeypatch.setattr(app, "junction", here)
    tools = {tool.name: tool for tool in await app.mcp.list_tools()}

    async def run(tool: str, **arguments: Any) -> Any:
        return (await tools[tool].run(arguments)).structured_content

    ann = await run("register", repo="web")
    bob = await run("register")
    hers = {"session_id": ann["session_id"]}
    his = {"session_id": bob["session_id"]}
    assert bob["peer_count"] == 1
    assert (await run("list_peers", **his))["peers"][0]["repo"] == "web"
    sent = await run("send_message", **hers, target_alias=bob["alias"], message="hello")
    assert sent["delivered"]
    read = await run("read_messages", **his, wait_seconds=5)
    assert [message["message"] for message in read["messages"]] == ["hello"]
    assert await run("known_hosts") == {"hosts": []}
    assert await run("disconnect", **hers) == {"disconnected": True, "erased": 0}


@both_eras
@pytest.mark.parametrize(
    ("tool", "arguments", "text"),
    [
        ("read_messages", {}, "unknown or expired.*Call register"),
        ("send_message", {"target_alias": "a-b"}, "message.* Call send_message again"),
        ("read_messages", {"session_id": {"swordfish": 1}}, "session_id.* Call read_messages"),
        ("read_messages", {"wait_seconds": "swordfish"}, "wait_seconds.* Call read_messages"),
        ("read_messages", {"nonsense": "swordfish"}, "nonsense.* Call read_messages"),
    ],
)
async def test_a_refused_call_says_what_to_do_and_quotes_no_secret(
    client: Client[Any], era: str, tool: str, arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(ToolError, match=text) as caught:
        await client.call_tool(tool, {"session_id": "swordfish", **arguments})
    assert not re.search("swordfish|pydantic|input_value", str(caught.value))


@both_eras
async def test_a_restarted_server_says_register_to_whoever_was_there(era: str) -> None:
    with running() as first:
        async with Client(first.url, mode=era) as client:
            joined = await call(client, "register")
            assert first.stops_in_silence()
            with running(port=first.port):
                with pytest.raises(ToolError, match="Call register"):
                    await call(client, "read_messages", session_id=joined["session_id"])
                await call(client, "register")


@both_eras
async def test_it_speaks_tls_and_names_the_known_hosts(
    tls_server: Server, certificate: str, era: str
) -> None:
    bases = {
        "desk": "http://10.0.0.7:4200",
        "attic": "http://[fd00::1]:4300",
        "far": "https://far.example:4200",
    }
    hosts = [
        {"name": name, "mcp_url": f"{base}/mcp", "health_url": f"{base}/health"}
        for name, base in bases.items()
    ]
    trust = ssl.create_default_context(cafile=certificate)
    async with Client(tls_server.url, auth=TOKEN, verify=trust, mode=era) as client:
        assert await call(client, "known_hosts") == {"hosts": hosts}
    for name, base in bases.items():
        assert f"\nKnown host: {name} {base}/mcp\n" in tls_server.said()


# --- Signs of life from a call that waits ------------------------------------------


def hear(talk: socket.socket, text: bytes, times: int) -> bytes:
    """Return what comes until it has this text so often. The connection stays open."""
    got = b""
    deadline = time.monotonic() + 20
    while got.count(text) < times:
        more = talk.recv(65_536)
        assert more, got
        assert time.monotonic() < deadline, got
        got += more
    return got


def all_events(text: bytes) -> list[Any]:
    """Return the data of the server-sent events that a text has in full."""
    found = re.findall(rb"^data: (.+?)\r?\n\r?\n", text, re.MULTILINE)
    return [json.loads(data) for data in found]


def with_meta(body: bytes, meta: dict[str, Any]) -> bytes:
    """Return a request with more under its `_meta`."""
    message = json.loads(body)
    message["params"].setdefault("_meta", {}).update(meta)
    return json.dumps(message).encode()


def ask_with_progress(agent: Agent, token: Any, tool: str, **arguments: Any) -> socket.socket:
    """Begin a call that asks for progress."""
    body, headers = rpc(agent.era, tool, {"session_id": agent.session_id, **arguments})
    body = with_meta(body, {"progressToken": token})
    return connect(agent.server, on_the_wire(body, headers))


@both_eras
def test_a_waiting_read_gives_signs_of_life_and_is_woken(tuned: Server, era: str) -> None:
    ann = Agent(tuned)
    bob = Agent(tuned, era)
    talk = bob.begin_read()
    heard = hear(talk, b": ping\r\n\r\n", 3)
    assert all_events(heard) == []
    assert ann.send(bob.alias, "wake up")["waiting"] == 1
    assert b"wake up" in receive(talk, b'"remaining":0')


@both_eras
@pytest.mark.parametrize(
    ("tool", "more"), [("read_messages", {}), ("list_peers", {"role": "nobody's"})]
)
@pytest.mark.parametrize(
    ("token", "wait"), [(7, 600), ("seven", 600), (0, "600")], ids=["int", "str", "wait as text"]
)
def test_who_asks_for_progress_is_told_how_long_it_waited_and_will(
    tuned: Server, era: str, tool: str, more: Any, token: Any, wait: Any
) -> None:
    with ask_with_progress(Agent(tuned, era), token, tool, wait_seconds=wait, **more) as talk:
        heard = hear(talk, b"}}\r\n\r\n", 3)
    assert b": ping" not in heard
    reports = all_events(heard)[:3]
    for report in reports:
        assert report["method"] == "notifications/progress"
        assert report["params"]["progressToken"] == token
        assert type(report["params"]["progressToken"]) is type(token)
        assert report["params"]["total"] == 600
    waited = [report["params"]["progress"] for report in reports]
    assert 0 < waited[0] < waited[1] < waited[2] < 600


@both_eras
async def test_the_official_client_hands_progress_to_its_handler(tuned: Server, era: str) -> None:
    reports: asyncio.Queue[float | None] = asyncio.Queue()

    async def note(_progress: float, total: float | None, _message: str | None) -> None:
        reports.put_nowait(total)

    async with Client(tuned.url, mode=era) as client, asyncio.timeout(40):
        bob = Member(client, await call(client, "register"))
        arguments = {"session_id": bob.joined["session_id"], "wait_seconds": 600}
        reading = asyncio.create_task(
            client.call_tool("read_messages", arguments, progress_handler=note)
        )
        for _ in range(3):
            assert await reports.get() == 600
        Agent(tuned).send(bob.alias, "wake up")
        answer = (await reading).structured_content or {}
    assert [message["message"] for message in answer["messages"]] == ["wake up"]


# --- A call that its client has given up takes nothing -----------------------------


@pytest.fixture(params=["tuned", "tuned_tls_server"], ids=["http", "https"])
def either(request: pytest.FixtureRequest) -> Any:
    """The tuned server, over plain HTTP and over TLS."""
    return request.getfixturevalue(request.param)


def half_close(talk: socket.socket) -> None:
    """Close the sending half of a connection."""
    talk.shutdown(socket.SHUT_WR)


# Starlette's StreamingResponse watches for a client that goes only while uvicorn
# announces an ASGI spec_version below 2.4 (uvicorn 0.54 says 2.3). When a newer one of
# either ends that watch, these tests fail: the dead call stays, and its peer waits on.
@both_eras
@pytest.mark.parametrize("go", [reset, socket.socket.close, half_close])
def test_a_client_that_goes_while_it_waits_waits_no_more_and_loses_nothing(
    either: Server, era: str, go: Callable[[socket.socket], None]
) -> None:
    ann = Agent(either)
    bob = Agent(either, era)
    with bob.begin_read() as talk:
        go(talk)
        until(lambda: not bob.waits())
        ann.send(bob.alias, "hello")
        assert bob.read() == ["hello"]


class Line:
    """An agent's calls over one connection, which is quick."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.talk = connect(agent.server)

    def __call__(self, tool: str, **arguments: Any) -> Any:
        self.talk.sendall(self.agent.request(tool, **arguments))
        answer = http.client.HTTPResponse(self.talk)
        answer.begin()
        result = answer_of(answer.read())["result"]
        assert not result["isError"], result
        return result["structuredContent"]

    def sees_waiting(self, role: str) -> bool:
        """Whether the one peer of this role waits for mail."""
        (info,) = self("list_peers", role=role)["peers"]
        return bool(info["waiting"])


@both_eras
def test_a_reset_in_the_very_turn_in_which_a_message_comes_loses_nothing(
    either: Server, era: str
) -> None:
    """Half of the reads wait by then, and half have only just been sent."""
    role = f"reset {era} {either.port}"
    ann = Line(Agent(either))
    reader = Agent(either, era, role=role)
    bob = Line(reader)
    headers = {"x-reset": "1", "connection": "close"}
    lost_answers = 0
    with contextlib.closing(ann.talk), contextlib.closing(bob.talk):
        for number in range(300):
            text = f"text {number}"
            talk = connect(
                either, reader.request("read_messages", headers=headers, wait_seconds=600)
            )
            if number % 2:
                until(lambda: ann.sees_waiting(role))
            ann("send_message", target_alias=reader.alias, message=text)
            was_answered = text.encode() in receive(talk)
            lost_answers += not was_answered
            left = [message["message"] for message in bob("read_messages")["messages"]]
            assert left in ([], [text])
            assert was_answered == (left == [])
    assert lost_answers >= 150


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Stop a server's process. It finds all at once that is sent to it meanwhile."""
    server.process.send_signal(signal.SIGSTOP)
    os.waitpid(server.process.pid, os.WUNTRACED)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


@posix_only
@both_eras
def test_a_reset_and_a_message_that_come_at_once_lose_nothing(either: Server, era: str) -> None:
    ann = Agent(either)
    bob = Agent(either, era)
    for text in ("one", "two", "three", "four", "five"):
        reading = bob.begin_read()
        sending = connect(either)
        ask(either, "/health")  # when this is answered, it has been accepted
        with stopped(either):
            request = ann.request("send_message", target_alias=bob.alias, message=text)
            sending.sendall(request)
            reset(reading)
        receive(sending, b'"delivered":true')
        assert bob.read() == [text]


# The older era's headers, with no session yet.
PLAIN_HEADERS = rpc(LEGACY, "", {})[1]


def tell(
    server: Server, method: str, params: Any, session: str = "", **id_: int
) -> tuple[int, Any]:
    """Post a message of the older era. Returns status and headers of the answer."""
    message = {"jsonrpc": "2.0", "method": method, "params": params, **id_}
    headers = PLAIN_HEADERS | {"mcp-session-id": session}
    status, answered, _ = ask(server, "/mcp", json.dumps(message).encode(), headers)
    return status, answered


def cancel(server: Server, session: str, call_id: Any) -> None:
    status, _ = tell(server, "notifications/cancelled", {"requestId": call_id}, session)
    assert status == 202


def session_of(server: Server) -> str:
    """Return the session that an older client is given."""
    params = {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "0"},
    }
    _, answered = tell(server, "initialize", params, id=0)
    return str(answered["mcp-session-id"])


def test_each_older_client_is_given_a_random_session(tuned: Server) -> None:
    first = session_of(tuned)
    second = session_of(tuned)
    assert re.fullmatch(r"[!-~]{22,}", first)
    assert first != second


@pytest.mark.parametrize("call_id", [7, "seven"])
def test_a_cancelled_notification_ends_the_call_that_it_names(either: Server, call_id: Any) -> None:
    ann = Agent(either)
    bob = Agent(either, LEGACY)
    session = session_of(either)
    talk = bob.begin_read(call_id, {"mcp-session-id": session, "connection": "close"})
    cancel(either, session, call_id)
    answer = receive(talk)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n0\r\n\r\n")  # a proper end, not a broken stream
    assert all_events(answer) == []
    assert not bob.waits()
    ann.send(bob.alias, "hello")
    assert bob.read() == ["hello"]


def test_a_cancelled_notification_ends_no_call_of_another_id_or_session(tuned: Server) -> None:
    bob = Agent(tuned, LEGACY)
    session = session_of(tuned)
    with bob.begin_read(7, {"mcp-session-id": session}):
        for call_id in (8, -7, 7.5, "7", "", None, [7], {"7": 7}):
            cancel(tuned, session, call_id)
        cancel(tuned, session_of(tuned), 7)
        cancel(tuned, "", 7)
        assert bob.waits()


def test_a_cancelled_notification_ends_no_call_by_an_id_of_another_type(tuned: Server) -> None:
    """In Python, True == 1."""
    bob = Agent(tuned, LEGACY)
    session = session_of(tuned)
    with bob.begin_read(1, {"mcp-session-id": session}):
        cancel(tuned, session, True)
        assert bob.waits()


def test_a_call_without_a_session_is_ended_by_no_cancelled_notification(tuned: Server) -> None:
    bob = Agent(tuned, LEGACY)
    with bob.begin_read(7):
        cancel(tuned, "", 7)
        cancel(tuned, session_of(tuned), 7)
        assert bob.waits()


def test_calls_of_one_session_and_id_are_cancelled_together(tuned: Server) -> None:
    session = session_of(tuned)
    headers = {"mcp-session-id": session, "connection": "close"}
    talks = [Agent(tuned, LEGACY).begin_read(7, headers) for _ in range(2)]
    cancel(tuned, session, 7)
    for talk in talks:
        assert all_events(receive(talk)) == []


@pytest.mark.parametrize("ends_first", [0, 1], ids=["the older ends", "the newer ends"])
def test_calls_of_one_session_and_id_do_not_take_each_others_place(
    tuned: Server, ends_first: int
) -> None:
    """The end of one leaves the other cancellable."""
    session = session_of(tuned)
    headers = {"mcp-session-id": session, "connection": "close"}
    readers = [Agent(tuned, LEGACY), Agent(tuned, LEGACY)]
    talks = [reader.begin_read(7, headers) for reader in readers]
    Agent(tuned).send(readers[ends_first].alias, "hello")
    assert b"hello" in receive(talks[ends_first])
    other = 1 - ends_first
    assert readers[other].waits()
    cancel(tuned, session, 7)
    assert all_events(receive(talks[other])) == []
    assert not readers[other].waits()


def crowd_around(
    server: Server, read: bytes, crowd: bytes, give_up: Callable[[socket.socket], bytes]
) -> socket.socket:
    """Send a read behind a crowd of calls, and let it be given up before its turn.

    `give_up` returns what is sent last. Returns the connection of the read.
    """
    talks = [connect(server) for _ in range(152)]
    ask(server, "/health")  # when this is answered, all of them have been accepted
    reading = talks[-1]
    others = talks[:-1]
    with stopped(server):
        for talk in others[:-1]:
            talk.sendall(crowd)
        reading.sendall(read)
        others[-1].sendall(give_up(reading))
    for talk in others:
        receive(talk, b"HTTP/1.1 20")
    return reading


@posix_only
@both_eras
@pytest.mark.parametrize("wait", [{}, {"wait_seconds": 60}], ids=["now", "waiting"])
@pytest.mark.parametrize("go", [reset, socket.socket.close], ids=["reset", "close"])
def test_a_read_whose_client_is_gone_when_it_arrives_takes_no_mail(
    either: Server, era: str, wait: Any, go: Callable[[socket.socket], None]
) -> None:
    ann = Agent(either)
    bob = Agent(either, era)
    for _ in range(10):
        ann.send(bob.alias, "hello")
        talk = connect(either)
        ask(either, "/health")  # when this is answered, that was accepted
        with stopped(either):
            talk.sendall(bob.request("read_messages", **wait))
            go(talk)
        until(lambda: not bob.waits())
        assert bob.read() == ["hello"]


@posix_only
@both_eras
@pytest.mark.parametrize("wait", [{}, {"wait_seconds": 60}], ids=["now", "waiting"])
def test_a_read_whose_client_goes_before_its_turn_takes_no_mail(
    tuned: Server, era: str, wait: Any
) -> None:
    ann = Agent(tuned)
    bob = Agent(tuned, era)
    ann.send(bob.alias, "hello")

    read = bob.request("read_messages", **wait)
    crowd = ann.request("read_messages")

    def give_up(reading: socket.socket) -> bytes:
        reset(reading)
        return crowd

    crowd_around(tuned, read, crowd, give_up)
    until(lambda: not bob.waits())
    assert bob.read() == ["hello"]
    assert tuned.errors.read_text() == ""  # lines about it would fill whatever takes them


@posix_only
@pytest.mark.parametrize("wait", [{}, {"wait_seconds": 60}], ids=["now", "waiting"])
def test_a_read_that_is_cancelled_before_its_turn_takes_no_mail(tuned: Server, wait: Any) -> None:
    ann = Agent(tuned)
    bob = Agent(tuned, LEGACY)
    ann.send(bob.alias, "hello")
    headers = {"mcp-session-id": session_of(tuned), "connection": "close"}
    params = {"requestId": 7}
    message = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}
    cancellation = on_the_wire(json.dumps(message).encode(), PLAIN_HEADERS | headers)
    read = bob.request("read_messages", 7, headers, **wait)
    crowd = ann.request("read_messages")
    answer = receive(crowd_around(tuned, read, crowd, lambda _: cancellation))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"hello" not in answer
    assert bob.read() == ["hello"]


# --- Answered as by the SDK --------------------------------------------------------


def outcome(
    server: Server, body: bytes, headers: Json, method: str = "POST", path: str = "/mcp"
) -> tuple[int, Any]:
    """Return the status of an answer, and its id and result, or else the body as it is."""
    status, answered, text = ask(server, path, body, headers, method)
    if status == 200 and b'"result"' in text:
        answer = answer_of(text)
        return status, [answer["id"], answer["result"]]
    return status, [answered.get("content-type"), text]


# None: left out. In capitals: one more of that name, behind the first.
HEADER_CHANGES: list[tuple[str, str | None]] = [
    ("mcp-protocol-version", None),
    ("mcp-protocol-version", "2024-11-05"),
    ("mcp-protocol-version", "2025-11-25"),
    ("mcp-protocol-version", "2999-01-01"),
    ("mcp-protocol-version", "x"),
    ("mcp-protocol-version", MODERN),
    ("MCP-PROTOCOL-VERSION", "2025-03-26"),
    ("MCP-PROTOCOL-VERSION", MODERN),
    ("mcp-session-id", "abc"),
    ("mcp-method", None),
    ("mcp-method", "tools/list"),
    ("MCP-METHOD", "tools/list"),
    ("mcp-name", None),
    ("mcp-name", "register"),
    ("accept", None),
    ("accept", "*/*"),
    ("accept", "application/json"),
    ("accept", "text/event-stream"),
    ("accept", "text/event-stream, application/json"),
    ("accept", "application/json;q=0.9, text/event-stream"),
    ("accept", "Text/*, application/*"),
    ("accept", "application/ json, text/event-stream"),
    ("accept", "image/png"),
    ("ACCEPT", "image/png"),
    ("content-type", None),
    ("content-type", "application/json; charset=utf-8"),
    ("content-type", "application/json-seq"),
    ("content-type", "text/plain"),
    ("CONTENT-TYPE", "text/plain"),
]


@both_eras
@pytest.mark.parametrize(("name", "value"), HEADER_CHANGES)
def test_a_call_with_other_headers_is_answered_as_by_the_sdk(
    server: Server, sdk_server: Server, era: str, name: str, value: str | None
) -> None:
    body, headers = rpc(era, "known_hosts", {})
    changed: Json = {**headers, name: value}
    if value is None:
        del changed[name]
    assert outcome(server, body, changed) == outcome(sdk_server, body, changed)


@both_eras
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/mcp"),
        ("GET", "/mcp"),
        ("DELETE", "/mcp"),
        ("PUT", "/mcp"),
        ("POST", "/mcp/"),
        ("POST", "/elsewhere"),
    ],
)
def test_a_call_by_another_way_is_answered_as_by_the_sdk(
    server: Server, sdk_server: Server, era: str, method: str, path: str
) -> None:
    body, headers = rpc(era, "known_hosts", {})
    ours = outcome(server, body, headers, method, path)
    assert ours == outcome(sdk_server, body, headers, method, path)


# A text in the body of a call of known_hosts, and what stands there instead.
BODY_CHANGES = [
    ('"id": 1', '"id": "one"'),
    ('"id": 1', '"id": ""'),
    ('"id": 1', f'"id": {"9" * 30}'),
    ('"id": 1', f'"id": {"9" * 5_000}'),
    ('"id": 1', '"id": -1'),
    ('"id": 1', '"id": 1.5'),
    ('"id": 1', '"id": 1.0'),
    ('"id": 1', '"id": true'),
    ('"id": 1', '"id": [1]'),
    ('"id": 1', '"id": null'),
    ('"id": 1', '"id": 1, "id": 2'),
    ('"id": 1', '"id": 1, "more": 1'),
    ('"id": 1', '"id": 1, "result": {}'),
    ('"id": 1', '"id": 1, "error": {"code": 1, "message": "m"}'),
    ('"id": 1, ', ""),
    ('"id": 1, "method": "tools/call"', '"method": "notifications/initialized"'),
    ('"arguments": {}', '"arguments": []'),
    ('"arguments": {}', '"arguments": null'),
    ('"arguments": {}', '"arguments": {"more": 1}'),
    ('"arguments": {}', '"arguments": {"wait_seconds": 1}'),
    ('"arguments": {}', '"arguments": {}, "more": 1'),
    ('"arguments": {}', '"arguments": {}, "task": {"ttl": 60}'),
    ('"arguments": {}', '"arguments": {}, "task": 5'),
    ('"arguments": {}', '"arguments": {}, "requestState": "x"'),
    ('"arguments": {}', '"arguments": {}, "inputResponses": {"a": 1}'),
    ('"arguments": {}', '"arguments": {}, "_meta": 1'),
    ('"arguments": {}', '"arguments": {}, "_meta": null'),
    (', "arguments": {}', ""),
    ('"2.0"', '"1.0"'),
    ('"2.0"', "2.0"),
    ('"jsonrpc": "2.0", ', ""),
    ('"name": "known_hosts"', '"nome": "known_hosts"'),
    ('"params"', '"porams"'),
    ('"known_hosts"', "5"),
    ('"known_hosts"', '"known_hosts\udcff"'),
    ('{"jsonrpc"', '\ufeff{"jsonrpc"'),
    ('{"jsonrpc"', '[{"jsonrpc"'),
    ("}}", ""),
]
# What only a client of 2026-07-28 says.
MODERN_BODY_CHANGES = [
    ('{"name": "test", "version": "0"}', "5"),
    ('{"name": "test", "version": "0"}', "null"),
    ('{"name": "test", "version": "0"}', '{"name": "test"}'),
    ('{"name": "test", "version": "0"}', '{"name": 5, "version": "0"}'),
    ('clientCapabilities": {}', 'clientCapabilities": 5'),
    ('clientCapabilities": {}', 'clientCapabilities": {"roots": 5}'),
    ('clientCapabilities": {}', 'more": {}'),
    (f'protocolVersion": "{MODERN}"', 'protocolVersion": "2025-11-25"'),
    (f'protocolVersion": "{MODERN}"', 'protocolVersion": 5'),
    (f'protocolVersion": "{MODERN}"', 'more": 5'),
]
ALL_BODY_CHANGES = [(era, old, new) for era in ERAS for old, new in BODY_CHANGES]
ALL_BODY_CHANGES += [(MODERN, old, new) for old, new in MODERN_BODY_CHANGES]


@pytest.mark.parametrize(("era", "old", "new"), ALL_BODY_CHANGES)
def test_a_call_with_another_body_is_answered_as_by_the_sdk(
    server: Server, sdk_server: Server, era: str, old: str, new: str
) -> None:
    body, headers = rpc(era, "known_hosts", {})
    assert old in body.decode()
    changed = body.decode().replace(old, new, 1).encode("utf-8", "surrogateescape")
    assert outcome(server, changed, headers) == outcome(sdk_server, changed, headers)


@both_eras
@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"progressToken": 7},
        {"progressToken": "seven"},
        {"progressToken": 7.5},
        {"progressToken": [7]},
        {"progressToken": None},
        {"claudecode/toolUseId": "toolu_1", "x-codex-turn-metadata": {"model": "stub"}},
        {"fastmcp": {"version": "9"}},
        {"fastmcp": 5},
    ],
)
def test_a_call_with_more_meta_is_answered_as_by_the_sdk(
    server: Server, sdk_server: Server, era: str, meta: dict[str, Any]
) -> None:
    body, headers = rpc(era, "known_hosts", {})
    body = with_meta(body, meta)
    assert outcome(server, body, headers) == outcome(sdk_server, body, headers)


@both_eras
@pytest.mark.parametrize("method", ["ping", "tools/never", "tools/list", "initialize"])
def test_another_method_is_answered_as_by_the_sdk(
    server: Server, sdk_server: Server, era: str, method: str
) -> None:
    body, headers = rpc(era, "known_hosts", {})
    changed = body.replace(b"tools/call", method.encode(), 1)
    headers["mcp-method"] = method
    assert outcome(server, changed, headers) == outcome(sdk_server, changed, headers)


WAITING_CALLS: list[tuple[str, Json]] = [
    ("list_peers", {"role": "nobody's", "wait_seconds": 0.1}),
    ("list_peers", {"role": "nobody's", "wait_seconds": "0.1"}),
    ("list_peers", {"role": "nobody's", "wait_seconds": "soon"}),
    ("list_peers", {"role": "nobody's", "wait_seconds": -1}),
    ("list_peers", {"role": "nobody's", "wait_seconds": 5_000}),
    ("list_peers", {"role": "nobody's", "wait_seconds": [1]}),
    ("read_messages", {"wait_seconds": 0.1}),
    ("read_messages", {"wait_seconds": "0.1"}),
    ("read_messages", {"wait_seconds": "soon"}),
    ("read_messages", {"wait_seconds": 0.1, "sender": "nobody"}),
]
QUICK_CALLS: list[tuple[str, Json]] = [
    ("read_messages", {}),
    ("read_messages", {"wait_seconds": "0"}),
    ("read_messages", {"wait_seconds": None}),
    ("read_messages", {"again": True}),
    ("read_messages", {"again": "yes"}),
    ("read_messages", {"again": "perhaps"}),
    ("read_messages", {"session_id": "swordfish"}),
    ("read_messages", {"session_id": ["swordfish"]}),
    ("read_messages", {"swordfish": "swordfish", "marlin": 1}),
    ("send_message", {"target_alias": "*", "message": ""}),
    ("send_message", {"target_alias": "*", "message": 5}),
    ("send_message", {}),
    ("register", {"repo": "two\nlines"}),
    ("disconnect", {}),
    ("unknown_tool", {}),
    ("", {}),
]


def outcome_for_a_peer(
    server: Server, era: str, tool: str, arguments: dict[str, Any]
) -> tuple[int, Any]:
    """Return what a new peer's call is answered."""
    session_id = Agent(server).session_id
    return outcome(server, *rpc(era, tool, {"session_id": session_id, **arguments}))


@both_eras
@pytest.mark.parametrize(("tool", "arguments"), WAITING_CALLS + QUICK_CALLS)
def test_each_kind_of_result_is_that_of_the_sdk(
    server: Server, sdk_server: Server, era: str, tool: str, arguments: dict[str, Any]
) -> None:
    """The framing may differ: an event stream or JSON."""
    ours = outcome_for_a_peer(server, era, tool, arguments)
    assert ours == outcome_for_a_peer(sdk_server, era, tool, arguments)
    assert ours[0] == 200


def result_of(server: Server, era: str, tool: str, arguments: Any, version: str) -> Json:
    """Return a result, without what belongs to 2026-07-28 if it is of that version."""
    body, headers = rpc(era, tool, arguments)
    headers["mcp-protocol-version"] = version
    _, (_, result) = outcome(server, body, headers)
    if era == MODERN:
        identity = {"name": "junction", "version": app.__version__}
        assert result.pop("resultType") == "complete"
        assert result.pop("_meta") == {"io.modelcontextprotocol/serverInfo": identity}
    return dict(result)


EACH_VERSION = [(LEGACY, "2025-03-26"), (LEGACY, "2025-11-25"), (MODERN, MODERN)]


@pytest.mark.parametrize(("era", "version"), EACH_VERSION)
@pytest.mark.parametrize("wait", [{}, {"wait_seconds": 5}], ids=["now", "waiting"])
def test_the_text_of_a_result_is_exactly_the_json_of_its_structure(
    server: Server, era: str, version: str, wait: dict[str, int]
) -> None:
    ann = Agent(server)
    bob = Agent(server)
    ann.send(bob.alias, 'swordfish 🗡 "\\\n\x00日')
    arguments = {"session_id": bob.session_id, **wait}
    result = result_of(server, era, "read_messages", arguments, version)
    structure = result["structuredContent"]
    text = json.dumps(structure, ensure_ascii=False, separators=(",", ":"))
    assert len(structure["messages"]) == 1
    assert result == {
        "content": [{"type": "text", "text": text}],
        "structuredContent": structure,
        "isError": False,
    }


@pytest.mark.parametrize(("era", "version"), EACH_VERSION)
def test_a_refusal_has_a_text_and_no_structure(server: Server, era: str, version: str) -> None:
    result = result_of(server, era, "disconnect", {"session_id": "nobody's"}, version)
    (content,) = result.pop("content")
    assert result == {"isError": True}
    assert content["type"] == "text"
    assert "Call register" in content["text"]


# list_peers raises what its role names: an exception, or pydantic's for a bad value.
FAILING = """
import builtins, junction, pydantic

list_peers = junction.Junction.list_peers

async def fail(here, peer, role="", seconds=0):
    if role == "pydantic":
        pydantic.TypeAdapter(int).validate_python("swordfish")
    if hasattr(builtins, role):
        raise getattr(builtins, role)("swordfish")
    return await list_peers(here, peer, role, seconds)

junction.Junction.list_peers = fail
"""
# A call that FastMCP carries out is refused, so that what is answered well went past it.
# Snapshots come quickly. /keep_alive tells how long an idle connection is kept. /burst
# lets more happen at once than is queued for a watcher.
ALTERED = """
from fastmcp.exceptions import ToolError
from fastmcp.server.middleware import Middleware
from starlette.responses import JSONResponse

class Refuse(Middleware):
    async def on_call_tool(self, context, call_next):
        raise ToolError("by FastMCP")

junction.mcp.add_middleware(Refuse())
junction.SNAPSHOT_SECONDS = 0
junction.WATCHER_EVENTS = 1_000
start = junction.Server.__init__
configs = []

def start_and_note(self, config):
    configs.append(config)
    start(self, config)

junction.Server.__init__ = start_and_note

@junction.mcp.custom_route("/keep_alive", methods=["GET"])
async def keep_alive(_request):
    return JSONResponse(configs[0].timeout_keep_alive)

@junction.mcp.custom_route("/burst", methods=["GET"])
async def burst(_request):
    for number in range(2_000):
        junction.junction.tell("burst", number=number)
    return JSONResponse("done")
"""
altered = served(code=FAILING + ALTERED)
failing_sdk_server = served(code=SDK + FAILING)


@both_eras
@pytest.mark.parametrize("wait", [{}, {"wait_seconds": 5}], ids=["now", "waiting"])
@pytest.mark.parametrize(
    "kind", ["RuntimeError", "ValueError", "KeyError", "TimeoutError", "pydantic"]
)
def test_a_foreign_exception_is_masked_as_by_the_sdk(
    altered: Server, failing_sdk_server: Server, era: str, kind: str, wait: dict[str, int]
) -> None:
    arguments = {"role": kind, **wait}
    ours = outcome_for_a_peer(altered, era, "list_peers", arguments)
    assert ours == outcome_for_a_peer(failing_sdk_server, era, "list_peers", arguments)
    _, (_, result) = ours
    assert result["isError"]
    assert result["content"][0]["text"] == "Error calling tool 'list_peers'"


# --- What the real clients send ----------------------------------------------------


class RealCall(NamedTuple):
    """A call as a client sent it: its head without Host and Content-Length, `_meta` and id."""

    head: str
    meta: Json | None
    id: int

    def headers(self) -> dict[str, str]:
        lines = self.head.strip().splitlines()
        return dict(line.split(": ", 1) for line in lines)

    def body(self) -> bytes:
        params: Json = {"name": "known_hosts", "arguments": {}}
        if self.meta:
            params["_meta"] = self.meta
        message = {"jsonrpc": "2.0", "id": self.id, "method": "tools/call", "params": params}
        return json.dumps(message, separators=(",", ":")).encode()


def envelope(client: Json, capabilities: Json) -> Json:
    """Return what a client of 2026-07-28 says of itself under `_meta`."""
    prefix = "io.modelcontextprotocol"
    return {
        f"{prefix}/protocolVersion": MODERN,
        f"{prefix}/clientInfo": client,
        f"{prefix}/clientCapabilities": capabilities,
    }


CLAUDE = {
    "name": "claude-code",
    "title": "Claude Code",
    "version": "2.1.332",
    "description": "Anthropic's agentic coding tool",
    "websiteUrl": "https://claude.com/claude-code",
}
CODEX = {"name": "codex-mcp-client", "title": "Codex", "version": "0.171.0"}
CODEX_META = {
    "callId": "call_308b27b3934c4602",
    "x-codex-turn-metadata": {
        "session_id": "01a22eab-df02-71e1-a169-0ae891e92bf2",
        "model": "stub",
        "turn_started_at_unix_ms": 1796079345451,
        "sandbox_mode": "danger-full-access",
        "auto_review_enabled": False,
    },
    "threadId": "01a22eab-df02-71e1-a169-0ae891e92bf2",
    "sessionId": "01a22eab-df02-71e1-a169-0ae891e92bf2",
    "windowId": "01a22eab-df02-71e1-a169-0ae891e92bf2:0",
    "itemId": "fc_54c3cb031ec04f73ab773dbbda3bfa3c",
    "progressToken": 1,
}
COPILOT = {"name": "copilot-cli", "version": "1.0.102"}
ELICITATION: Json = {"elicitation": {"form": {}, "url": {}}}
REAL_CALLS = {
    "Claude Code 2.1.332": RealCall(
        """
Accept: application/json, text/event-stream
Accept-Encoding: identity
Content-Type: application/json
User-Agent: claude-code/2.1.332 (sdk-cli)
mcp-method: tools/call
mcp-name: known_hosts
mcp-protocol-version: 2026-07-28
Connection: keep-alive
""",
        {
            **envelope(CLAUDE, {"roots": {"listChanged": True}, **ELICITATION}),
            "claudecode/toolUseId": "toolu_77b8c00885b1440e99248e06",
            "progressToken": 3,
        },
        3,
    ),
    "Claude Code 2.1.332, older era": RealCall(
        """
Accept: application/json, text/event-stream
Accept-Encoding: identity
Content-Type: application/json
User-Agent: claude-code/2.1.332 (sdk-cli)
mcp-protocol-version: 2025-11-25
mcp-session-id: 71a42a6227a161f98ae4dbabd5b56e17
Connection: keep-alive
""",
        {"claudecode/toolUseId": "toolu_9b7db26f706847b8ba7daa9d", "progressToken": 4},
        4,
    ),
    "Codex 0.171.0": RealCall(
        """
user-agent: codex-mcp-client/0.171.0
mcp-protocol-version: 2025-06-18
accept: text/event-stream, application/json
content-type: application/json
mcp-session-id: b01910592db3bacd8125d83e456c35ed
accept-encoding: zstd,gzip
""",
        CODEX_META,
        2,
    ),
    "Codex 0.171.0, newer era": RealCall(
        """
user-agent: codex-mcp-client/0.171.0
mcp-protocol-version: 2026-07-28
mcp-name: known_hosts
mcp-method: tools/call
accept: text/event-stream, application/json
content-type: application/json
accept-encoding: zstd,gzip
""",
        {**CODEX_META, **envelope(CODEX, ELICITATION)},
        2,
    ),
    "Gemini CLI 0.61.0": RealCall(
        """
connection: keep-alive
mcp-session-id: 9c3c7fddeef47e4b11f5089f7036aa90
content-type: application/json
accept: application/json, text/event-stream
accept-language: *
sec-fetch-mode: cors
user-agent: node
accept-encoding: gzip, deflate
""",
        {"progressToken": "4eaf43a4-1486-40f6-84fd-9918d3b7cf16"},
        4,
    ),
    "opencode 1.18.33": RealCall(
        """
Accept: application/json, text/event-stream
Content-Type: application/json
mcp-protocol-version: 2025-11-25
mcp-session-id: 9d95381658e81b84d1eb324528b37ae5
Connection: keep-alive
User-Agent: opencode/1.18.33
Accept-Encoding: gzip, deflate, br, zstd
""",
        {"progressToken": 2},
        2,
    ),
    "Copilot CLI 1.0.102": RealCall(
        """
accept: text/event-stream, application/json
mcp-protocol-version: 2026-07-28
mcp-method: tools/call
user-agent: copilot-cli/1.0.102
mcp-name: known_hosts
content-type: application/json
accept-encoding: zstd,gzip,deflate,br
""",
        {**envelope(COPILOT, {"sampling": {}, **ELICITATION}), "progressToken": 1},
        2,
    ),
    "TypeScript SDK 1.32.2 and 2.4.0": RealCall(
        """
connection: keep-alive
mcp-session-id: 51e2ab195b9b86e1a513b434e8158884
mcp-protocol-version: 2025-11-25
content-type: application/json
accept: application/json, text/event-stream
accept-language: *
sec-fetch-mode: cors
user-agent: node
accept-encoding: gzip, deflate
""",
        None,
        2,
    ),
    "TypeScript SDK 2.4.0, newer era": RealCall(
        """
connection: keep-alive
mcp-protocol-version: 2026-07-28
mcp-method: tools/call
mcp-name: known_hosts
content-type: application/json
accept: application/json, text/event-stream
accept-language: *
sec-fetch-mode: cors
user-agent: node
accept-encoding: gzip, deflate
""",
        envelope({"name": "a", "version": "1"}, {}),
        1,
    ),
    "mcp-remote 0.15.1": RealCall(
        """
connection: keep-alive
accept: application/json, text/event-stream
content-type: application/json
mcp-protocol-version: 2025-11-25
mcp-session-id: 79e31dd08e4fb2d3e32161b98a868b63
Mcp-Method: tools/call
Mcp-Name: known_hosts
accept-language: *
sec-fetch-mode: cors
user-agent: undici
accept-encoding: gzip, deflate
""",
        None,
        2,
    ),
    "Python SDK 1.30.0": RealCall(
        """
Accept-Encoding: gzip, deflate
Connection: keep-alive
User-Agent: python-httpx/0.28.1
accept: application/json, text/event-stream
content-type: application/json
mcp-session-id: 2dd3f19be01c6bacb8b7068a354296ce
mcp-protocol-version: 2025-11-25
""",
        None,
        1,
    ),
}


@pytest.mark.parametrize("who", REAL_CALLS)
def test_a_real_clients_call_is_answered_as_by_the_sdk(
    server: Server, sdk_server: Server, who: str
) -> None:
    real = REAL_CALLS[who]
    ours = outcome(server, real.body(), real.headers())
    assert ours == outcome(sdk_server, real.body(), real.headers())
    status, (id_, result) = ours
    assert status == 200
    assert id_ == real.id
    assert result["structuredContent"] == {"hosts": []}


@pytest.mark.parametrize("who", REAL_CALLS)
def test_a_real_clients_call_does_not_go_to_fastmcp(altered: Server, who: str) -> None:
    real = REAL_CALLS[who]
    _, (_, result) = outcome(altered, real.body(), real.headers())
    assert not result["isError"], result


def test_an_odd_call_goes_to_fastmcp(altered: Server) -> None:
    """It is what shows that the test above can fail."""
    body, headers = rpc(MODERN, "known_hosts", {})
    headers["accept"] = "*/*"
    _, (_, result) = outcome(altered, body, headers)
    assert result["content"][0]["text"] == "by FastMCP"


# --- Who gets in -------------------------------------------------------------------

FOREIGN_HOSTS = ["evil.example", "127.0.0.1.evil.example:4200", "169.254.169.254"]
FOREIGN_ORIGINS = ["https://evil.example", "http://127.0.0.1.evil.example", "null"]
# What a form on a web page can send, and none.
FORMS = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
DOORS = [("host", value, 421) for value in FOREIGN_HOSTS]
DOORS += [("origin", value, 403) for value in FOREIGN_ORIGINS]


@both_eras
@pytest.mark.parametrize(("header", "value", "status"), DOORS)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/mcp"), ("OPTIONS", "/mcp"), ("GET", "/health"), ("HEAD", "/events"), ("GET", "/")],
)
def test_a_forged_host_or_a_foreign_origin_is_refused(
    server: Server, era: str, header: str, value: str, status: int, method: str, path: str
) -> None:
    body, headers = rpc(era, "register", {})
    refused, answered, _ = ask(server, path, body, headers | {header: value}, method)
    assert refused == status
    assert "access-control" not in str(answered).lower()


@both_eras
@pytest.mark.parametrize("value", FORMS)
def test_a_form_is_refused(server: Server, era: str, value: str) -> None:
    body, headers = rpc(era, "register", {})
    status, answered, _ = ask(server, "/mcp", body, headers | {"content-type": value})
    assert status == 400
    assert "access-control" not in str(answered).lower()


def test_there_is_no_cors(server: Server) -> None:
    preflight = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    _, answered, _ = ask(server, "/mcp", None, preflight, "OPTIONS")
    assert "access-control" not in str(answered).lower()


@pytest.mark.parametrize(
    ("host", "status"), [("desk.local:4200", 200), ("[fd00::7]", 200), ("desk.locale", 421)]
)
def test_an_allowed_host_gets_in_and_others_still_do_not(
    tuned: Server, host: str, status: int
) -> None:
    assert ask(tuned, "/health", headers={"host": host})[0] == status


# Each place that needs the token. HEAD, so that /events ends.
TOKEN_PLACES = [("POST", "/mcp"), ("GET", "/mcp"), ("HEAD", "/events"), ("GET", "/"), ("GET", "/x")]


@pytest.mark.parametrize(
    "sent",
    [
        None,
        TOKEN,
        f"Basic {TOKEN}",
        f"Bearer{TOKEN}",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN} {TOKEN}",
        f"Bearer {TOKEN.upper()}",
        "Bearer \u00fcmlaut-letters!",
    ],
)
@pytest.mark.parametrize(("method", "path"), TOKEN_PLACES)
def test_without_the_right_token_all_but_health_is_401(
    guarded: Server, sent: str | None, method: str, path: str
) -> None:
    body, headers = rpc(MODERN, "known_hosts", {})
    if sent is not None:
        headers["authorization"] = sent
    status, answered, text = ask(guarded, path, body, headers, method)
    assert status == 401
    assert answered["www-authenticate"] == "Bearer"
    assert answered["connection"] == "close"
    assert TOKEN not in f"{answered}{text!r}"


@both_eras
@pytest.mark.parametrize("sent", [f"Bearer {TOKEN}", f"bearer {TOKEN} \t ", f"Bearer  {TOKEN}"])
def test_the_right_token_opens_mcp_and_events(guarded: Server, era: str, sent: str) -> None:
    body, headers = rpc(era, "known_hosts", {})
    headers["authorization"] = sent
    for method, path in (("POST", "/mcp"), ("HEAD", "/events"), ("GET", "/")):
        status, answered, text = ask(guarded, path, body, headers, method)
        assert status == 200
        assert "www-authenticate" not in answered
        assert TOKEN not in f"{answered}{text!r}"


def test_the_token_is_asked_for_before_a_body_is_read(guarded: Server) -> None:
    body, headers = rpc(MODERN, "known_hosts", {})
    head = on_the_wire(body, headers).removesuffix(body)
    answer = receive(connect(guarded, head))  # which ends when the connection does
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"JUNCTION_TOKEN" in answer


def test_health_has_four_keys_and_needs_no_token(guarded: Server) -> None:
    health = get(guarded, "/health")
    assert type(health.pop("uptime")) is int
    assert health == {"status": "ok", "mode": "localhost", "activePeers": 0}


def test_the_front_page_is_one_line_that_names_the_junction(server: Server) -> None:
    status, answered, text = ask(server, "/")
    assert status == 200
    assert answered.get_content_type() == "text/plain"
    assert text.startswith(f"Agent Junction {app.__version__}".encode())
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1


# --- What it withstands ------------------------------------------------------------


def resident(server: Server) -> int:
    """Return how many bytes of memory a server has, on Linux. Elsewhere it is 0."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])
    return 0


BODY_BYTES = 256 * 1024


def call_of(era: str, size: int) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a call whose body has this size, by blanks at its end."""
    body, headers = rpc(era, "known_hosts", {})
    return body + b" " * (size - len(body)), headers


@both_eras
@pytest.mark.parametrize(
    ("size", "status"), [(BODY_BYTES, 200), (BODY_BYTES + 1, 413), (11 * BODY_BYTES, 413)]
)
def test_a_body_of_256_kib_is_taken_and_one_byte_more_is_not(
    server: Server, era: str, size: int, status: int
) -> None:
    assert ask(server, "/mcp", *call_of(era, size))[0] == status


@both_eras
@pytest.mark.parametrize(("more", "status"), [(b"", 200), (b" ", 413)])
def test_a_body_in_chunks_has_the_same_limit(
    server: Server, era: str, more: bytes, status: int
) -> None:
    body, headers = call_of(era, BODY_BYTES)
    half = BODY_BYTES // 2
    chunks = [chunk for chunk in (body[:half], body[half:], more) if chunk]
    assert ask(server, "/mcp", iter(chunks), headers)[0] == status


@both_eras
def test_a_message_of_32_kib_may_be_192_kib_of_json(server: Server, era: str) -> None:
    ann = Agent(server, era)
    bob = Agent(server, era)
    arguments = {"session_id": ann.session_id, "target_alias": bob.alias, "message": "HERE"}
    body, headers = rpc(era, "send_message", arguments)
    escaped = b"\\u0061" * 32_768
    assert len(escaped) == 192 * 1024
    status, _, text = ask(server, "/mcp", body.replace(b"HERE", escaped), headers)
    assert status == 200
    assert not answer_of(text)["result"]["isError"]
    assert bob.read() == ["a" * 32_768]


LONG_PARTS = {"a path": "/{}", "a header": "x: {}\r\n", "a name": "{}: x\r\n"}


def get_request(part: str, length: int) -> bytes:
    """Return a GET request with a long path or header, for a place that is not there."""
    long = LONG_PARTS[part].format("y" * length)
    path = "/elsewhere"
    lines = long
    if part == "a path":
        path = long
        lines = ""
    head = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{lines}\r\n"
    return head.encode()


def was_taken(answer: bytes) -> bool:
    """Whether a request for a place that is not there was not refused before."""
    refused = answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    taken = answer.startswith(b"HTTP/1.1 404 ")
    assert refused or taken, answer
    return taken


@pytest.mark.parametrize("part", LONG_PARTS)
@pytest.mark.parametrize(
    ("length", "is_taken"), [(16_000, True), (16_500, False), (66_000, False), (200_000, False)]
)
def test_a_head_above_16_kib_is_refused_even_in_one_packet(
    server: Server, part: str, length: int, is_taken: bool
) -> None:
    answer = receive(connect(server, get_request(part, length)))
    assert was_taken(answer) == is_taken


@pytest.mark.parametrize("part", LONG_PARTS)
@pytest.mark.parametrize(("length", "is_taken"), [(16_000, True), (16_500, False)])
def test_a_head_above_16_kib_is_refused_when_it_trickles(
    server: Server, part: str, length: int, is_taken: bool
) -> None:
    request = get_request(part, length)
    talk = connect(server)
    talk.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(ConnectionError):
        for start in range(0, len(request), 100):
            talk.sendall(request[start : start + 100])
    assert was_taken(receive(talk)) == is_taken


class SlowlyTaken(app.BoundedProtocol):
    """A connection whose client takes so much of its answer between two looks."""

    def __init__(self, taken: int) -> None:
        self.unsent = 1_000
        self.taken = taken
        self.is_closed = False
        self.transport: Any = self
        self.timeout_keep_alive_task = None
        self.cycle: Any = SimpleNamespace(more_body=False, response_complete=True)

    def get_write_buffer_size(self) -> int:
        self.unsent -= self.taken
        return self.unsent

    def abort(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(("taken", "is_closed"), [(0, True), (1, False)])
def test_a_client_that_takes_a_little_of_its_answer_is_not_closed(
    taken: int, is_closed: bool
) -> None:
    connection = SlowlyTaken(taken)
    for _ in range(3):
        connection.close_if_stuck()
    assert connection.is_closed == is_closed


def head_of(fields: int) -> bytes:
    """Return a head of so many fields, but for the blank line that ends it."""
    head = b"GET /elsewhere HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    return head + b"a:b\r\n" * (fields - 2)


@pytest.mark.parametrize(("fields", "is_taken"), [(100, True), (101, False)])
def test_a_head_of_more_than_100_fields_is_refused(
    server: Server, fields: int, is_taken: bool
) -> None:
    answer = receive(connect(server, head_of(fields) + b"\r\n"))
    assert was_taken(answer) == is_taken


def test_a_body_in_the_same_piece_does_not_hide_that_a_head_has_too_many_fields(
    server: Server,
) -> None:
    body = b"x" * 20_000
    head = head_of(100) + b"content-length: %d\r\n\r\n" % len(body)
    answer = receive(connect(server, head + body))
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_fields_behind_a_body_are_counted_as_well(server: Server) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    began = time.monotonic()
    answer = receive(connect(server, head + b"0\r\n" + b"a:b\r\n" * 100))
    assert b" 200 " not in answer
    assert time.monotonic() - began < app.STUCK_SECONDS


def test_a_head_of_more_than_100_fields_is_refused_before_it_ends(server: Server) -> None:
    began = time.monotonic()
    assert not was_taken(receive(connect(server, head_of(110))))
    assert time.monotonic() - began < app.STUCK_SECONDS


@both_eras
def test_a_long_body_in_the_packet_of_its_head_is_no_long_head(server: Server, era: str) -> None:
    body, headers = call_of(era, 100_000)
    headers["x-long"] = "y" * 15_000
    headers["connection"] = "close"
    answer = receive(connect(server, on_the_wire(body, headers)))
    assert answer.startswith(b"HTTP/1.1 200 ")


@both_eras
@pytest.mark.parametrize("blanks", [" ", " \t", "\t \t "])
@pytest.mark.parametrize(
    "name", ["accept", "content-type", "mcp-protocol-version", "mcp-method", "mcp-name"]
)
def test_blanks_behind_a_headers_value_are_no_part_of_it(
    altered: Server, era: str, name: str, blanks: str
) -> None:
    """The call is answered as usual, and not by FastMCP."""
    body, headers = rpc(era, "known_hosts", {})
    headers.setdefault(name, "known_hosts")
    headers[name] += blanks
    status, (_, result) = outcome(altered, body, headers)
    assert status == 200
    assert result["structuredContent"] == {"hosts": []}


def send_50_mb(talk: socket.socket) -> None:
    for _ in range(50):
        talk.sendall(b"y" * 1_000_000)


@pytest.mark.parametrize(
    "start",
    ["x: ", "\r\nfffffff\r\n", "\r\n1;x=", "\r\n0\r\nx: "],
    ids=["header", "body", "chunk extension", "trailer"],
)
def test_an_endless_request_is_cut_off_before_it_takes_memory(server: Server, start: str) -> None:
    before = resident(server)
    head = f"POST /mcp HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n{start}"
    with connect(server, head.encode()) as talk, pytest.raises(ConnectionError):
        send_50_mb(talk)
    assert resident(server) - before < 30_000_000


def test_unfinished_requests_are_closed_and_those_that_wait_or_rest_are_not(
    tuned: Server,
) -> None:
    """The junction looks for stuck connections each second here."""
    ann = Agent(tuned)
    bob = Agent(tuned, LEGACY)
    reading = bob.begin_read()
    resting = Line(ann)
    resting("list_peers", role="nobody's")
    whole = ann.request("list_peers")
    halves = []
    for _ in range(100):
        for part in (b"", whole[:50], whole[:-1]):
            halves.append(connect(tuned, part))
    assert ask(tuned, "/health")[0] == 200
    assert {receive(talk) for talk in halves} == {b""}
    with contextlib.closing(resting.talk):
        assert resting("send_message", target_alias=bob.alias, message="hello")["delivered"]
    assert b"hello" in receive(reading, b'"remaining":0')


def test_an_idle_connection_is_kept_for_longer_than_clients_keep_it(altered: Server) -> None:
    assert get(altered, "/keep_alive") == 120


UNFINISHED_BODY = on_the_wire(b"y" * 250_000, rpc(MODERN, "known_hosts", {})[1])[:200_000]
UNFINISHED_HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a:b\r\n" * 12_000


@linux_only
@pytest.mark.parametrize("request_", [UNFINISHED_BODY, UNFINISHED_HEAD], ids=["a body", "a head"])
def test_a_thousand_unfinished_requests_take_little_memory(
    guarded: Server, request_: bytes
) -> None:
    """None has the token, so no body is kept."""
    before = resident(guarded)
    with contextlib.ExitStack() as stack:
        for _ in range(1_000):
            talk = stack.enter_context(connect(guarded))
            talk.setblocking(False)
            with contextlib.suppress(OSError):
                talk.send(request_)
        assert ask(guarded, "/health")[0] == 200
        assert resident(guarded) - before < 30_000_000


HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


@both_eras
@pytest.mark.parametrize("comes_later", [False, True], ids=["in one packet", "later"])
def test_a_request_behind_a_call_that_waits_ends_the_connection(
    tuned: Server, era: str, comes_later: bool
) -> None:
    bob = Agent(tuned, era)
    read = bob.request("read_messages", wait_seconds=60)
    if comes_later:
        talk = connect(tuned, read)
        until(bob.waits)
        talk.sendall(HEALTH)
    else:
        talk = connect(tuned, read + HEALTH)
    answer = receive(talk)
    assert b'"messages"' not in answer
    assert b'"status"' not in answer
    until(lambda: not bob.waits())


@both_eras
def test_requests_that_come_one_after_the_other_share_a_connection(
    server: Server, era: str
) -> None:
    line = Line(Agent(server, era))
    with contextlib.closing(line.talk):
        for _ in range(3):
            assert line("read_messages")["messages"] == []


NAMES = TOOLS["read_messages"].arguments.split()
KEYS = st.sampled_from(["jsonrpc", "id", "method", "params", "_meta", *NAMES])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=10
)
DEEP = b'{"jsonrpc":"2.0","id":1,"method":"ping","params":' + b"[" * 50_000 + b"]" * 50_000 + b"}"


def assert_is_answered(server: Server, body: bytes, headers: dict[str, str]) -> None:
    status, _, text = ask(server, "/mcp", body, headers, "POST")
    assert status < 500
    assert b'"code":-32603' not in text, "an internal error"


@both_eras
@given(body=st.binary() | ANYTHING)
@example(body=DEEP)
@settings(max_examples=80, deadline=None)
def test_any_body_gets_an_answer_below_500(tuned: Server, era: str, body: Any) -> None:
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    assert_is_answered(tuned, body, rpc(era, "register", {})[1])


@both_eras
@given(tool=st.sampled_from([*TOOLS]), arguments=st.dictionaries(KEYS, ANYTHING))
@example(tool="register", arguments={"repo": "\ud800"})
@settings(max_examples=80, deadline=None)
def test_any_arguments_get_an_answer_below_500(
    tuned: Server, era: str, tool: str, arguments: dict[str, Any]
) -> None:
    assert_is_answered(tuned, *rpc(era, tool, arguments))


# --- The process -------------------------------------------------------------------


@linux_only
def test_the_process_is_closed_to_others_of_its_user_and_leaves_no_core(tuned: Server) -> None:
    limits = Path(f"/proc/{tuned.process.pid}/limits").read_text()
    assert get(tuned, "/inside")["dumpable"] == 0
    assert re.search(r"core file size +0 +0", limits)


def test_neither_dotenv_nor_variables_of_libraries_nor_a_locale_change_anything(
    tmp_path: Path,
) -> None:
    library = {"FASTMCP_STREAMABLE_HTTP_PATH": "/elsewhere", "fastmcp_log_level": "x"}
    telemetry = {"OTEL_PROPAGATORS": "b3", "OTEL_PYTHON_TRACER_PROVIDER": "x"}
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    variables: dict[str, Any] = {**library, **telemetry, **ascii_only}
    lines = "".join(f"{name}={value}\n" for name, value in library.items())
    (tmp_path / ".env").write_text(lines)
    with running(code=f"import os; os.chdir({str(tmp_path)!r})", **variables) as there:
        for era in ERAS:
            assert Agent(there, era).read() == []
        assert there.stops_in_silence()


# As another library's carelessness might have it.
CARELESS = """
import junction, logging
logging.basicConfig(level=1)
for name in list(logging.root.manager.loggerDict):
    logging.getLogger(name).setLevel(1)
"""


def test_nothing_secret_and_no_traceback_is_in_any_output() -> None:
    """Not with all loggers at DEBUG, and whatever calls come."""
    with running(code=CARELESS) as there:
        agents = [Agent(there, era) for era in ERAS]
        for agent in agents:
            make_all_kinds_of_calls(agent, agents[0].alias)
            reset(agent.begin_read())
            until(lambda: waiting(there) == [])
        for agent in agents:
            assert agent.session_id not in there.said()
        assert there.stops_in_silence()
        assert "swordfish" not in there.said()


def make_all_kinds_of_calls(agent: Agent, alias: str) -> None:
    """Make good calls, bad ones and broken ones, all with a secret in them."""
    calls: list[tuple[str, Json]] = [
        ("send_message", {"target_alias": alias, "message": "swordfish"}),
        ("send_message", {"target_alias": alias, "message": ["swordfish"]}),
        ("send_message", {"target_alias": "swordfish", "message": "swordfish"}),
        ("read_messages", {"session_id": "swordfish"}),
        ("swordfish", {}),
    ]
    headers = {"authorization": "Bearer swordfish", "connection": "close"}
    for tool, arguments in calls:
        request = agent.request(tool, headers=headers, **arguments)
        no_json = request.replace(b"{", b"[", 1)
        for sent in (request, no_json):
            answer = receive(connect(agent.server, sent))
            assert answer.startswith(b"HTTP/1.1 ")
        for go in (reset, socket.socket.close):
            go(connect(agent.server, request[:-5]))


@pytest.fixture
def full_pipe(tmp_path: Path) -> Iterator[Path]:
    """A pipe that takes no more."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, bytes(4096))
    yield path
    os.close(pipe)


@linux_only
@pytest.mark.parametrize("where", [">/dev/full", ">{}", ">{} 2>&1"])
def test_an_output_that_takes_nothing_neither_stops_nor_holds_up_the_server(
    where: str, full_pipe: Path
) -> None:
    with running(where=where.format(full_pipe)) as there:
        ann = Agent(there)
        bob = Agent(there)
        ann.send(bob.alias, "hello")
        bob("disconnect")
        assert there.stops_in_silence()


def test_only_the_latest_lines_are_kept_for_an_output_that_takes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "announced", app.announced.copy())
    lines = [str(number) for number in range(2_000)]
    for line in lines:
        app.announce(line)
    assert list(app.announced) == lines[-1_000:]


@pytest.fixture
def deaf_terminal() -> Iterator[str]:
    """The path of a terminal that nobody reads, as when it was stopped by Ctrl-S."""
    ours, theirs = os.openpty()
    yield os.ttyname(theirs)
    os.close(ours)
    os.close(theirs)


@linux_only
def test_a_terminal_that_nobody_reads_neither_stops_nor_holds_up_the_server(
    deaf_terminal: str,
) -> None:
    with running(where=f">{deaf_terminal}") as there:
        for _ in range(50):
            ann = Agent(there, repo="x" * 200, role="y" * 200)
            ann("disconnect")
        assert there.stops_in_silence()


ENDLESS_SWEEP = """
import asyncio, junction

async def sweep(here):
    while True:
        await asyncio.sleep(0)

junction.Junction.sweep = sweep
"""


def test_a_sweep_that_takes_long_holds_up_no_stop() -> None:
    with running(code=ENDLESS_SWEEP) as there:
        Agent(there)
        assert there.stops_in_silence()


# The tests themselves may run under nohup, and then all that they start ignores SIGHUP.
HEEDS_SIGHUP = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"


@posix_only
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_it_and_it_says_how_many_messages_went(how: signal.Signals) -> None:
    with running(code=HEEDS_SIGHUP) as there:
        ann = Agent(there)
        bob = Agent(there, LEGACY)
        for text in ("one", "two", "three"):
            ann.send(bob.alias, text)
        talk = ann.begin_read()
        assert there.stops_in_silence(how)
        assert b"shutting down" in receive(talk)
        assert there.said().count("3 unread") == 1


@posix_only
def test_a_stop_answers_500_waiting_calls_in_time() -> None:
    with running() as there:
        bobs = [Agent(there, era) for era in ERAS * 250]
        reads = [bob.request("read_messages", wait_seconds=600) for bob in bobs]
        talks = [connect(there, read) for read in reads]
        until(lambda: len(waiting(there)) == 500)
        assert there.stops_in_silence()
        for talk in talks:
            receive(talk, b"shutting down")


FAILING_SWEEP = """
import junction

sweep = junction.Junction.sweep
sweeps = []

async def fail_three_times(here):
    sweeps.append(here)
    if len(sweeps) <= 3:
        raise RuntimeError("swordfish")
    await sweep(here)

junction.Junction.sweep = fail_three_times
"""


def test_a_sweep_that_fails_does_not_end_sweeping() -> None:
    options = ["--session-timeout-ms", "50", "--sweep-interval-ms", "20"]
    with running(*options, code=FAILING_SWEEP) as there:
        gone = Agent(there)
        until(lambda: f"{gone.alias} fell idle" in there.said())
        assert re.search("sweep.* failed: RuntimeError", there.said())
        assert "swordfish" not in there.said()


# --- What /events tells ------------------------------------------------------------


class Watch:
    """A connection to /events, and what came over it."""

    def __init__(self, server: Server) -> None:
        self.talk = connect(server, WATCH)
        self.text = b""
        self.wait_for("snapshot")

    def wait_for(self, kind: str, times: int = 1) -> list[Any]:
        """Return all events so far, when so many of a kind have come."""
        deadline = time.monotonic() + 20
        while True:
            events = all_events(self.text)
            if sum(event["event"] == kind for event in events) >= times:
                return events
            assert time.monotonic() < deadline, self.text
            more = self.talk.recv(65_536)
            assert more, self.text
            self.text += more


@pytest.fixture
def watch(altered: Server) -> Iterator[Watch]:
    """Somebody who has begun to watch the altered server."""
    watching = Watch(altered)
    with watching.talk:
        yield watching


SEEN = {"alias", "repo", "task", "role", "connected_at", "idle_seconds", "waiting"}


def test_the_first_event_is_a_snapshot(server: Server) -> None:
    bob = Agent(server, repo="api", role="backend")
    talk = connect(server, WATCH)
    with talk:
        text = hear(talk, b"\n\n", 1)
    assert b"content-type: text/event-stream; charset=utf-8" in text
    assert b"event: snapshot\ndata: {" in text
    snapshot = all_events(text)[0]
    assert snapshot.keys() == {"event", "timestamp", "mode", "uptime", "peers"}
    assert snapshot["mode"] == "localhost"
    (info,) = [peer for peer in snapshot["peers"] if peer["alias"] == bob.alias]
    assert info.keys() == SEEN | {"unread"}
    assert info["repo"] == "api"
    assert info["role"] == "backend"


def test_snapshots_come_again_and_show_who_is_here(altered: Server, watch: Watch) -> None:
    bob = Agent(altered)
    *_, latest = watch.wait_for("snapshot", 4)
    for event in watch.wait_for("snapshot", 4):
        if event["event"] == "snapshot":
            latest = event
    assert bob.alias in [peer["alias"] for peer in latest["peers"]]


def test_a_snapshot_is_at_most_1_s_old_up_to_200_peers_and_5_s_above() -> None:
    assert app.SNAPSHOT_SECONDS <= 1
    assert app.QUICK_SNAPSHOT_PEERS >= 200
    assert app.SLOW_SNAPSHOT_SECONDS <= 5


QUICK_UP_TO_ONE = """
import junction

junction.SNAPSHOT_SECONDS = 0
junction.QUICK_SNAPSHOT_PEERS = 1
junction.SLOW_SNAPSHOT_SECONDS = 3_600
"""


def test_large_snapshots_come_less_often() -> None:
    with running(code=QUICK_UP_TO_ONE) as there:
        watch = Watch(there)
        ann = Agent(there)
        watch.wait_for("snapshot", 3)
        bob = Agent(there)
        watch.wait_for("peer_joined", 2)
        # Each of these is told some time after the one before.
        for number in range(1, 5):
            ann.send(bob.alias, "hello")
            told = watch.wait_for("message_sent", number)
        last_kinds = [event["event"] for event in told[-3:]]
        assert last_kinds == ["message_sent"] * 3
        bob("disconnect")
        before = [event["event"] for event in told].count("snapshot")
        watch.wait_for("snapshot", before + 2)
        watch.talk.close()


@both_eras
def test_events_tell_who_came_wrote_read_and_left(altered: Server, watch: Watch, era: str) -> None:
    ann = Agent(altered, era, repo="web", role="frontend")
    bob = Agent(altered, era)
    ann.send(bob.alias, "swordfish")
    bob.read()
    ann("disconnect")
    told = [event for event in watch.wait_for("peer_left") if event["event"] != "snapshot"]
    for event in told:
        assert datetime.fromisoformat(event.pop("timestamp")).utcoffset() == timedelta(0)
    hers, his, sent, read, left = told
    assert hers.keys() == SEEN | {"event"}
    assert hers["event"] == "peer_joined"
    assert hers["alias"] == ann.alias
    assert hers["repo"] == "web"
    assert his["event"] == "peer_joined"
    assert his["alias"] == bob.alias
    assert sent == {
        "event": "message_sent",
        "from": ann.alias,
        "to": [bob.alias],
        "to_count": 1,
        "bytes": 9,
    }
    assert read == {"event": "messages_read", "alias": bob.alias, "count": 1}
    assert left == {
        "event": "peer_left",
        "alias": ann.alias,
        "role": "frontend",
        "why": "left",
        "erased": 0,
    }


@both_eras
def test_neither_events_nor_the_log_tell_a_text_or_a_session_id(
    altered: Server, watch: Watch, era: str
) -> None:
    ann = Agent(altered, era)
    bob = Agent(altered, era)
    ann.send(bob.alias, "swordfish")
    assert bob.read() == ["swordfish"]
    assert bob.read(again=True) == ["swordfish"]
    ann.send(bob.alias, "swordfish")
    bob("disconnect")
    watch.wait_for("peer_left")
    until(lambda: f"{bob.alias} left" in altered.said())
    for told in (watch.text.decode(), altered.said()):
        assert ann.alias in told
        assert "swordfish" not in told
        assert ann.session_id not in told
        assert bob.session_id not in told


@both_eras
def test_a_visitor_comes_and_goes_unnoticed(altered: Server, watch: Watch, era: str) -> None:
    bob = Agent(altered, era)
    visitor = Agent(altered, era, role="shell")
    visitor.send(bob.alias, "hello")
    visitor("disconnect")
    bob("disconnect")
    told = watch.wait_for("peer_left")
    moves = [event for event in told if event["event"] in ("peer_joined", "peer_left")]
    assert [event["alias"] for event in moves] == [bob.alias, bob.alias]
    until(lambda: f"{bob.alias} left" in altered.said())
    assert f"{visitor.alias} wrote to {bob.alias}" in altered.said()
    assert f"{visitor.alias} joined" not in altered.said()
    assert f"{visitor.alias} left" not in altered.said()


def test_the_stop_is_the_last_that_a_watcher_is_told() -> None:
    """Even where a snapshot is due all the time."""
    with running(code="import junction; junction.SNAPSHOT_SECONDS = 0") as there:
        watch = Watch(there)
        watch.wait_for("snapshot", 2)
        there.process.send_signal(signal.SIGTERM)
        rest = receive(watch.talk)
        last = all_events(watch.text + rest)[-1]
        assert last.pop("timestamp")
        assert last == {"event": "junction_stopped", "erased": 0}
        assert rest.endswith(b"\r\n0\r\n\r\n")
        assert there.process.wait(20) == 0


@linux_only
def test_a_watcher_that_never_reads_is_dropped_and_holds_up_nobody(tuned: Server) -> None:
    usual = get(tuned, "/flood")
    before = resident(tuned)
    with connect(tuned, WATCH, deaf=True) as talk:
        assert get(tuned, "/flood") < 5 * usual + 1
        assert resident(tuned) - before < 30_000_000
        until(lambda: get(tuned, "/inside")["watchers"] == 0)
        until(lambda: get(tuned, "/inside")["connections"] == 1)
        assert receive(talk).count(b"event: message_sent") < 10_000


def test_a_watcher_that_is_too_far_behind_is_dropped_rather_than_told_half(
    altered: Server, watch: Watch
) -> None:
    assert get(altered, "/burst") == "done"
    rest = receive(watch.talk)  # which ends when the connection does
    assert b"event: burst" not in rest


def test_a_watcher_beyond_the_16th_gets_503_until_one_goes(tuned: Server) -> None:
    until(lambda: get(tuned, "/inside")["watchers"] == 0)
    with contextlib.ExitStack() as stack:
        watches = [Watch(tuned) for _ in range(16)]
        for watch in watches:
            stack.enter_context(watch.talk)
        refusal = receive(connect(tuned, WATCH), b"16 watchers")
        assert refusal.startswith(b"HTTP/1.1 503 ")
        watches[7].talk.close()
        until(lambda: ask(tuned, "/events", method="HEAD")[0] == 200)
    until(lambda: get(tuned, "/inside")["watchers"] == 0)


# --- The command line ---------------------------------------------------------------


class Ended(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str

    def line(self, code: int) -> str:
        """Return the one line that is all a failed command says."""
        assert self.code == code, self
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("agent-junction: ")
        return self.err


Cli = Callable[..., Ended]


def too_late(*_: object) -> None:
    raise AssertionError("the command has not ended within 30 s")


@pytest.fixture
def cli(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Iterator[Cli]:
    """Run agent-junction in this process, ten times as fast as in one of its own.

    A command that would serve, or that does not end, fails the test.
    """
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setattr(app, "harden", Mock())
    monkeypatch.setattr(app, "run", Mock(side_effect=AssertionError("it serves")))

    def command(*arguments: str, stdin: bytes = b"", at: str = "", **variables: str) -> Ended:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["agent-junction", *arguments])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            patch.setenv("COLUMNS", "80")
            patch.setenv("JUNCTION_URL", at or server.url)
            for name, value in variables.items():
                patch.setenv(name, value)
            signal.signal(signal.SIGALRM, too_late)
            signal.alarm(30)
            with pytest.raises(SystemExit) as ended:
                app.main()
            signal.alarm(0)
        out, err = capfdbinary.readouterr()
        return Ended(int(ended.value.code or 0), out.decode(), err.decode())

    yield command
    signal.alarm(0)
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


class Shell(contextlib.AbstractContextManager["Shell"]):
    """agent-junction in a process of its own, on a terminal or on a pipe.

    `said` is all that it has written. Its commands end with it.
    """

    def __init__(
        self, *arguments: str, terminal: bool = False, code: str = "", **variables: str
    ) -> None:
        self.ours, theirs = os.openpty() if terminal else os.pipe()
        usual = environment(TERM="xterm", LINES="24")
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "PYTHONUNBUFFERED"):
            usual.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{code}\nimport junction; junction.main()", *arguments],
            env=usual | variables,
            stdin=theirs if terminal else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.heard = b""
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def listen(self) -> None:
        with contextlib.suppress(OSError):  # a terminal that nobody has open any more
            while data := os.read(self.ours, 65_536):
                self.heard += data

    @property
    def said(self) -> str:
        return self.heard.decode("utf-8", "replace")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.end()
        os.close(self.ours)

    def plainly(self) -> str:
        """Return what it has said, without what only steers a terminal."""
        return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", self.said).replace("\r\n", "\n")

    def hear(self, pattern: str) -> str:
        """Wait until it has said this, and return the first group, or all of it."""
        until(lambda: re.search(pattern, self.plainly()) is not None)
        found = re.search(pattern, self.plainly())
        assert found
        return found[min(1, found.re.groups)]

    def end(self, how: signal.Signals | None = None) -> int:
        """Return its exit code, after this signal if any."""
        if how:
            self.process.send_signal(how)
        code = self.process.wait(20)
        self.listener.join(20)
        return code


@contextlib.contextmanager
def answering(handle: Callable[[Any], None]) -> Iterator[str]:
    """Give the address of a server that does this with each connection."""
    members = {"handle": handle, "timeout": 20}
    handler = type("Handler", (socketserver.StreamRequestHandler,), members)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as there:
        threading.Thread(target=there.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{there.server_address[1]}"
        finally:
            there.shutdown()


@contextlib.contextmanager
def other_http(body: str, kind: str = "application/json", status: int = 200) -> Iterator[str]:
    """Give the address of an HTTP server that is no junction, and answers this."""

    def handle(self: Any) -> None:
        while self.rfile.readline().strip():
            pass
        head = f"HTTP/1.0 {status} Some words\r\ncontent-type: {kind}\r\n\r\n"
        self.wfile.write(f"{head}{body}\n\n".encode())

    with answering(handle) as address:
        yield address


@contextlib.contextmanager
def meanwhile(story: Callable[[], object]) -> Iterator[None]:
    """Let this happen beside a command in this process, and fail if it fails."""
    failures: list[Exception] = []

    def tell() -> None:
        try:
            story()
        except Exception as error:
            failures.append(error)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    yield
    teller.join(60)
    assert not teller.is_alive()
    for failure in failures:
        raise failure


# A program for a shell. It ends when a file beside it says so, or after some 20 s.
UNTIL_IT_MAY_END = """
tries=0
while [ ! -e "${0%/*}/may-end" ] && [ "$((tries += 1))" -lt 400 ]; do /bin/sleep 0.05; done
"""

# The clients of agents, and their own commands, word for word.

ADD = {
    "claude": "claude mcp add --scope user --transport http junction {url}",
    "codex": "codex mcp add junction --url {url}",
    "gemini": "gemini mcp add --scope user --transport http --timeout 3700000 --trust "
    "junction {url}",
    "opencode": "opencode mcp add junction --url {url}",
    "copilot": "copilot mcp add --transport http junction {url}",
}
HEADER = " --header 'Authorization: Bearer ${JUNCTION_TOKEN}'"
CARRIER = {
    "claude": HEADER,
    "codex": " --bearer-token-env-var JUNCTION_TOKEN",
    "gemini": HEADER,
    "opencode": " --header 'Authorization=Bearer {env:JUNCTION_TOKEN}'",
    "copilot": HEADER,
}
# These two refuse to replace an entry.
FIRST = {
    "claude": "claude mcp remove junction -s user",
    "copilot": "copilot mcp remove junction",
}
REMOVE = FIRST | {
    "codex": "codex mcp remove junction",
    "gemini": "gemini mcp remove --scope user junction",
}


def add_command(name: str, url: str, token: str = "") -> str:
    command = ADD[name].format(url=url)
    if token:
        command += CARRIER[name]
    return command


def connect_commands(url: str, token: str = "", names: tuple[str, ...] = tuple(ADD)) -> list[str]:
    """Return the commands that connect these clients, in order."""
    commands = []
    for name in names:
        if name in FIRST:
            commands.append(FIRST[name])
        commands.append(add_command(name, url, token))
    return commands


def as_called(commands: list[str]) -> list[str]:
    """Return commands as stand-ins note them."""
    return ["|".join([*shlex.split(command), ""]) for command in commands]


# --- The command line: the greeting


def pasted(text: str) -> list[str]:
    """Paste the clients' commands of a greeting into a shell, and return their arguments."""
    names = "|".join(ADD)
    commands = re.findall(rf"^  ((?:{names}) (?:.*\\\n)*.*)$", text, re.MULTILINE)
    stubs = [f"{name}() {{ printf '%s|' {name} \"$@\"; echo; }}" for name in ADD]
    shell = ["sh", "-c", "\n".join(stubs + commands)]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=20)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_greeting_begins_with_address_connect_line_and_what_to_tell_agents(
    server: Server,
) -> None:
    first, second, third, fourth, *_ = server.said().splitlines()
    running_at = f"Agent Junction {app.__version__} is running at {server.url}"
    assert first == f"{running_at} (Ctrl-C stops it; messages are gone then)"
    connect_line = f"  Connect your clients:  agent-junction connect --url {server.url}"
    assert second.partition("        (here: ")[0] == connect_line
    assert third == 'Then tell each agent: "Register with the junction, then wait for messages."'
    assert fourth == ""


def test_the_connect_line_names_the_clients_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("copilot", "claude"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    text = app.first_steps(app.DEFAULT_URL, "")
    assert "agent-junction connect        (here: claude, copilot)\n" in text


def test_at_the_default_address_nothing_has_to_be_said_about_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = app.first_steps(app.DEFAULT_URL, "")
    assert "  Connect your clients:  agent-junction connect\n" in text
    assert "export" not in app.client_settings(app.DEFAULT_URL, "", False, "")


@posix_only
@pytest.mark.parametrize("kind", ["server", "guarded", "tls_server", "lan_server"])
def test_each_clients_command_can_be_pasted_and_carries_a_token_by_its_variable(
    kind: str, request: pytest.FixtureRequest
) -> None:
    text = request.getfixturevalue(kind).said()
    (url,) = re.findall(r"running at (\S+) ", text)
    token = "" if kind == "server" else TOKEN
    assert pasted(text) == as_called([add_command(name, url, token) for name in ADD])


@pytest.mark.parametrize("kind", ["server", "guarded"])
def test_the_greeting_has_the_entry_for_a_file_mcp_json(
    kind: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue(kind)
    (text,) = re.findall(r"^In a \.mcp\.json: (.*)$", server.said(), re.MULTILINE)
    entry = {"type": "http", "url": server.url}
    if kind == "guarded":
        entry["headers"] = {"Authorization": "Bearer ${JUNCTION_TOKEN}"}
    assert json.loads(text) == {"mcpServers": {"junction": entry}}


def test_the_greeting_never_shows_a_given_token_but_says_that_it_is_needed(
    guarded: Server,
) -> None:
    assert TOKEN not in guarded.said()
    assert "JUNCTION_TOKEN" in guarded.said().partition("\n  claude ")[0]


def test_with_a_certificate_of_ones_own_the_greeting_names_it_as_the_authority(
    tls_server: Server, certificate: str
) -> None:
    text = tls_server.said()
    assert f"  agent-junction connect --url {tls_server.url} --ca {certificate}" in text
    exports = f"\n  export JUNCTION_URL={tls_server.url}\n  export JUNCTION_CA={certificate}\n"
    assert exports in text


def certificate_file(folder: Path, subject: str, issuer: str) -> str:
    """Write a certificate with these names, and for no address. Return the file's path."""
    key = ec.generate_private_key(ec.SECP256R1())
    whose = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    by = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(by, whose, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now)
        .sign(key, hashes.SHA256())
    )
    file = folder / "cert.pem"
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return str(file)


@pytest.mark.parametrize(("issuer", "is_own"), [("desk", True), ("an authority", False)])
def test_only_a_certificate_that_signed_itself_is_its_own_authority(
    tmp_path: Path, issuer: str, is_own: bool
) -> None:
    assert app.is_its_own_authority(certificate_file(tmp_path, "desk", issuer)) == is_own


def test_the_greeting_has_the_exports_that_other_commands_need(server: Server) -> None:
    assert f"\n  export JUNCTION_URL={server.url}\n" in server.said()
    assert "JUNCTION_TOKEN" not in server.said()


def test_the_greeting_says_mode_health_and_known_hosts(tls_server: Server) -> None:
    base = tls_server.url.removesuffix("/mcp")
    assert tls_server.said().partition("\nMode: ")[2].splitlines()[:4] == [
        f"localhost. Health: {base}/health",
        "Known host: desk http://10.0.0.7:4200/mcp",
        "Known host: attic http://[fd00::1]:4300/mcp",
        "Known host: far https://far.example:4200/mcp",
    ]


def test_lan_mode_makes_a_token_shows_it_once_and_wants_it(lan_server: Server) -> None:
    (made,) = re.findall(r"\n  export JUNCTION_TOKEN=(\S+)\n", lan_server.said())
    assert re.fullmatch(r"[\w-]{22,}", made)  # 22 of these are 132 bits
    assert lan_server.said().count(made) == 1
    body, headers = rpc(MODERN, "register", {})
    assert ask(lan_server, "/mcp", body, headers)[0] == 401
    headers["authorization"] = f"Bearer {made}"
    assert ask(lan_server, "/mcp", body, headers)[0] == 200


def test_lan_mode_without_tls_warns_and_names_both_ways_out(lan_server: Server) -> None:
    text = lan_server.said()
    assert "\nMode: lan. " in text
    assert "messages and the token cross the network in the clear" in text
    assert "--tls-cert and --tls-key" in text
    port = lan_server.port
    assert f"\n  ssh -L {port}:127.0.0.1:{port} " in text


@pytest.mark.parametrize("kind", ["server", "tls_server"])
def test_where_nothing_is_wrong_the_greeting_warns_of_nothing(
    kind: str, request: pytest.FixtureRequest
) -> None:
    text = request.getfixturevalue(kind).said()
    assert "in the clear" not in text
    assert "does not cover" not in text


def test_a_certificate_that_does_not_cover_the_address_is_said(certificate: str) -> None:
    files = ["--tls-cert", certificate, "--tls-key", certificate]
    with running("--host", "0.0.0.0", *files) as there:
        text = there.said()
    (address,) = re.findall(r"running at https://(\S+):\d+/mcp ", text)
    assert f"\nThe certificate does not cover {address}, so clients will refuse it." in text
    assert "in the clear" not in text


def test_a_certificate_without_addresses_covers_none(tmp_path: Path) -> None:
    file = certificate_file(tmp_path, "127.0.0.1", "127.0.0.1")
    assert not app.is_covered("127.0.0.1", file)


class Greeting(NamedTuple):
    """What a server with a token says at first, on a terminal."""

    columns: int
    url: str
    said: str
    plain: str  # without what only steers the terminal


def greeting(columns: int, **variables: str) -> Greeting:
    port = free_port()
    variables |= {"JUNCTION_TOKEN": TOKEN, "COLUMNS": str(columns)}
    with Shell("--port", str(port), terminal=True, **variables) as shell:
        shell.hear(r"Health:\s+\S+/health\n")
    return Greeting(columns, f"http://127.0.0.1:{port}/mcp", shell.said, shell.plainly())


@pytest.fixture(scope="session", params=[40, 80, 200])
def on_terminal(request: pytest.FixtureRequest) -> Greeting:
    return greeting(request.param)


@posix_only
def test_on_a_terminal_the_greeting_is_wrapped_on_words(
    on_terminal: Greeting, guarded: Server
) -> None:
    text = on_terminal.plain.partition("/health\n")[0]
    for line in text.splitlines():
        is_one_word = re.fullmatch(r" *('.*'|\S+)( \\)?", line)
        assert len(line) <= on_terminal.columns or is_one_word
    base = on_terminal.url.removesuffix("/mcp")
    unwrapped = guarded.said().replace(guarded.url.removesuffix("/mcp"), base)
    words = unwrapped.partition("/health\n")[0].split()
    assert text.replace(" \\\n", "\n").split() == words


@posix_only
def test_on_a_terminal_wrapped_commands_can_be_pasted(on_terminal: Greeting) -> None:
    commands = [add_command(name, on_terminal.url, TOKEN) for name in ADD]
    assert pasted(on_terminal.plain) == as_called(commands)


@posix_only
def test_on_a_terminal_the_wrapped_json_can_be_pasted(on_terminal: Greeting) -> None:
    text = on_terminal.plain.partition(".mcp.json: ")[2]
    entry, _ = json.JSONDecoder().raw_decode(text.strip())
    headers = entry["mcpServers"]["junction"]["headers"]
    assert headers == {"Authorization": "Bearer ${JUNCTION_TOKEN}"}


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7])(?:;\d+)*m")


@posix_only
def test_on_a_terminal_the_greeting_is_coloured(on_terminal: Greeting) -> None:
    assert COLOUR.search(on_terminal.said)


@posix_only
@pytest.mark.parametrize("variable", ["NO_COLOR=1", "TERM=dumb"])
def test_a_terminal_without_colours_gets_none(variable: str) -> None:
    name, _, value = variable.partition("=")
    said = greeting(80, **{name: value}).said
    assert "is running at" in said
    assert not COLOUR.search(said)


def test_elsewhere_the_greeting_is_neither_wrapped_nor_coloured(guarded: Server) -> None:
    assert "\x1b" not in guarded.said()
    assert "\\\n" not in guarded.said()
    assert max(map(len, guarded.said().splitlines())) > 100  # COLUMNS is 80


# --- The command line: options of the server


BAD_NUMBERS = "x -1 0 1.5 1e3 ٣ 0x10 1_000 30m 99999999999999999999 65536"
BAD_VALUES = {
    "port": BAD_NUMBERS,
    "session-timeout-ms": "30m 99999999999",
    "sweep-interval-ms": "30m 99999999999",
    "host": "no-such-host.invalid 256.1.1.1 192.0.2.1 [::1]",
    "known-hosts": "desk desk= =10.0.0.1 desk=nowhere.example desk=10.0.0.256 desk=fd00::1",
    "allowed-hosts": "* *.local desk.local:4200 http://desk.local",
    "tls-cert": "/no/such/file",
    "tls-key": "/no/such/file",
}
QUOTED = [(option, value) for option, values in BAD_VALUES.items() for value in values.split()]


@pytest.mark.parametrize(("option", "value"), QUOTED)
def test_a_bad_value_stops_the_start_with_its_option_and_itself(
    cli: Cli, option: str, value: str
) -> None:
    line = cli(f"--{option}={value}").line(2)
    assert f"--{option}" in line
    assert repr(value) in line


@pytest.mark.parametrize("option", BAD_VALUES)
def test_a_bad_value_that_came_by_a_variable_is_said_with_that(cli: Cli, option: str) -> None:
    variable = f"JUNCTION_{option.upper().replace('-', '_')}"
    value = BAD_VALUES[option].split()[0]
    line = cli(**{variable: value}).line(2)
    assert variable in line
    assert repr(value) in line


BAD_HOSTS = [
    ("desk=10.0.0.1,desk=10.0.0.2", "'desk' is listed twice"),
    ("desk=10.0.0.1:0", "'0'"),
    ("desk=https://far.example:65536", "'65536'"),
    (",".join(f"desk{number}=10.0.0.1" for number in range(1_000)), "1000 hosts"),
]


@pytest.mark.parametrize(("value", "part"), BAD_HOSTS, ids=["twice", "port", "https", "many"])
def test_bad_known_hosts_stop_the_start_with_what_is_wrong(cli: Cli, value: str, part: str) -> None:
    line = cli("--known-hosts", value).line(2)
    assert "--known-hosts" in line
    assert part in line


@pytest.mark.parametrize("token", ["short", "x" * 15, "sixteen letters!", "ü" * 16, "x" * 4_097])
def test_of_an_unfit_token_only_its_length_is_told(cli: Cli, token: str) -> None:
    line = cli(JUNCTION_TOKEN=token).line(2)
    assert "JUNCTION_TOKEN" in line
    assert f"{len(token)} characters" in line
    assert token not in line


def test_an_unfit_token_that_came_by_the_option_is_said_with_that(cli: Cli) -> None:
    line = cli("--token", "swordfish").line(2)
    assert "--token" in line
    assert "swordfish" not in line


def test_an_empty_address_stops_the_start(cli: Cli) -> None:
    assert "''" in cli("--host=").line(2)


@pytest.mark.parametrize(("present", "missing"), [("cert", "key"), ("key", "cert")])
def test_one_tls_file_without_the_other_stops_the_start_and_names_both(
    cli: Cli, certificate: str, present: str, missing: str
) -> None:
    line = cli(f"--tls-{present}", certificate).line(2)
    assert repr(certificate) in line
    assert f"--tls-{missing}" in line
    assert f"JUNCTION_TLS_{missing.upper()}" in line
    assert "''" not in line


def test_a_tls_file_that_does_not_fit_stops_the_start(cli: Cli, certificate: str) -> None:
    line = cli("--tls-key", certificate, "--tls-cert", __file__).line(2)
    assert repr(__file__) in line


def test_a_taken_port_is_said_and_that_a_junction_has_it(cli: Cli, server: Server) -> None:
    line = cli("--port", str(server.port)).line(1)
    assert str(server.port) in line
    assert "A junction answers there" in line


@pytest.mark.parametrize("answer", ["hi", "true"])
def test_a_port_taken_by_something_else_is_said(cli: Cli, answer: str) -> None:
    with other_http(answer) as address:
        port = address.rpartition(":")[2]
        line = cli("--port", port).line(1)
    assert port in line
    assert "unction answers" not in line


# --- The command line: help, and the log


COMMANDS = ["serve", "connect", "peers", "watch", "ring", "send", "read"]


def test_the_version_is_shown_by_its_option_before_anything_else(cli: Cli) -> None:
    expected = Ended(0, f"agent-junction {app.__version__}\n", "")
    assert cli("--version") == expected
    assert cli("--version", "peers") == expected


def test_help_lists_every_command_and_the_options_of_the_server(cli: Cli) -> None:
    text = cli("--help")
    assert text.code == 0
    assert text == cli("-h")
    listed = text.out.partition("Commands:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+) ", listed, re.MULTILINE)[:7] == COMMANDS
    for option in BAD_VALUES:
        assert f"--{option} " in text.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_commands_help_has_an_example_and_no_types(cli: Cli, command: str) -> None:
    text = cli(command, "--help").out
    assert f"Example: agent-junction {command.replace('serve', '--port')}" in text
    assert not re.search(r"<\w+>", text, re.ASCII)
    assert not re.search(r"\b(TEXT|INTEGER|FLOAT|PATH)\b", text)


def test_the_servers_help_names_the_variable_of_each_option(cli: Cli) -> None:
    text = " ".join(cli("serve", "--help").out.split())
    options = re.findall(r" --([a-z-]+) [A-Z]+ (.*?)(?= --|$)", text)
    assert {name for name, _ in options} == {*BAD_VALUES, "token"}
    for name, words in options:
        assert f"env var: JUNCTION_{name.upper().replace('-', '_')}" in words


def test_the_log_has_a_line_for_what_happens_and_none_for_visits() -> None:
    with running() as there:
        bob = Agent(there, LEGACY)
        ann = Agent(there, MODERN, repo="shop", role="ux")
        visitor = Agent(there, role="shell")
        visitor.send(bob.alias, "sword")
        visitor("disconnect")
        ann.send(bob.alias, "日本")
        ann.send("*", "to all")
        bob("disconnect")
        assert there.stops_in_silence()
        lines = re.findall(r"^\d\d:\d\d:\d\d (.*)$", there.said(), re.MULTILINE)
    assert lines == [
        f"{bob.alias} joined (no role, no repo)",
        f"{ann.alias} joined (ux, shop)",
        f"{visitor.alias} wrote to {bob.alias}, 5 bytes",
        f"{ann.alias} wrote to {bob.alias}, 6 bytes",
        f"{ann.alias} wrote to {bob.alias}, 6 bytes",
        f"{bob.alias} left, 3 unread erased",
        "the junction stopped, 1 unread erased",
    ]


def happening(event: str, **facts: Any) -> dict[str, Any]:
    return {"event": event, "timestamp": "2026-01-01T00:00:00+00:00", **facts}


def test_a_line_for_an_event_names_or_counts_those_it_is_about() -> None:
    idle = happening("peer_left", alias="wry-fox", why="fell idle", erased=2)
    assert app.in_words(idle).endswith(" wry-fox fell idle, 2 unread erased")
    sent = happening("message_sent", to=["a", "b"], to_count=300, bytes=7) | {"from": "wry-fox"}
    assert app.in_words(sent).endswith(" wry-fox wrote to 300 peers, 7 bytes")
    assert app.in_words(happening("snapshot", peers=[{}, {}])).endswith(" 2 here")


def test_an_event_of_a_newer_junction_is_a_line_with_its_name() -> None:
    assert app.in_words(happening("something_new")).endswith(" something_new")


# --- The command line: connecting clients


# It notes how it was called, and refuses where a file beside it has words for that.
STAND_IN = """#!/bin/sh
folder=${0%/*}
name=${0##*/}
printf '%s|' "$name" "$@" >> "$folder/calls"
echo >> "$folder/calls"
echo "$JUNCTION_TOKEN|$NODE_EXTRA_CA_CERTS|$CODEX_CA_CERTIFICATE" >> "$folder/variables"
if [ -e "$folder/$name $2" ]; then
    while read -r line; do echo "$line" >&2; done < "$folder/$name $2"
    exit 1
fi
echo "$name is pleased"
"""


class StandIns:
    """Small programs that stand in for the clients of agents, all that is on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.noted = folder / "calls"
        self.noted.touch()

    def install(self, *names: str) -> None:
        for name in names:
            program = self.folder / name
            program.write_text(STAND_IN)
            program.chmod(0o755)

    def refuse(self, name: str, verb: str, words: str) -> None:
        """Let a program fail with these words when it is to add or to remove."""
        (self.folder / f"{name} {verb}").write_text(f"{words}\n")

    def calls(self) -> list[str]:
        return self.noted.read_text().splitlines()

    def callers(self) -> list[str]:
        """Return which programs were called, in order."""
        return [call.partition("|")[0] for call in self.calls()]

    def variables(self) -> set[str]:
        return {*(self.folder / "variables").read_text().splitlines()}


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> StandIns:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NODE_EXTRA_CA_CERTS", raising=False)
    monkeypatch.delenv("CODEX_CA_CERTIFICATE", raising=False)
    return StandIns(tmp_path)


@posix_only
@pytest.mark.parametrize("token", ["", TOKEN], ids=["without", "with"])
def test_connect_runs_and_shows_each_clients_own_commands(
    cli: Cli, server: Server, stand_ins: StandIns, token: str
) -> None:
    stand_ins.install(*ADD)
    ended = cli("connect", JUNCTION_TOKEN=token)
    commands = connect_commands(server.url, token)
    assert ended.code == 0
    assert ended.err == ""
    assert stand_ins.calls() == as_called(commands)
    assert re.findall(r"^\$ (.*)$", ended.out, re.MULTILINE) == commands


@posix_only
def test_connect_never_passes_or_shows_the_token_itself(cli: Cli, stand_ins: StandIns) -> None:
    stand_ins.install(*ADD)
    by_option = cli("connect", "--token", TOKEN)
    by_variable = cli("connect", JUNCTION_TOKEN=TOKEN)
    for ended in (by_option, by_variable):
        assert "need JUNCTION_TOKEN in their environment" in ended.out
        assert TOKEN not in ended.out + ended.err
    assert TOKEN not in stand_ins.noted.read_text()


@posix_only
def test_connect_passes_its_environment_on(cli: Cli, stand_ins: StandIns) -> None:
    stand_ins.install("codex")
    cli("connect", JUNCTION_TOKEN=TOKEN)
    assert stand_ins.variables() == {f"{TOKEN}||"}


@posix_only
def test_connect_without_names_takes_only_those_on_the_path(cli: Cli, stand_ins: StandIns) -> None:
    stand_ins.install("opencode", "codex")
    assert cli("connect").code == 0
    assert stand_ins.callers() == ["codex", "opencode"]


@posix_only
def test_connect_with_names_takes_only_those(cli: Cli, stand_ins: StandIns) -> None:
    stand_ins.install(*ADD)
    assert cli("connect", "gemini", "codex").code == 0
    assert stand_ins.callers() == ["gemini", "codex"]


@posix_only
def test_connect_where_no_client_is_on_the_path_says_so(cli: Cli, stand_ins: StandIns) -> None:
    line = cli("connect").line(1)
    for name in ADD:
        assert name in line


@posix_only
def test_connect_refuses_a_name_that_it_does_not_know(cli: Cli, stand_ins: StandIns) -> None:
    stand_ins.install(*ADD)
    assert "'cursor'" in cli("connect", "claude", "cursor").line(2)
    assert stand_ins.calls() == []


@posix_only
def test_connect_says_that_a_named_client_is_not_there(cli: Cli, stand_ins: StandIns) -> None:
    stand_ins.install("codex")
    ended = cli("connect", "claude", "codex")
    assert ended.code == 1
    assert "claude cannot be run" in ended.out
    assert stand_ins.callers() == ["codex"]


@posix_only
@pytest.mark.parametrize("name", FIRST)
def test_connect_goes_on_where_there_was_no_entry_to_remove(
    cli: Cli, server: Server, stand_ins: StandIns, name: str
) -> None:
    stand_ins.install(name)
    stand_ins.refuse(name, "remove", "what a pity")
    ended = cli("connect")
    assert ended.code == 0
    assert "what a pity" not in ended.out
    assert stand_ins.calls() == as_called(connect_commands(server.url, names=(name,)))


@posix_only
def test_connect_shows_the_words_of_a_client_that_refused_and_goes_on(
    cli: Cli, stand_ins: StandIns
) -> None:
    stand_ins.install(*ADD)
    stand_ins.refuse("codex", "add", "[red]no such flag\nsee --help")
    ended = cli("connect")
    assert ended.code == 1
    command, words, hint = ended.out.partition("$ codex")[2].splitlines()[:3]
    assert command.startswith(" mcp add ")
    assert words == "[red]no such flag"
    assert hint == "see --help"
    assert stand_ins.callers()[-1] == "copilot"
    assert "codex" in ended.err
    assert ended.err.count("\n") == 1


@posix_only
def test_connect_tells_nothing_of_settings_for_a_client_that_refused(
    cli: Cli, stand_ins: StandIns
) -> None:
    stand_ins.install("codex")
    stand_ins.refuse("codex", "add", "no such flag")
    assert "tool_timeout_sec" not in cli("connect").out


@posix_only
def test_connect_keeps_to_itself_what_a_client_said_that_succeeded(
    cli: Cli, stand_ins: StandIns
) -> None:
    stand_ins.install(*ADD)
    assert "pleased" not in cli("connect").out


@posix_only
def test_connect_gives_up_a_client_that_hangs_and_goes_on(
    cli: Cli, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "CLIENT_SECONDS", 1)
    stand_ins.install("codex", "gemini")
    (stand_ins.folder / "codex").write_text("#!/bin/sh\nexec /bin/sleep 20\n")
    ended = cli("connect")
    assert ended.code == 1
    assert "codex cannot be run" in ended.out
    assert stand_ins.callers() == ["gemini"]


@posix_only
def test_connect_shows_a_command_before_it_runs_it(server: Server, tmp_path: Path) -> None:
    program = tmp_path / "gemini"
    program.write_text(f"#!/bin/sh{UNTIL_IT_MAY_END}echo no flags today; exit 1\n")
    program.chmod(0o755)
    with Shell("connect", PATH=str(tmp_path), JUNCTION_URL=server.url) as shell:
        shell.hear(r"^\$ gemini mcp add .*\n$")
        (tmp_path / "may-end").touch()
        assert shell.end() == 1
        assert "\nno flags today\n" in shell.said


@posix_only
@pytest.mark.parametrize("token", ["", TOKEN], ids=["without", "with"])
def test_connect_with_print_runs_nothing(
    cli: Cli, server: Server, stand_ins: StandIns, token: str
) -> None:
    stand_ins.install(*ADD)
    ended = cli("connect", "--print", JUNCTION_TOKEN=token)
    assert ended.code == 0
    commands = connect_commands(server.url, token)
    assert re.findall(r"^\$ (.*)$", ended.out, re.MULTILINE) == commands
    assert stand_ins.calls() == []


@posix_only
def test_connect_with_remove_only_removes(cli: Cli, stand_ins: StandIns) -> None:
    stand_ins.install(*ADD)
    ended = cli("connect", "--remove")
    assert ended.code == 0
    removals = [REMOVE[name] for name in ADD if name in REMOVE]
    assert stand_ins.calls() == as_called(removals)
    assert "tool_timeout_sec" not in ended.out


@posix_only
def test_connect_with_remove_says_what_to_delete_for_opencode(
    cli: Cli, stand_ins: StandIns
) -> None:
    stand_ins.install("opencode")
    ended = cli("connect", "--remove")
    assert ended.code == 0
    assert "mcp.junction" in ended.out
    assert "~/.config/opencode/opencode.jsonc" in ended.out


# As Claude Code and Copilot say it.
NOT_THERE = [
    ("claude", 'No MCP server found with name: "junction"'),
    ("copilot", 'Server "junction" not found'),
]


@posix_only
@pytest.mark.parametrize(("name", "words"), NOT_THERE)
def test_connect_with_remove_takes_what_is_not_there_for_removed(
    cli: Cli, stand_ins: StandIns, name: str, words: str
) -> None:
    stand_ins.install(name)
    stand_ins.refuse(name, "remove", words)
    assert cli("connect", "--remove").code == 0


@posix_only
def test_connect_with_remove_shows_any_other_refusal(cli: Cli, stand_ins: StandIns) -> None:
    stand_ins.install("claude", "codex")
    stand_ins.refuse("claude", "remove", "the file is locked")
    ended = cli("connect", "--remove")
    assert ended.code == 1
    assert "\nthe file is locked\n" in ended.out
    assert stand_ins.callers() == ["claude", "codex"]


@posix_only
def test_connect_needs_no_junction_to_remove(cli: Cli, stand_ins: StandIns) -> None:
    stand_ins.install("codex")
    ended = cli("connect", "--remove", at=f"http://127.0.0.1:{free_port()}/mcp")
    assert ended.code == 0
    assert ended.err == ""


@posix_only
def test_connect_says_that_no_junction_answers_and_connects_all_the_same(
    cli: Cli, stand_ins: StandIns
) -> None:
    stand_ins.install("codex")
    url = f"http://127.0.0.1:{free_port()}/mcp"
    ended = cli("connect", at=url)
    assert ended.code == 0
    assert ended.err.count("\n") == 1
    assert "no junction answers" in ended.err
    assert "The junction answers" not in ended.out
    assert stand_ins.calls() == as_called(connect_commands(url, names=("codex",)))


@posix_only
def test_connect_says_that_something_else_answers_and_connects_all_the_same(
    cli: Cli, stand_ins: StandIns
) -> None:
    stand_ins.install("codex")
    with other_http("hi") as address:
        ended = cli("connect", at=address)
    assert ended.code == 0
    assert ended.err.count("\n") == 1
    assert "not a junction" in ended.err
    assert stand_ins.callers() == ["codex"]


@posix_only
def test_connect_passes_an_authority_to_the_clients_and_says_what_to_export(
    cli: Cli, tls_server: Server, certificate: str, stand_ins: StandIns
) -> None:
    stand_ins.install("codex", "claude")
    ended = cli("connect", "--ca", certificate, "--token", TOKEN, at=tls_server.url)
    assert ended.code == 0
    assert ended.err == ""
    assert stand_ins.variables() == {f"|{certificate}|{certificate}"}
    names = ("JUNCTION_CA", "NODE_EXTRA_CA_CERTS", "CODEX_CA_CERTIFICATE")
    authority = " ".join(f"{name}={certificate}" for name in names)
    assert f"\n  export JUNCTION_URL={tls_server.url} {authority}\n" in ended.out


@posix_only
def test_connect_says_at_the_end_that_the_junction_answers(
    cli: Cli, server: Server, stand_ins: StandIns
) -> None:
    stand_ins.install("codex")
    ended = cli("connect")
    assert ended.out.endswith(f"\nThe junction answers at {server.url}.\n")
    assert ended.err == ""


@posix_only
def test_what_connect_says_to_export_can_be_pasted_whatever_the_file_is_called(
    cli: Cli, stand_ins: StandIns, certificate: str
) -> None:
    stand_ins.install("codex")
    file = stand_ins.folder / "Ann's own.pem"
    file.write_bytes(Path(certificate).read_bytes())
    text = cli("connect", "--ca", str(file)).out
    (exports,) = re.findall(r"^  (export .*)$", text, re.MULTILINE)
    shell = ["/bin/sh", "-c", f'{exports}\necho "$NODE_EXTRA_CA_CERTS|$CODEX_CA_CERTIFICATE"']
    done = subprocess.run(shell, capture_output=True, text=True, timeout=20)
    assert done.stdout == f"{file}|{file}\n"


SETTINGS = {
    "claude": ['\n{"permissions": {"allow": ["mcp__junction__*"]}}\n'],
    "codex": ["\ntool_timeout_sec = 3700\n", '\ndefault_tools_approval_mode = "approve"\n'],
    "gemini": [],
    "opencode": [],
    "copilot": ["copilot --allow-tool junction\n"],
}


@posix_only
@pytest.mark.parametrize("name", SETTINGS)
def test_connect_says_what_is_left_to_set_by_hand(cli: Cli, stand_ins: StandIns, name: str) -> None:
    stand_ins.install(name)
    text = cli("connect").out
    for other, settings_of_it in SETTINGS.items():
        for setting in settings_of_it:
            assert (setting in text) == (other == name)


# --- The command line: watching


def on_board(alias: str, idle: int = 0, waits: bool = False, unread: int = 0) -> dict[str, Any]:
    """Return a peer as a snapshot shows it."""
    return {
        "alias": alias,
        "repo": "shop-api",
        "task": "receipts to S3",
        "role": "backend",
        "connected_at": "2026-01-01T00:00:00+00:00",
        "idle_seconds": idle,
        "waiting": waits,
        "unread": unread,
    }


def board(*peers: dict[str, Any], busy: bool = True) -> app.Board:
    """Return what `watch` shows of these peers, after many messages if they are busy."""
    shown = app.Board(app.base_url(app.DEFAULT_URL))
    shown.take(happening("snapshot", peers=[*peers]))
    for size in range(60 * busy):
        event = happening("message_sent", to=["bob"], to_count=1, bytes=size)
        shown.take(event | {"from": "ann"})
    return shown


def rendered(shown: app.Board, width: int = 80, height: int = 24, **options: Any) -> list[str]:
    """Return the lines of a board on a terminal of this size."""
    file = io.StringIO()
    Console(width=width, height=height, file=file, **options).print(shown.picture(width, height))
    return file.getvalue().splitlines()


def crowd(number: int) -> list[dict[str, Any]]:
    """Return so many peers, in no order: each third waits, each second has mail."""
    return [
        on_board(f"crimson-{n:07}", idle=n * 7919 % 1_000, waits=n % 3 == 1, unread=n % 2 * n)
        for n in range(number)
    ]


sizes = pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24), (140, 40)])
crowds = pytest.mark.parametrize("number", [0, 1, 8, 40, 200])


@sizes
@crowds
def test_the_board_fits_the_terminal_and_leaves_a_third_to_what_happens(
    number: int, width: int, height: int
) -> None:
    lines = rendered(board(*crowd(number)), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    happened = [line for line in lines if " ann wrote to bob, " in line]
    assert len(happened) >= height / 3
    assert "59 bytes" in happened[0]  # the newest first


@sizes
@crowds
def test_the_boards_title_counts_who_is_here_and_who_is_not_shown(
    number: int, width: int, height: int
) -> None:
    title, *lines = rendered(board(*crowd(number)), width, height)
    shown = [line for line in lines if line.startswith("crimson-")]
    assert f"{number} here" in title
    if len(shown) < number:
        assert f"{number - len(shown)} not shown" in title
    else:
        assert "not shown" not in title


def test_the_board_shows_as_many_as_there_is_room_for() -> None:
    lines = rendered(board(*crowd(40)), 80, 24)
    assert len([line for line in lines if line.startswith("crimson-")]) == 24 * 2 // 3 - 4


def test_the_boards_table_takes_no_more_height_than_it_needs() -> None:
    lines = rendered(board(*crowd(3)), 80, 24)
    assert len([line for line in lines if " ann wrote to " in line]) == 24 - 3 - 4


@sizes
def test_on_the_board_those_who_wait_or_were_active_last_stand_first(
    width: int, height: int
) -> None:
    lines = rendered(board(*crowd(40)), width, height)
    shown = [line.split()[0] for line in lines if line.startswith("crimson-")]
    rank = {peer["alias"]: (not peer["waiting"], peer["idle_seconds"]) for peer in crowd(40)}
    assert shown == sorted(rank, key=lambda alias: rank[alias])[: len(shown)]


ALIASES = ["wry-fox", "luxuriant-blanket"]


def test_on_narrow_terminals_labels_are_left_out_one_by_one_and_aliases_never_cut() -> None:
    left = []
    for width in range(100, 29, -1):
        lines = rendered(board(*map(on_board, ALIASES), busy=False), width, 24)
        assert {*ALIASES} <= {line.partition(" ")[0] for line in lines}
        (header,) = [line.split() for line in lines if line.startswith("alias ")]
        labels = [name for name in header if name in ("role", "repo", "task")]
        if labels not in left:
            left.append(labels)
    assert left == [["role", "repo", "task"], ["role", "repo"], ["role"], []]


def test_a_long_label_is_cut_and_brackets_in_it_are_no_markup() -> None:
    peer = on_board("wry-fox") | {"role": "[bold]ux[/bold]", "task": "日本" * 100}
    (line,) = [line for line in rendered(board(peer)) if "wry-fox" in line][:1]
    assert "[bold]ux" in line
    assert re.search("[日本] ?…", line)


TIMES = [(0, "0s"), (16, "16s"), (59, "59s"), (60, "1m"), (3_599, "59m"), (3_600, "1h")]
TIMES += [(86_399, "23h"), (86_400, "1d"), (200_000, "2d")]


@pytest.mark.parametrize(("seconds", "text"), TIMES)
def test_a_time_is_shown_short(seconds: int, text: str) -> None:
    assert app.short_time(seconds) == text
    lines = rendered(board(on_board("icy-hat", idle=seconds)))
    (line,) = [line for line in lines if line.startswith("icy-hat")]
    assert f" {text} ago" in line


@sizes
def test_a_junction_that_is_away_is_said_in_the_title_and_the_peers_stay(
    width: int, height: int
) -> None:
    shown = board(on_board("wry-hat"))
    shown.take(happening("junction_lost"))
    title, *lines = rendered(shown, width, height)
    assert title.startswith("away: ")
    assert not re.search(r"\d here", title)
    assert any(line.startswith("wry-hat") for line in lines)


def test_who_is_not_shown_is_counted_while_the_junction_is_away_too() -> None:
    shown = board(*crowd(40))
    shown.take(happening("junction_lost"))
    assert ", 28 not shown" in rendered(shown, 80, 24)[0]
    assert ", 38 not shown" in rendered(shown, 40, 10)[0]


def test_a_junction_that_came_back_is_here_again() -> None:
    shown = board(on_board("wry-hat"))
    shown.take(happening("junction_lost"))
    assert shown.take(happening("snapshot", peers=[])).endswith(" 0 here")
    lines = rendered(shown)
    assert "0 here" in lines[0]
    assert not any(line.startswith("wry-hat") for line in lines)


def test_a_snapshot_is_no_news_while_the_junction_is_there() -> None:
    shown = board(on_board("wry-hat"))
    assert shown.take(happening("snapshot", peers=[on_board("icy-hat", unread=12)])) == ""
    lines = rendered(shown)
    assert any(re.match(r"icy-hat .* 12 *$", line) for line in lines)
    assert not any("wry-hat" in line for line in lines)


def test_the_board_shows_who_is_there_at_the_last_snapshot() -> None:
    shown = board(busy=False)
    shown.take(happening("snapshot", peers=[on_board("wry-hat")]))
    assert any(line.startswith("wry-hat ") for line in rendered(shown))
    shown.take(happening("snapshot", peers=[]))
    assert not any(line.startswith("wry-hat ") for line in rendered(shown))


@sizes
def test_an_empty_board_says_what_to_tell_an_agent(width: int, height: int) -> None:
    text = " ".join(" ".join(rendered(board(busy=False), width, height)).split())
    assert 'Tell an agent: "Register with the junction, then wait for messages."' in text


STYLES = [
    (on_board("wry-hat", idle=300), "2", False),
    (on_board("wry-hat", idle=301), "2", True),
    (on_board("wry-hat", waits=True), "32", True),
    (on_board("wry-hat", idle=5), "32", False),
    (on_board("wry-hat", unread=3), "33", True),
]


@pytest.mark.parametrize(("peer", "code", "expected"), STYLES)
def test_who_is_idle_is_dim_who_waits_green_and_what_is_unread_yellow(
    peer: dict[str, Any], code: str, expected: bool
) -> None:
    lines = rendered(board(peer), force_terminal=True, color_system="truecolor")
    (line,) = [line for line in lines if "wry-hat" in line]
    shown = re.findall(r"\x1b\[([\d;]+)m *\S", line)
    assert any(code in codes.split(";") for codes in shown) == expected


@posix_only
def test_watch_draws_on_a_terminal_and_leaves_it_as_it_was() -> None:
    import termios

    # In the junction of all tests, others may fill the table.
    with (
        running() as server,
        Shell("watch", terminal=True, JUNCTION_URL=server.url) as shell,
    ):
        before = termios.tcgetattr(shell.ours)
        shell.hear(r"\d+ here")
        assert "\x1b[?1049h" in shell.said.partition(" here")[0]
        ann = Agent(server, role="ux")
        bob = Agent(server)
        shell.hear(f"{ann.alias} +ux")
        ann.send(bob.alias, "swordfish")
        shell.hear(f"{ann.alias} wrote to {bob.alias}, 9 bytes")
        assert shell.end(signal.SIGINT) == 130
        assert termios.tcgetattr(shell.ours) == before
    drawing, end, rest = shell.said.rpartition("\x1b[?1049l")
    assert end
    assert "\x1b[?25h" in drawing[-50:] + rest
    assert re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", rest).strip() == ""
    assert "swordfish" not in shell.said


@posix_only
def test_watch_on_a_dumb_terminal_is_a_line_for_each_event(server: Server) -> None:
    with Shell("watch", terminal=True, TERM="dumb", JUNCTION_URL=server.url) as shell:
        shell.hear(r"\d+ here\n")
        ann = Agent(server, role="ux")
        shell.hear(rf"\d\d:\d\d:\d\d {ann.alias} joined .*\n")
        assert shell.end(signal.SIGINT) == 130
    assert "\x1b" not in shell.said


QUICK = "import junction; junction.RECONNECT_SECONDS = 0.1"


@pytest.fixture(scope="session")
def watched() -> Iterator[tuple[Shell, Shell, list[Agent]]]:
    """Give what two `watch` said, into pipes, the second one with --json.

    A first junction was stopped, a second one on the same port killed. The agents Ann
    and Bob were at the first, Cid at the second.
    """
    with contextlib.ExitStack() as stack:
        with running() as first:
            url = first.url
            lines = stack.enter_context(Shell("watch", code=QUICK, JUNCTION_URL=url))
            documents = stack.enter_context(Shell("watch", "--json", code=QUICK, JUNCTION_URL=url))
            lines.hear(" 0 here\n")
            documents.hear("snapshot.*\n")
            ann = Agent(first, role="ux")
            bob = Agent(first, LEGACY)
            ann.send(bob.alias, "swordfish")
            bob.read()
            bob("disconnect")
            lines.hear(f"{bob.alias} left")
            documents.hear("peer_left")
            assert first.stops_in_silence()
            lines.hear("trying again\n")
            documents.hear("junction_lost.*\n")
        with running(port=first.port) as second:
            lines.hear(r"trying again\n.* 0 here\n")
            documents.hear(r"junction_lost.*\n.*snapshot.*\n")
            cid = Agent(second)
            lines.hear(f"{cid.alias} joined")
            documents.hear(cid.alias)
            second.process.kill()
            lines.hear(r"(?s)trying again\n.*trying again\n")
            documents.hear(r"(?s)junction_lost.*junction_lost.*\n")
        lines.end(signal.SIGINT)
        documents.end(signal.SIGTERM)
        yield lines, documents, [ann, bob, cid]


@posix_only
def test_watch_elsewhere_is_a_line_for_each_event_and_says_when_the_junction_is_away(
    watched: tuple[Shell, Shell, list[Agent]],
) -> None:
    lines, _, (ann, bob, cid) = watched
    assert re.findall(r"^\d\d:\d\d:\d\d (.*)$", lines.said, re.MULTILINE) == [
        "0 here",
        f"{ann.alias} joined (ux, no repo)",
        f"{bob.alias} joined (no role, no repo)",
        f"{ann.alias} wrote to {bob.alias}, 9 bytes",
        f"{bob.alias} read 1",
        f"{bob.alias} left, 0 unread erased",
        "the junction stopped, 0 unread erased",
        "the connection to the junction has ended; trying again",
        "0 here",
        f"{cid.alias} joined (no role, no repo)",
        "the connection to the junction has ended; trying again",
    ]


@posix_only
def test_watch_with_json_is_a_document_for_each_event(
    watched: tuple[Shell, Shell, list[Agent]],
) -> None:
    _, documents, (ann, bob, cid) = watched
    events = [json.loads(line) for line in documents.said.splitlines() if line[0] == "{"]
    assert events[0].keys() == {"event", "timestamp", "mode", "uptime", "peers"}
    happened = [event for event in events if event["event"] != "snapshot"]
    assert [event["event"] for event in happened] == [
        "peer_joined",
        "peer_joined",
        "message_sent",
        "messages_read",
        "peer_left",
        "junction_stopped",
        "junction_lost",
        "peer_joined",
        "junction_lost",
    ]
    aliases = [event["alias"] for event in happened if event["event"] == "peer_joined"]
    assert aliases == [ann.alias, bob.alias, cid.alias]
    for event in events:
        assert datetime.fromisoformat(event["timestamp"]).utcoffset() == timedelta(0)


@posix_only
def test_watch_exits_with_130_and_without_a_word_after_ctrl_c_and_after_sigterm(
    watched: tuple[Shell, Shell, list[Agent]],
) -> None:
    lines, documents, _ = watched
    assert lines.process.returncode == 130
    assert documents.process.returncode == 130
    assert "interrupted" not in lines.said + documents.said


@posix_only
def test_watch_shows_no_text_and_no_session(
    watched: tuple[Shell, Shell, list[Agent]],
) -> None:
    lines, documents, agents = watched
    secrets = ["swordfish", *(agent.session_id for agent in agents)]
    for shell in (lines, documents):
        assert not any(secret in shell.said for secret in secrets)


# --- The command line: who is here


def test_peers_joins_nobody(cli: Cli, server: Server) -> None:
    watcher = connect(server, WATCH)
    before = get(server, "/health")["activePeers"]
    assert cli("peers").code == 0
    assert get(server, "/health")["activePeers"] == before
    marker = Agent(server).alias.encode()
    told = receive(watcher, b'"alias": "' + marker + b'"')
    assert told.count(b"event: peer_joined\n") == 1
    assert b"event: peer_left\n" not in told
    assert b'"role": "shell"' not in told


def test_peers_shows_everybodys_unread(cli: Cli, server: Server) -> None:
    ann = Agent(server)
    bob = Agent(server)
    for _ in range(12):
        ann.send(bob.alias, "hello")
    (line,) = [line for line in cli("peers").out.splitlines() if bob.alias in line]
    assert line.split()[-1] == "12"


def test_peers_elsewhere_is_plain_columns_with_nothing_cut(cli: Cli, server: Server) -> None:
    labels = {"role": "設計" * 100, "repo": "r" * 200, "task": "日" * 200}
    ann = Agent(server, **labels)
    ended = cli("peers")
    assert ended.code == 0
    assert "\x1b" not in ended.out
    header, *lines = ended.out.splitlines()
    assert header.split()[:4] == ["alias", "role", "repo", "task"]
    (line,) = [line for line in lines if ann.alias in line]
    assert line.split()[:4] == [ann.alias, *labels.values()]


def test_peers_shows_only_those_of_a_role(cli: Cli, server: Server) -> None:
    ann = Agent(server, role="painter")
    lines = cli("peers", "--role", "painter").out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [ann.alias]
    assert cli("peers", "--role", "nobody") == Ended(0, "nobody is here as 'nobody'\n", "")


def test_peers_with_json_prints_a_snapshot_of_a_role(cli: Cli, server: Server) -> None:
    bob = Agent(server, role="sculptor", repo="shop", task="t")
    snapshot = json.loads(cli("peers", "--json", "--role", "sculptor").out)
    assert snapshot.keys() >= {"mode", "uptime", "peers"}
    (peer,) = snapshot["peers"]
    assert peer.keys() == on_board("").keys()
    assert peer["alias"] == bob.alias
    assert peer["task"] == "t"
    assert peer["waiting"] is False
    assert peer["unread"] == 0


@posix_only
def test_peers_is_a_table_as_wide_as_the_terminal_with_aliases_uncut(server: Server) -> None:
    ann = Agent(server, role="設計" * 20, repo="r" * 200, task="日本" * 40)
    with Shell("peers", terminal=True, JUNCTION_URL=server.url) as shell:
        assert shell.end() == 0
    lines = shell.plainly().splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert ann.alias in [line.partition(" ")[0] for line in lines]
    assert "設計" in shell.said
    assert COLOUR.search(shell.said)


# --- The command line: ringing


# It notes what it is told, and fails where a file beside it says so.
BELL = """#!/bin/sh
folder=${0%/*}
env > "$folder/environment"
IFS='|'
echo "$*|$JUNCTION_ALIAS|$JUNCTION_FROM" >> "$folder/rings"
[ ! -e "$folder/fails" ]
"""

# Snapshots, at which a bell may ring, come ten times a second.
QUICK_SNAPSHOTS = """
import junction
from starlette.responses import JSONResponse
junction.SNAPSHOT_SECONDS = 0.05

@junction.mcp.custom_route("/watchers", methods=["GET"])
async def watchers(_request):
    return JSONResponse(len(junction.junction.watchers))
"""
quick_server = served(code=QUICK_SNAPSHOTS)


def watchers(server: Server) -> int:
    return int(get(server, "/watchers"))


def let_snapshots_pass(server: Server) -> None:
    """Wait until three snapshots were told, at which a bell could ring too often."""
    told = b""
    with connect(server, WATCH) as talk:
        while told.count(b"event: snapshot\n") < 4:
            more = talk.recv(65_536)
            assert more, told
            told += more


class Bell:
    """A program for `ring` to run, and a peer for whom it runs."""

    def __init__(self, server: Server, cli: Cli, folder: Path) -> None:
        self.server = server
        self.cli = cli
        self.folder = folder
        self.ann = Agent(server)
        self.bob = Agent(server)
        self.program = folder / "bell"
        self.program.write_text(BELL)
        self.program.chmod(0o755)

    def hears(self, story: Callable[[], object], *command: str) -> Ended:
        """Ring for Bob while this happens, and until he leaves after it."""

        def whole_story() -> None:
            try:
                until(lambda: watchers(self.server) == 1)
                story()
            finally:
                self.bob("disconnect")

        until(lambda: watchers(self.server) == 0)
        command = command or (str(self.program),)
        with meanwhile(whole_story):
            ended = self.cli("ring", self.bob.alias, "--", *command, at=self.server.url)
        assert ended.code == 1
        assert f"{self.bob.alias} has left" in ended.err
        return ended

    @contextlib.contextmanager
    def in_a_shell(self, **options: Any) -> Iterator[Shell]:
        """Ring for Bob in a process of its own."""
        until(lambda: watchers(self.server) == 0)
        command = ("ring", self.bob.alias, "--", str(self.program))
        with Shell(*command, JUNCTION_URL=self.server.url, **options) as shell:
            until(lambda: watchers(self.server) == 1)
            yield shell

    def rings(self) -> list[str]:
        """Return what the program noted of each time that it ran."""
        file = self.folder / "rings"
        return file.read_text().splitlines() if file.exists() else []

    def rang(self, times: int) -> None:
        """Wait until it has run so many times, and fail if it does once more."""
        until(lambda: len(self.rings()) >= times)
        let_snapshots_pass(self.server)
        assert len(self.rings()) == times


@pytest.fixture
def bell(quick_server: Server, cli: Cli, tmp_path: Path) -> Bell:
    return Bell(quick_server, cli, tmp_path)


@posix_only
@pytest.mark.parametrize("number", [1, 10])
def test_ring_runs_the_command_once_until_the_alias_has_read(bell: Bell, number: int) -> None:
    def story() -> None:
        for _ in range(number):
            bell.ann.send(bell.bob.alias, "hello")
        bell.rang(1)
        assert len(bell.bob.read()) == number
        bell.ann.send(bell.bob.alias, "hello")
        bell.rang(2)

    bell.hears(story)


@posix_only
def test_ring_tells_the_command_for_whom_it_is_and_who_wrote(bell: Bell) -> None:
    def story() -> None:
        bell.ann.send(bell.bob.alias, "hello")
        bell.rang(1)

    bell.hears(story, str(bell.program), "one two", "$HOME; echo *")
    assert bell.rings() == [f"one two|$HOME; echo *|{bell.bob.alias}|{bell.ann.alias}"]


@posix_only
def test_ring_does_not_run_the_command_for_what_a_waiting_read_takes(bell: Bell) -> None:
    def story() -> None:
        with bell.bob.begin_read() as read:
            bell.ann.send(bell.bob.alias, "taken at once")
            receive(read, b"taken at once")
        let_snapshots_pass(bell.server)
        assert bell.rings() == []
        bell.ann.send(bell.bob.alias, "left there")
        bell.rang(1)

    bell.hears(story)


@posix_only
def test_ring_takes_no_notice_of_what_others_get(bell: Bell) -> None:
    def story() -> None:
        bell.bob.send(bell.ann.alias, "hello")
        let_snapshots_pass(bell.server)
        bell.ann.send(bell.bob.alias, "hello")
        bell.bob.send(bell.ann.alias, "hello")
        bell.ann.read()
        bell.rang(1)

    bell.hears(story)
    assert bell.rings() == [f"|{bell.bob.alias}|{bell.ann.alias}"]


@posix_only
def test_ring_runs_the_command_for_a_message_to_everybody(bell: Bell) -> None:
    def story() -> None:
        bell.ann.send("*", "hello")
        bell.rang(1)

    bell.hears(story)
    assert bell.rings() == [f"|{bell.bob.alias}|{bell.ann.alias}"]


@posix_only
def test_ring_runs_the_command_for_what_lies_there_at_the_start(bell: Bell) -> None:
    bell.ann.send(bell.bob.alias, "hello")
    bell.hears(lambda: bell.rang(1))
    assert bell.rings() == [f"|{bell.bob.alias}|"]  # nobody knows any more who wrote


@posix_only
def test_ring_forgets_a_sender_whose_message_was_read(bell: Bell) -> None:
    def story() -> None:
        bell.ann.send(bell.bob.alias, "x" * 20_000)
        bell.ann.send(bell.bob.alias, "y" * 20_000)
        bell.rang(1)
        bell.bob.read()  # the first of them only
        bell.rang(2)

    bell.hears(story)
    assert bell.rings() == [
        f"|{bell.bob.alias}|{bell.ann.alias}",
        f"|{bell.bob.alias}|",
    ]


@posix_only
def test_ring_passes_no_text_and_no_session_on(bell: Bell) -> None:
    def story() -> None:
        bell.ann.send(bell.bob.alias, "swordfish")
        bell.rang(1)

    bell.hears(story)
    told = (bell.folder / "environment").read_text() + "\n".join(bell.rings())
    assert f"JUNCTION_ALIAS={bell.bob.alias}\n" in told
    for secret in ("swordfish", bell.ann.session_id, bell.bob.session_id):
        assert secret not in told


@posix_only
def test_ring_waits_for_a_command_that_hangs(bell: Bell) -> None:
    bell.program.write_text(BELL + UNTIL_IT_MAY_END)

    def story() -> None:
        bell.ann.send(bell.bob.alias, "hello")
        bell.rang(1)
        bell.bob.read()
        bell.ann.send(bell.bob.alias, "hello again")
        bell.rang(1)
        (bell.folder / "may-end").touch()
        bell.rang(2)

    bell.hears(story)


@posix_only
def test_ring_says_that_there_is_no_such_command(bell: Bell) -> None:
    missing = str(bell.folder / "missing")

    def story() -> None:
        bell.ann.send(bell.bob.alias, "hello")
        let_snapshots_pass(bell.server)

    line, _ = bell.hears(story, missing).err.splitlines()
    assert line.startswith(f"{missing} cannot be run: No such file")


@posix_only
def test_ring_says_that_the_command_failed_and_rings_at_the_next_message(bell: Bell) -> None:
    (bell.folder / "fails").touch()
    with bell.in_a_shell() as shell:
        bell.ann.send(bell.bob.alias, "hello")
        shell.hear(f"{bell.program} ended with exit code 1; the next message rings again\n")
        bell.rang(1)
        (bell.folder / "fails").unlink()
        bell.ann.send(bell.bob.alias, "hello again")
        bell.rang(2)
        assert shell.said.count("\n") == 1


@posix_only
def test_ring_keeps_its_standard_input_from_the_command(bell: Bell) -> None:
    bell.program.write_text(f"{BELL}read -r typed || echo nothing >> $folder/rings\n")
    with bell.in_a_shell(terminal=True) as shell:
        os.write(shell.ours, b"typed\n")
        bell.ann.send(bell.bob.alias, "hello")
        until(lambda: len(bell.rings()) == 2)
        assert bell.rings()[1] == "nothing"


@posix_only
def test_ring_is_ended_by_ctrl_c_with_one_line(bell: Bell) -> None:
    def story() -> None:
        until(lambda: watchers(bell.server) == 1)
        interrupt()

    with meanwhile(story):
        ended = bell.cli("ring", bell.bob.alias, "--", "true", at=bell.server.url)
    assert ended.line(130) == "agent-junction: interrupted\n"


@pytest.fixture
def popen(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Return what stands for any program that is started."""
    started = Mock()
    started.return_value.poll.return_value = 0
    started.return_value.returncode = 0
    monkeypatch.setattr(subprocess, "Popen", started)
    return started


def test_ring_lets_a_waiting_read_have_its_chance(popen: Mock) -> None:
    rung = app.Bell("wry-fox", ["bell"])
    about_to_read = happening("snapshot", peers=[on_board("wry-fox", waits=True, unread=1)])
    rung.take(about_to_read)
    rung.take(happening("messages_read", alias="wry-fox", count=1))
    rung.take(about_to_read)
    assert popen.call_count == 0


def test_ring_does_not_pass_over_what_a_waiting_read_for_another_leaves(popen: Mock) -> None:
    rung = app.Bell("wry-fox", ["bell"])
    waits_for_another = happening("snapshot", peers=[on_board("wry-fox", waits=True, unread=1)])
    rung.take(waits_for_another)
    assert popen.call_count == 0
    rung.take(waits_for_another)
    assert popen.call_count == 1


def test_a_message_right_after_a_command_has_failed_rings_again(popen: Mock) -> None:
    rung = app.Bell("wry-fox", ["bell"])
    unread = happening("snapshot", peers=[on_board("wry-fox", unread=1)])
    rung.take(unread)
    rung.take(unread)
    popen.return_value.returncode = 1
    rung.take(happening("message_sent", to=["wry-fox"], to_count=1, bytes=5) | {"from": "big-bear"})
    rung.take(unread)
    assert popen.call_count == 2


def test_ring_knows_what_was_read_while_its_connection_was_lost(popen: Mock) -> None:
    rung = app.Bell("wry-fox", ["bell"])
    for unread in (1, 1, 0, 1, 1):
        rung.take(happening("snapshot", peers=[on_board("wry-fox", unread=unread)]))
    assert popen.call_count == 2


def test_ring_knows_who_wrote_to_so_many_that_not_all_are_named(popen: Mock) -> None:
    rung = app.Bell("wry-fox", ["bell"])
    sent = happening("message_sent", to=["icy-owl"], to_count=300, bytes=5)
    rung.take(sent | {"from": "big-bear"})
    rung.take(happening("snapshot", peers=[on_board("wry-fox", unread=1)]))
    rung.take(happening("snapshot", peers=[on_board("wry-fox", unread=1)]))
    assert popen.call_args.kwargs["env"]["JUNCTION_FROM"] == "big-bear"


def test_ring_ends_where_the_alias_is_not_there(cli: Cli) -> None:
    line = cli("ring", "no-body", "--", "true").line(1)
    assert "there is no peer 'no-body'" in line
    assert "agent-junction peers" in line


@posix_only
def test_ring_ends_when_the_junction_was_restarted_without_the_alias() -> None:
    with contextlib.ExitStack() as stack:
        with running(code=QUICK_SNAPSHOTS) as first:
            bob = Agent(first)
            command = ("ring", bob.alias, "--", "true")
            shell = stack.enter_context(Shell(*command, code=QUICK, JUNCTION_URL=first.url))
            until(lambda: watchers(first) == 1)
            first.process.kill()
        with running(port=first.port):
            assert shell.end() == 1
    (line,) = shell.said.splitlines()
    assert f"there is no peer '{bob.alias}'" in line


# --- The command line: sending and reading


SECRETS = [b"API_KEY=swordfish\r\n\0\x1b[31m\xf0\x9f\x97\xa1\n", "日".encode() * 10_922 + b"xx"]


@posix_only
@pytest.mark.parametrize("secret", SECRETS, ids=["odd", "longest"])
def test_a_secret_goes_between_shells_byte_for_byte(
    cli: Cli, server: Server, tmp_path: Path, secret: bytes
) -> None:
    file = tmp_path / ".env"
    file.write_text("old")
    file.chmod(0o644)
    options = ("--wait", "20", "--output", str(file))
    with Shell("read", *options, JUNCTION_URL=server.url) as reader:
        alias = reader.hear("waiting as ([a-z]+-[a-z]+)")
        until(lambda: alias in waiting(server))
        sent = cli("send", alias, stdin=secret)
        assert sent.code == 0
        assert re.fullmatch(
            rf"delivered to {alias} as [a-z]+-[a-z]+ \(1 waiting for it\)\n", sent.out
        )
        assert reader.end() == 0
    assert re.search(r"\nfrom [a-z]+-[a-z]+\n$", reader.said)
    assert file.read_bytes() == secret
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == [".env"]


def test_a_file_stays_as_it_was_where_nothing_came(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("old")
    ended = cli("read", "--wait", "0.1", "--output", str(file))
    assert ended.code == 3
    assert ended.out == ""
    assert ended.err.splitlines()[-1] == "nothing came"
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == [".env"]


def test_a_file_stays_as_it_was_where_it_cannot_be_replaced(
    cli: Cli, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = Agent(server)
    bob = Agent(server)
    bob.send(ann.alias, "new")
    file = tmp_path / ".env"
    file.write_text("old")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", Mock(side_effect=full))
    ended = cli("read", "--output", str(file), JUNCTION_SESSION=ann.session_id)
    assert "No space left" in ended.line(1)
    assert file.read_text() == "old"


@posix_only
def test_a_full_disk_is_noticed_before_a_message_is_taken(server: Server, tmp_path: Path) -> None:
    ann = Agent(server)
    bob = Agent(server)
    ann.send(bob.alias, "hello")
    command = f"ulimit -f 8; {sys.executable} -m junction read --output {tmp_path}/.env"
    done = subprocess.run(
        ["sh", "-c", command],
        env=environment(JUNCTION_URL=server.url, JUNCTION_SESSION=bob.session_id),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []
    assert bob.read() == ["hello"]


def test_people_read_messages_with_their_control_characters_escaped(
    cli: Cli, server: Server
) -> None:
    me = Agent(server)
    cli("send", me.alias, "\x1b]0;evil\x07\x1b[31mred\u202e\r\n\tfine")
    ended = cli("read", JUNCTION_SESSION=me.session_id)
    assert ended.code == 0
    head, _, text = ended.out.partition("\n")
    assert re.fullmatch(r"[a-z]+-[a-z]+, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d:", head)
    assert text == "\\x1b]0;evil\\x07\\x1b[31mred\\u202e\\r\n\tfine\n\n"


def test_a_read_that_does_not_wait_and_finds_nothing_is_no_failure(
    cli: Cli, server: Server
) -> None:
    me = Agent(server)
    assert cli("read", JUNCTION_SESSION=me.session_id) == Ended(0, "", "nothing came\n")


def test_read_from_takes_all_that_one_sender_wrote_and_leaves_the_rest(
    cli: Cli, server: Server
) -> None:
    me = Agent(server)
    ann = Agent(server)
    bob = Agent(server)
    ann.send(me.alias, "one")
    for letter in "abc":  # more than one answer holds
        bob.send(me.alias, letter * 20_000)
    ended = cli("read", "--from", bob.alias, "--json", "--session", me.session_id)
    answer = json.loads(ended.out)
    assert {entry["from"] for entry in answer["messages"]} == {bob.alias}
    assert [entry["message"][0] for entry in answer["messages"]] == ["a", "b", "c"]
    assert answer["remaining"] == 1
    assert cli("read", "--raw", "--session", me.session_id).out == "one"


def test_send_with_wait_prints_the_answer_of_that_alias_alone(cli: Cli, server: Server) -> None:
    me = Agent(server)
    other = Agent(server)

    def story() -> None:
        (question,) = me("read_messages", wait_seconds=20)["messages"]
        visitor = question["from"]
        until(lambda: visitor in waiting(server))
        other.send(visitor, "from another")
        me.send(visitor, f"{question['message']}? yes")

    with meanwhile(story):
        ended = cli("send", me.alias, "ready", "--wait", "20")
    assert ended.code == 0
    assert ended.out == "ready? yes"
    assert f"delivered to {me.alias}" in ended.err


def test_send_with_wait_and_no_answer_exits_with_3(cli: Cli, server: Server) -> None:
    ended = cli("send", Agent(server).alias, "ready", "--wait", "0.1")
    assert ended.code == 3
    assert ended.out == ""


def test_send_with_wait_to_a_peer_that_leaves_says_that_no_answer_can_come(
    cli: Cli, server: Server
) -> None:
    me = Agent(server)

    def story() -> None:
        (question,) = me("read_messages", wait_seconds=20)["messages"]
        until(lambda: question["from"] in waiting(server))
        me("disconnect")

    with meanwhile(story):
        ended = cli("send", me.alias, "ready", "--wait", "20")
    assert ended.code == 1
    assert "no answer can come" in ended.err.splitlines()[-1]
    assert me.alias in ended.err.splitlines()[-1]


@posix_only
def test_on_a_terminal_a_wait_shows_that_it_lives_and_what_the_other_side_runs(
    server: Server,
) -> None:
    with Shell("read", "--wait", "20", terminal=True, JUNCTION_URL=server.url) as reader:
        alias = reader.hear("waiting as ([a-z]+-[a-z]+)")
        command = f"agent-junction send {alias} --url {server.url} < FILE"
        assert command in " ".join(reader.plainly().split())
        reader.hear("(?s)up to 20 s.*waiting.*waiting")  # drawn again and again
        with Shell("send", alias, terminal=True, JUNCTION_URL=server.url) as sender:
            sender.hear("Ctrl-D")
            os.write(sender.ours, b"typed by hand\n\x04")
            assert sender.end() == 0
        assert reader.end() == 0
    assert "typed by hand\n" in reader.plainly()


def test_the_line_for_the_other_side_needs_no_address_at_the_default_one(
    cli: Cli, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "DEFAULT_URL", server.url)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    text = cli("read", "--wait", "0.1").err
    assert re.search("agent-junction send [a-z]+-[a-z]+ < FILE\n", text)


def test_elsewhere_a_wait_says_only_as_whom_it_waits(cli: Cli) -> None:
    err = cli("read", "--wait", "0.1").err
    assert re.fullmatch("waiting as [a-z]+-[a-z]+, up to 0.1 s\nnothing came\n", err)


# --- The command line: what can go wrong


FAILURES = [
    ("send no-body x", b"", 1, "no peer 'no-body'"),
    ("send no-body", b"", 1, "empty"),
    ("read --session swordfish", b"", 1, "JUNCTION_SESSION"),
    ("send no-body", b"ab\xffswordfish", 2, "not UTF-8 at byte 2"),
    ("send no-body", b"swordfish" * 4_000, 2, "32768"),
    ("read", b"", 2, "--wait"),
    ("read --wait 4000", b"", 2, "--wait"),
    ("read --wait 1 --raw --json", b"", 2, "--raw"),
    ("read --wait 1 --output /no/such/file", b"", 2, "'/no/such/file'"),
    ("read --wait 1 --output /dev/null/file", b"", 2, "'/dev/null/file'"),
    ("read --wait 1 --output /dev/null", b"", 2, "'/dev/null'"),
    ("peers --url nonsense", b"", 2, "'nonsense'"),
    ("peers --url http://[::1", b"", 2, "'http://[::1'"),
    ("peers --url http://127.0.0.1:abc", b"", 2, "'http://127.0.0.1:abc'"),
    ("peers --ca /no/such/file", b"", 2, "'/no/such/file'"),
    ("nonsense", b"", 2, "nonsense"),
    ("--nonsense", b"", 2, "--nonsense"),
]


@pytest.mark.parametrize(("arguments", "stdin", "code", "part"), FAILURES)
def test_a_failure_is_one_line_and_leaves_no_peer(
    cli: Cli, server: Server, arguments: str, stdin: bytes, code: int, part: str
) -> None:
    before = get(server, "/health")["activePeers"]
    line = cli(*arguments.split(), stdin=stdin).line(code)
    assert part in line
    assert "swordfish" not in line
    assert get(server, "/health")["activePeers"] == before


def with_closed(streams: str, server: Server, *arguments: str, **variables: str) -> Ended:
    """Run a command some of whose standard streams the shell has closed."""
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, app.__file__, *arguments],
        env=environment(JUNCTION_URL=server.url, PYTHONWARNINGS="", **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
    )
    return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


@posix_only
def test_without_standard_error_only_the_text_is_on_standard_output(server: Server) -> None:
    ann = Agent(server)
    bob = Agent(server)
    ann.send(bob.alias, "swordfish")
    ended = with_closed("2>&-", server, "read", "--raw", JUNCTION_SESSION=bob.session_id)
    assert ended == Ended(0, "swordfish", "")


@posix_only
@pytest.mark.parametrize(
    ("streams", "command", "code"),
    [("<&-", "send a-b", 1), (">&-", "peers", 0), (">&- 2>&-", "send a-b hi", 1)],
)
def test_a_closed_stream_is_no_failure_of_its_own(
    server: Server, streams: str, command: str, code: int
) -> None:
    ended = with_closed(streams, server, *command.split())
    assert ended.code == code
    assert ended.err.count("\n") == ("2>&-" not in streams and code)


def test_a_refusal_is_shown_whole(cli: Cli) -> None:
    refusal = "There is no peer 'no-body'. Call list_peers to see who is here."
    assert cli("send", "no-body", "x").line(1) == f"agent-junction: {refusal}\n"


# One that joins, and two that watch.
any_command = pytest.mark.parametrize("command", ["read --wait 9", "peers", "watch"])

RPC_ANSWERS = [
    "hi",
    "[]",
    '{"result": null}',
    '{"result": {"isError": true}}',
    '{"result": {"content": [], "structuredContent": []}}',
]


@pytest.mark.parametrize("answer", RPC_ANSWERS)
def test_what_answers_a_call_by_something_else_is_not_a_junction(cli: Cli, answer: str) -> None:
    with other_http(answer) as url:
        line = cli("read", "--wait", "9", at=url).line(4)
    assert f"{url}: what answers there is not a junction" in line


EVENT_ANSWERS = [
    ("<html>", "text/html"),
    ("data: x", "text/event-stream"),
    ("data: 3", "text/event-stream"),
    ('data: {"event": "something"}', "text/event-stream"),
]


@pytest.mark.parametrize(("answer", "kind"), EVENT_ANSWERS)
@pytest.mark.parametrize("command", ["peers", "watch", "ring no-body -- true"])
def test_what_tells_no_events_is_not_a_junction(
    cli: Cli, command: str, answer: str, kind: str
) -> None:
    with other_http(answer, kind) as url:
        line = cli(*command.split(), at=url).line(4)
    assert f"{url}: what answers there is not a junction" in line


WHOLE = {"alias": "a-b", "role": "", "repo": "", "task": "", "idle_seconds": 0, "waiting": False}

ODD_PEERS = [
    3,
    {},
    {**WHOLE, "unread": 0, "alias": 5},
    {**WHOLE, "unread": 0, "role": 7},
    {**WHOLE, "unread": 0, "idle_seconds": "x"},
]


@pytest.mark.parametrize("peer", ODD_PEERS)
def test_what_tells_of_odd_peers_is_not_a_junction(cli: Cli, peer: Any) -> None:
    told = "data: " + json.dumps(happening("snapshot", peers=[peer]))
    with other_http(told, "text/event-stream") as url:
        line = cli("peers", at=url).line(4)
    assert f"{url}: what answers there is not a junction" in line


def test_an_alias_from_another_server_drives_no_terminal_and_is_no_markup(cli: Cli) -> None:
    peer = {**WHOLE, "unread": "[/u]", "alias": "[/x]\x1b[2J", "role": "\x1b]0;"}
    told = "data: " + json.dumps(happening("snapshot", peers=[peer]))
    with other_http(told, "text/event-stream") as url:
        ended = cli("peers", at=url)
    assert ended.code == 0
    for cell in ("[/u]", "[/x]\\x1b[2J", "\\x1b]0;"):
        assert cell in ended.out
    assert "\x1b" not in ended.out


def test_a_name_from_another_server_drives_no_terminal_in_watch() -> None:
    sent = {"from": "\x1b[2J", "to": ["a-b"], "to_count": 1, "bytes": 7}
    line = app.Board(MADE_UP_URL).take(happening("message_sent", **sent))
    assert line.endswith(" \\x1b[2J wrote to a-b, 7 bytes")


def test_a_senders_name_from_another_server_drives_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message: app.Message = {"from": "\x1b[2J", "message": "hi", "timestamp": ""}
    app.show_raw({"messages": [message], "remaining": 0})
    assert capsys.readouterr() == ("hi", "from \\x1b[2J\n")


def test_a_message_of_an_impossible_time_is_not_a_junctions() -> None:
    stamp = "0001-01-01T00:00:00+14:00"
    message: app.Message = {"from": "a-b", "message": "hi", "timestamp": stamp}
    with (
        pytest.raises(app.Failure, match="not a junction"),
        app.connected(app.base_url(app.DEFAULT_URL), "", None),
    ):
        app.show_to_people({"messages": [message], "remaining": 0})


def test_control_characters_in_a_refusal_are_escaped(cli: Cli) -> None:
    refusal = {"isError": True, "content": [{"text": "no\n\x1b[2Jway"}]}
    with other_http(json.dumps({"result": refusal})) as url:
        line = cli("read", "--wait", "9", at=url).line(1)
    assert line == "agent-junction: no\\n\\x1b[2Jway\n"


def test_a_command_is_more_patient_than_the_junction_is_silent() -> None:
    with app.http_client(app.base_url(app.DEFAULT_URL), "", None) as http:
        assert http.timeout.read
        assert http.timeout.read > app.PROGRESS_SECONDS


@any_command
def test_a_server_that_knows_no_such_address_is_said(cli: Cli, command: str) -> None:
    with other_http("nothing here", "text/plain", 404) as url:
        line = cli(*command.split(), at=url).line(4)
    assert f"{url}: " in line


def test_one_watcher_too_many_is_told_the_limit(cli: Cli) -> None:
    with other_http("busy", "text/plain", 503) as url:
        line = cli("watch", at=url).line(4)
    assert f"{app.WATCHERS} watch it already" in line


@any_command
def test_where_nobody_answers_the_exit_code_is_4(cli: Cli, command: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    line = cli(*command.split(), at=url).line(4)
    assert f"{url}: no junction answers" in line
    assert "Is it running" in line


def test_where_nobody_answers_at_the_default_address_it_says_how_to_start_one(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{free_port()}/mcp"
    monkeypatch.setattr(app, "DEFAULT_URL", url)
    assert cli("peers", at=url).line(4).endswith(" Start it: agent-junction\n")


@any_command
def test_http_to_a_tls_port_names_the_other_address(
    cli: Cli, tls_server: Server, command: str
) -> None:
    plain = f"http://127.0.0.1:{tls_server.port}"
    line = cli(*command.split(), at=plain, JUNCTION_TOKEN=TOKEN).line(4)
    assert f"a junction answers at https://127.0.0.1:{tls_server.port}" in line


@any_command
def test_https_to_a_plain_port_names_the_other_address(
    cli: Cli, server: Server, command: str
) -> None:
    line = cli(*command.split(), at=server.url.replace("http", "https")).line(4)
    assert f"a junction answers at http://127.0.0.1:{server.port}" in line


@pytest.mark.parametrize(("command", "code"), [("peers", 0), ("send no-body x", 1)])
def test_an_authority_and_a_token_come_by_option_or_variable(
    cli: Cli, tls_server: Server, certificate: str, command: str, code: int
) -> None:
    words = command.split()
    by_option = cli(*words, "--ca", certificate, "--token", TOKEN, at=tls_server.url)
    variables = {"JUNCTION_CA": certificate, "JUNCTION_TOKEN": TOKEN}
    by_variable = cli(*words, at=tls_server.url, **variables)
    assert by_option.code == code
    assert by_option == by_variable


@any_command
def test_an_unknown_authority_is_said_with_the_option_for_it(
    cli: Cli, tls_server: Server, command: str
) -> None:
    line = cli(*command.split(), at=tls_server.url, JUNCTION_TOKEN=TOKEN).line(4)
    assert "certificate is not trusted" in line
    assert "--ca (JUNCTION_CA)" in line


@any_command
def test_a_file_without_certificates_is_a_wrong_authority(
    cli: Cli, tls_server: Server, command: str
) -> None:
    line = cli(*command.split(), "--ca", __file__, at=tls_server.url).line(2)
    assert repr(__file__) in line


def test_a_certificate_for_another_name_is_said(
    cli: Cli, tls_server: Server, certificate: str
) -> None:
    other_name = tls_server.url.replace("127.0.0.1", "localhost")
    line = cli("peers", at=other_name, JUNCTION_CA=certificate).line(4)
    assert "mismatch" in line
    assert "--ca" not in line


@any_command
@pytest.mark.parametrize("token", ["", "swordfish-swordfish"], ids=["none", "wrong"])
def test_a_missing_or_wrong_token_is_said(
    cli: Cli, guarded: Server, command: str, token: str
) -> None:
    line = cli(*command.split(), at=guarded.url, JUNCTION_TOKEN=token).line(4)
    assert "--token or JUNCTION_TOKEN" in line
    assert "swordfish" not in line


def test_a_junction_on_loopback_is_reached_without_a_proxy(cli: Cli, server: Server) -> None:
    proxy = f"http://127.0.0.1:{free_port()}"
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy")
    variables = dict.fromkeys(names, proxy) | {"NO_PROXY": ""}
    for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
        assert cli("peers", at=url, **variables).code == 0


def test_a_servers_bad_variable_or_a_blank_session_stops_no_client(
    cli: Cli, server: Server
) -> None:
    names = ("JUNCTION_PORT", "JUNCTION_TLS_CERT", "JUNCTION_KNOWN_HOSTS", "JUNCTION_HOST")
    variables = dict.fromkeys(names, "x") | {"JUNCTION_SESSION": " "}
    assert cli("peers", **variables).code == 0
    assert cli("send", Agent(server).alias, "x", **variables).code == 0


@pytest.mark.parametrize("ending", ["", "/", "/mcp", "/mcp/"])
def test_an_address_may_be_given_with_or_without_its_path(
    cli: Cli, server: Server, ending: str
) -> None:
    assert cli("peers", at=server.url.removesuffix("/mcp") + ending).code == 0


@posix_only
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 1), (signal.SIGKILL, 4)])
def test_a_server_that_goes_ends_a_waiting_read_with_one_line(
    cli: Cli, how: signal.Signals, code: int
) -> None:
    with running() as there:

        def story() -> None:
            until(lambda: waiting(there) != [])
            there.process.send_signal(how)

        with meanwhile(story):
            ended = cli("read", "--wait", "60", at=there.url)
    assert ended.code == code
    _, line = ended.err.splitlines()
    assert line.startswith("agent-junction: ")


@linux_only
def test_an_output_that_takes_nothing_is_no_traceback(server: Server) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m junction peers --json > /dev/full"],
        env=environment(JUNCTION_URL=server.url),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


# --- The command line: interrupts


@contextlib.contextmanager
def relaying(server: Server, look: Callable[[bytes], object]) -> Iterator[str]:
    """Give the address of a relay to a server. It looks at what it passes on, beforehand."""

    def relay(self: Any) -> None:
        with (
            socket.create_connection(("127.0.0.1", server.port)) as ahead,
            contextlib.suppress(OSError),
        ):
            both = [self.request, ahead]
            while ready := select.select(both, [], [], 20)[0]:
                data = ready[0].recv(1_000_000)
                if not data:
                    break
                look(data)
                target = ahead if ready[0] is self.request else self.request
                target.sendall(data)

    with answering(relay) as address:
        yield address


def interrupt() -> None:
    """Interrupt what runs in this process, as Ctrl-C would."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def interrupting(
    server: Server, moment: int, text: bytes = b"HTTP/1.1"
) -> contextlib.AbstractContextManager[str]:
    """Give the address of a relay that interrupts before it passes something on.

    That is a piece of data with this text, when `moment` pieces had it before.
    """
    pieces = count()

    def look(data: bytes) -> None:
        if text in data and next(pieces) == moment:
            interrupt()

    return relaying(server, look)


# Requests and answers: of register, of the read that takes the message, and of the one
# that finds no more.
@posix_only
@pytest.mark.parametrize("moment", range(6))
def test_an_interrupted_read_of_a_session_loses_no_message(
    cli: Cli, server: Server, moment: int
) -> None:
    ann = Agent(server)
    bob = Agent(server)
    ann.send(bob.alias, "hello")
    with interrupting(server, moment) as address:
        ended = cli("read", "--raw", at=address, JUNCTION_SESSION=bob.session_id)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "agent-junction: interrupted"
    ways = [[ended.out], bob.read(), bob.read(again=True)]
    assert ["hello"] in ways


@posix_only
def test_a_read_interrupted_between_two_pages_shows_the_first(cli: Cli, server: Server) -> None:
    ann = Agent(server)
    bob = Agent(server)
    ann.send(bob.alias, "a" * 20_000)
    ann.send(bob.alias, "b" * 20_000)
    with interrupting(server, 0, b"b" * 100) as address:  # no session_id has that
        ended = cli("read", "--raw", at=address, JUNCTION_SESSION=bob.session_id)
    assert ended.code == 130
    assert ended.out == "a" * 20_000
    assert bob.read(again=True)[-1] == "b" * 20_000


class Friend:
    """An agent that writes to the next one that waits."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.agent = Agent(server)
        self.known = waiting(server)

    def new(self) -> list[str]:
        return [alias for alias in waiting(self.server) if alias not in self.known]

    def writes(self, message: str) -> None:
        until(lambda: self.new() != [])
        (self.alias,) = self.new()
        self.agent.send(self.alias, message)

    def writes_again(self, message: str) -> None:
        self.agent.send(self.alias, message)


# The message's own way; then request and answer of the read that finds no more, and of
# the disconnect.
@posix_only
@pytest.mark.parametrize(
    ("moment", "text"), [(0, b"hello"), *((moment, b"HTTP/1.1") for moment in range(4, 8))]
)
def test_an_interrupted_visitor_shows_what_it_took_once(
    cli: Cli, server: Server, moment: int, text: bytes
) -> None:
    friend = Friend(server)
    with (
        interrupting(server, moment, text) as address,
        meanwhile(lambda: friend.writes("hello")),
    ):
        ended = cli("read", "--wait", "20", "--raw", at=address)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "agent-junction: interrupted"
    assert ended.out == "hello"


def test_a_visitor_shows_what_was_in_an_answer_whose_connection_broke(
    cli: Cli, server: Server
) -> None:
    friend = Friend(server)
    breaks = iter([ConnectionError()])

    def look(data: bytes) -> None:
        if b'"hello"' in data:
            for error in breaks:
                raise error

    with relaying(server, look) as address, meanwhile(lambda: friend.writes("hello")):
        ended = cli("read", "--wait", "20", "--raw", at=address)
    assert ended.out == "hello"
    assert ended.code == 4


@posix_only
def test_a_visitor_interrupted_between_two_pages_shows_both_in_order_and_once(
    cli: Cli, server: Server
) -> None:
    friend = Friend(server)
    steps: list[tuple[bytes, Callable[[], None]]] = [
        (b"aaa", lambda: friend.writes_again("b" * 20_000)),
        (b"bbb", interrupt),
    ]

    def look(data: bytes) -> None:
        if steps and steps[0][0] in data:
            steps.pop(0)[1]()

    with relaying(server, look) as address, meanwhile(lambda: friend.writes("a" * 20_000)):
        ended = cli("read", "--wait", "20", "--raw", at=address)
    assert ended.code == 130
    assert ended.out == "a" * 20_000 + "b" * 20_000


# --- The README says what is so -----------------------------------------------------


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app.cli)
    return dict(group.commands)


def test_the_readme_has_a_row_for_every_option_of_the_server_with_its_variable_and_default() -> (
    None
):
    for option in commands()["serve"].params:
        if option.name == "help":
            continue
        default = "none"
        if option.default:
            default = f"`{option.default}`"
        assert f"| `{option.opts[0]}` | `{option.envvar}` | {default} |" in README


@pytest.mark.parametrize("name", sorted(set(commands()) - {"serve"}))
def test_the_readme_has_a_row_for_every_command_with_its_options(name: str) -> None:
    (row,) = re.findall(rf"^\| `agent-junction {name}\b.*$", README, re.MULTILINE)
    for option in commands()[name].params:
        if option.param_type_name == "argument":
            continue
        if option.envvar:
            assert f"`{option.opts[0]}` (`{option.envvar}`" in README
        else:
            assert option.opts[0] in row


def test_the_readme_states_the_limits_as_they_are() -> None:
    longest = app.LONE_ANSWER_BYTES - app.ENVELOPE_BYTES
    assert f"{app.MESSAGE_BYTES:,} bytes of UTF-8, and {longest:,} bytes as JSON" in README
    assert f"{app.INBOX_MESSAGES:,} messages and {app.INBOX_BYTES // 1024**2} MiB" in README
    assert f"{app.JUNCTION_PEERS:,} peers; {app.JUNCTION_BYTES // 1024**2} MiB" in README
    assert f"{app.JUNCTION_MESSAGES:,} messages; {app.WATCHERS} watchers" in README
    assert f"of {app.LABEL_CHARACTERS} printable characters each" in README
    assert f"waits of up to {app.WAIT_SECONDS:,} s" in README
    assert f"{app.ANSWER_BYTES:,} bytes as JSON" in README
    assert f"{app.HEAD_BYTES // 1024} KiB and {app.HEAD_FIELDS} fields of head" in README
    assert f"{app.BODY_BYTES // 1024} KiB of body" in README
    assert f"{app.STUCK_SECONDS} to {2 * app.STUCK_SECONDS} s" in README
    assert f"until {app.AGAIN_SECONDS} seconds after" in README


def test_the_readme_names_every_event_and_every_client() -> None:
    for event in ("snapshot", "peer_joined", "peer_left", "message_sent", "messages_read"):
        assert f"`{event}`" in README
    for client in app.CLIENTS.values():
        program = client.add.partition(" ")[0]
        assert re.search(program, README, re.IGNORECASE)


@pytest.mark.parametrize(
    "begin", ["agent-junction ring ALIAS -- ", "JUNCTION_SESSION=<session_id> "]
)
async def test_the_readme_wakes_a_client_by_the_same_line_as_the_tools_text(begin: str) -> None:
    tool = await app.mcp.get_tool("read_messages")
    assert tool
    text = " ".join((tool.description or "").split())
    (line,) = re.findall(rf"`({re.escape(begin)}[^`]*)`", text)
    assert f"`{line}`" in README


def lines_to_run() -> list[str]:
    """Return the command lines of ours that the README shows, without those of a table."""
    shown = re.findall(r"(?:^|`)(agent-junction(?: [^`\n]+)?)(?=`|$)", README, re.MULTILINE)
    return sorted({line for line in shown if "[" not in line})


@pytest.mark.parametrize("line", lines_to_run())
def test_the_command_line_takes_what_the_readme_shows(
    line: str, certificate: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(certificate, tmp_path / "cert.pem")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.partition(" < ")[0])[1:]
    if not words or words[0].startswith("-"):
        words = ["serve", *words]
    name, *arguments = words
    context = commands()[name].make_context(name, arguments)
    assert context.params.keys() == {option.name for option in commands()[name].params} - {"help"}


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl here")
def test_the_certificate_of_the_readme_serves_and_is_trusted(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (shown,) = re.findall(r"^openssl req .*\\\n.*$", README, re.MULTILINE)
    command = shlex.split(shown.replace("\\\n", ""))
    monkeypatch.chdir(tmp_path)
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    files = ["--tls-cert", "cert.pem", "--tls-key", "key.pem"]
    with running(*files) as there:
        ended = cli("peers", "--ca", "cert.pem", at=there.url)
    assert ended == Ended(0, "nobody is here\n", "")


def test_no_line_of_prose_in_the_readme_is_wider_than_120_columns() -> None:
    wide = [line for line in README.splitlines() if len(line) > 120 and line[0] != "|"]
    assert wide == []


# The picture of `watch`. It is drawn from a real run: the peers below, their messages, and
# what /events told of them.

PICTURE = Path(__file__).parent / ".github" / "watch.svg"
LABELS = [
    {"role": "backend", "repo": "shop-api", "task": "receipts to S3, then the retry queue"},
    {"role": "frontend", "repo": "web-shop", "task": "checkout page"},
    {"role": "review", "repo": "shop-api", "task": "pull request 118"},
    {"role": "ops", "repo": "infra", "task": ""},
]
MADE_UP_URL = app.base_url(app.DEFAULT_URL)


def as_svg(board: app.Board) -> str:
    """Return what a board shows on a terminal of 92 by 15."""
    console = Console(record=True, width=92, height=15, file=io.StringIO(), force_terminal=True)
    console.print(board.picture(92, 15))
    return console.export_svg(title="agent-junction watch", unique_id="watch")


def make_picture() -> None:
    """Write the picture anew: let four agents meet, write and read, and draw what is told."""
    board = app.Board(MADE_UP_URL)
    with running() as there, app.http_client(app.base_url(there.url), "", None) as http:
        told = app.follow(http)
        board.take(next(told))
        agents = [Agent(there, **labels) for labels in LABELS]
        shop, web, review, ops = agents
        answer = web.begin_read()
        web.send(shop.alias, "Which bucket do receipts go to?")
        shop.send(web.alias, "s3://shop-receipts-eu, prefix 2026/")
        receive(answer, b"shop-receipts-eu")
        answer = web.begin_read()
        shop.read()
        review.send(shop.alias, "Two comments on the retry queue.")
        ops.send("*", "deploy at 5")
        receive(answer, b"deploy at 5")
        with web.begin_read():
            for event in told:
                board.take(event)
                waits = [peer for peer in event.get("peers", []) if peer["waiting"]]
                if waits and board.peers[0]["idle_seconds"] >= 3:
                    break
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(as_svg(board), "utf-8")


def texts_of(svg: str) -> list[str]:
    """Return the lines that a picture shows."""
    lines: dict[float, str] = {}
    for y, text in re.findall(r'<text [^>]*\by="([\d.]+)"[^>]*>([^<]*)</text>', svg):
        cell = html.unescape(text).replace("\xa0", " ").strip()
        lines[float(y)] = f"{lines.get(float(y), '')} {cell}".strip()
    return [lines[y] for y in sorted(lines)]


def test_the_picture_in_the_readme_is_what_watch_draws() -> None:
    assert "(.github/watch.svg)" in README
    svg = PICTURE.read_text("utf-8")
    lines = texts_of(svg)
    board = app.Board(MADE_UP_URL)
    board.is_away = False
    happened = [line for line in lines if re.match(r"\d\d:\d\d:\d\d ", line)]
    board.latest.extend(happened)
    for labels in LABELS:
        (row,) = [line for line in lines if re.search(rf"^[a-z]+-[a-z]+ +{labels['role']} ", line)]
        ago = re.search(r" (\d+)s ago", row)
        unread = re.search(r"(?:ago|waiting) (\d+)$", row)
        peer = {
            **labels,
            "alias": row.split()[0],
            "waiting": " waiting" in row,
            "idle_seconds": int(ago[1]) if ago else 0,
            "unread": int(unread[1]) if unread else 0,
        }
        board.peers.append(peer)
    assert as_svg(board) == svg


if __name__ == "__main__":
    make_picture()
