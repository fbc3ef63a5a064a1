"""What the junction promises, in its file's order: sealing, the junction, the tools, the server, the command line.

The core is tested with a given clock. Where transport is the point, a real server runs in a process of its own and real
clients speak to it over HTTP, in both protocol eras.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import ipaddress
import json
import math
import os
import re
import select
import selectors
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
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import AsyncMock, Mock

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
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rich.console import Console

import junction as app  # before FastMCP: it clears FastMCP's variables
from junction import Junction, Peer

LEGACY, MODERN = "legacy", "2026-07-28"
ERAS = [LEGACY, MODERN]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> str:
        start = datetime(2026, 1, 1, tzinfo=timezone.utc)
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


# --- Sealing ----------------------------------------------------------------------------------------------------------


def test_what_is_sealed_opens_with_its_key_for_its_parties_and_for_nothing_else() -> None:
    bob = Peer("bob", b"", app.make_key(), "", 0)
    message: app.Message = {"from": "ann", "message": "attack at dawn", "timestamp": "now"}
    made = [app.seal(bob, message, 0) for _ in range(100)]
    assert all(app.unseal(bob, sealed) == message for sealed in made)
    assert len({sealed.nonce for sealed in made}) == len({sealed.ciphertext[:14] for sealed in made}) == 100
    sealed = made[0]

    def flipped(data: bytes) -> Iterator[bytes]:
        yield from (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data)))

    attempts = [
        *((bob, replace(sealed, nonce=nonce)) for nonce in flipped(sealed.nonce)),
        *((bob, replace(sealed, ciphertext=ciphertext)) for ciphertext in flipped(sealed.ciphertext)),
        *((bob, replace(sealed, sender=sender)) for sender in ("eve", "bob", "")),
        *((replace(bob, alias=alias), sealed) for alias in ("eve", "ann", "")),
        *((replace(bob, key=key), sealed) for key in (app.make_key(), bytearray(32))),
    ]
    for peer, what in attempts:
        with pytest.raises(InvalidTag):
            app.unseal(peer, what)
    app.wipe(bob.key)
    assert bob.key == bytes(32)


SCAN = """
import asyncio, junction, os, signal, time
signal.signal(signal.SIGUSR1, lambda *_: signal.alarm(20))
signal.alarm(20)
clock = 0
here = junction.Junction(clock=lambda: clock)
ann, bob, cid, dan = (here.find(here.register("", "", "", "")["session_id"]) for _ in range(4))
for peer in (bob, cid, dan):
    here.send(ann, peer.alias, "a secret")
    asyncio.run(here.read(peer))
    asyncio.run(here.read(peer, again=True))
    here.send(ann, peer.alias, "a secret")
print(*(bytes(byte ^ 0x5A for byte in peer.key).hex() for peer in (bob, cid, dan)), flush=True)  # not the keys as such
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


def copies_in_memory(pid: int, needles: list[bytes]) -> list[int]:
    found = [0] * len(needles)
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for begin, end in re.findall(r"^(\w+)-(\w+) rw", maps.read(), re.MULTILINE):
            with contextlib.suppress(OSError, ValueError):
                memory.seek(int(begin, 16))
                content = memory.read(int(end, 16) - int(begin, 16))
                found = [number + content.count(needle) for number, needle in zip(found, needles, strict=True)]
    return found


@LINUX
def test_no_copy_of_a_key_is_left_in_memory_once_its_peer_left_fell_idle_or_the_junction_closed() -> None:
    with subprocess.Popen([sys.executable, "-c", SCAN], stdin=-1, stdout=-1, text=True, env=environment()) as child:
        assert child.stdout
        keys = [bytes(byte ^ 0x5A for byte in bytes.fromhex(word)) for word in child.stdout.readline().split()]
        assert all(copies_in_memory(child.pid, keys)), "the scan must find the keys that are in use"
        child.send_signal(signal.SIGUSR1)
        assert child.stdout.readline() == "\n"
        assert copies_in_memory(child.pid, keys) == [0, 0, 0]
        child.kill()


def test_each_pair_of_fitting_words_is_an_alias_once(here: Junction, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [*islice(app.aliases(), 20_000)]
    assert all(re.fullmatch("[a-z]{3,9}-[a-z]{3,9}", alias) for alias in drawn)
    assert len(set(drawn)) == len(drawn)
    assert drawn[:20] != [*islice(app.aliases(), 20)], "the order differs each time"
    lists = {"adjective": ["calm", "racial", "rude", "red"], "noun": ["fox", "slave", "owl"], "profanity": ["rude"]}
    monkeypatch.setattr(app, "words", lists.__getitem__)
    here.names = app.aliases()
    assert sorted(join(here).alias for _ in range(4)) == ["calm-fox", "calm-owl", "red-fox", "red-owl"]
    with refused(here, "all of its aliases.*restart"):
        join(here)


def test_the_word_lists_hold_no_slur_that_is_not_blocked_and_no_word_is_blocked_for_nothing() -> None:
    candidates = {*app.words("adjective"), *app.words("noun")}
    left = candidates - {*app.BLOCKED_WORDS, *app.words("profanity")}
    slurs = "rape|racial|racist|slave|spade|nappy|uppity|savage|dwarf|nymph|pimp"
    assert not [word for word in left if re.fullmatch(slurs, word)]
    assert not any(map(wonderwords.is_profanity, left))
    assert candidates.issuperset(app.BLOCKED_WORDS)
    assert len(left) > 4_000


# --- The junction ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refused(here: Junction, pattern: str) -> Iterator[None]:
    """What is called within must be refused with such a text; nothing changes, and nobody hears of it."""
    told: list[Any] = []
    here.listeners.append(told.append)
    before = here.snapshot(), here.messages, here.size
    with pytest.raises(ToolError, match=pattern):
        yield
    assert (here.snapshot(), here.messages, here.size, told) == (*before, [])


def units(value: object) -> int:
    """UTF-16 code units as JSON, non-ASCII unescaped: what clients count."""
    return len(json.dumps(value, ensure_ascii=False).encode("utf-16-le")) // 2


def test_a_session_id_has_128_random_bits_is_not_kept_and_resumes_with_the_same_inbox(here: Junction) -> None:
    ann, got = join(here), here.register("リポ" * 100, "Öl & Größe", "🦅", "")
    session_id, bob = got["session_id"], here.find(got["session_id"])
    assert got == {"alias": bob.alias, "session_id": session_id, "peer_count": 1, "unread": 0}
    assert re.fullmatch("[0-9a-f]{32,}|[A-Za-z0-9_-]{22,}", session_id)
    assert session_id not in repr(here)
    assert here.register("", "", "", "")["session_id"] != session_id
    here.send(ann, bob.alias, "hello")
    assert here.register("", "new task", "", session_id) == {**got, "peer_count": 2, "unread": 1}
    assert (bob.repo, bob.task, bob.role) == ("リポ" * 100, "new task", "🦅")


@pytest.mark.parametrize("session_id", ["x" * 9, "0" * 32, "__proto__", "\ud800", "\0", "💥" * 1000])
def test_a_session_id_that_nobody_has_is_refused_without_being_quoted(here: Junction, session_id: str) -> None:
    join(here)
    for use in (here.find, lambda guess: here.register("", "", "", guess)):
        with refused(here, f"^((?!{session_id}).)*unknown or expired.*Call register"):
            use(session_id)


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31m", "\u202egpj.exe", "\ud800", "x" * 201])
@pytest.mark.parametrize("name", ["repo", "task", "role"])
def test_a_label_must_be_printable_and_at_most_200_characters(here: Junction, text: str, name: str) -> None:
    session_id = here.register("fine", "fine", "fine", "")["session_id"]
    labels = {"repo": "new", "task": "new", "role": "new", name: text}
    for resumed in ("", session_id):
        with refused(here, f"^{name} .*(201 characters.* 200|unprintable).* Call"):
            here.register(**labels, session_id=resumed)


async def test_a_peer_sees_the_others_of_a_role_or_all_and_not_itself(here: Junction, clock: Clock) -> None:
    ann, bob = join(here, "x"), here.find(here.register("api", "tests", "backend", "")["session_id"])
    here.send(ann, bob.alias, "hello")
    clock.seconds = 61.7
    info = {"alias": bob.alias, "repo": "api", "task": "tests", "role": "backend", "idle_seconds": 61, "waiting": False}
    info["connected_at"] = "2026-01-01T00:00:00.000+00:00"
    seen = {**info, "unread_from_you": 1}
    assert await here.list_peers(ann) == {"peers": [seen], "remaining": 0, "unread": 0}
    assert [(await here.list_peers(ann, role))["peers"] for role in ("backend", "back", "x")] == [[seen], [], []]
    snapshot = here.snapshot()
    assert snapshot["peers"][1] == {**info, "unread": 1}
    by_bob = await here.list_peers(bob)
    assert ([peer["unread_from_you"] for peer in by_bob["peers"]], by_bob["unread"]) == ([0], 1)
    assert [snapshot[key] for key in ("event", "mode", "uptime")] == ["snapshot", "localhost", 61]


@pytest.mark.parametrize("label", ['"' * 200, "🦅" * 200, "x"])
async def test_a_list_of_peers_stays_short_enough_and_counts_the_rest(here: Junction, label: str) -> None:
    ann, *_ = join(here), [here.register(label, label, label, "") for _ in range(300)]
    answer = await here.list_peers(ann)
    assert 28_000 < units(answer) <= 30_000
    assert len(answer["peers"]) + answer["remaining"] == 300


def test_the_junction_takes_ten_thousand_peers_and_not_one_more(here: Junction) -> None:
    peers = [join(here) for _ in range(10_000)]
    with refused(here, "full: 10000 peers.*Call register again"):
        join(here)
    here.leave(peers[0])
    join(here)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=500))
@example("\"\\'\n\r\t\u2028\0é vs é, ḍ̇, \U0001f468\u200d\U0001f469\u200d\U0001f467, \u202e, \ufeff")
@example("x" * (32_768 - 13_107) + '"\n' * 6_553 + "\n")  # two fifths of the longest message
@example("日🦅" * 4_681 + "x")
@settings(deadline=None, max_examples=60)
async def test_any_text_is_sealed_and_read_once_as_it_was_sent(text: str) -> None:
    clock = Clock()
    here = Junction(clock=clock, now=clock.now, names=iter(["quiet-otter", "misty-harbor"]))
    ann, bob = join(here), join(here)
    clock.seconds = 1.5
    here.send(ann, bob.alias, text)
    assert len(text) < 8 or text not in repr(here)
    message = {"from": ann.alias, "message": text, "timestamp": "2026-01-01T00:00:01.500+00:00"}
    assert await here.read(bob) == {"messages": [message], "remaining": 0}
    assert await here.read(bob) == {"messages": [], "remaining": 0}


@pytest.mark.parametrize(
    ("target", "text", "why"),
    [
        ("misty-harbor", "日" * 10_922 + "xxx", r"32769 bytes.*32768\. Send it in parts"),
        ("misty-harbor", "\0" * 10_000, r"60\d\d\d characters as JSON.*4\d\d\d\d\. Send it in parts"),
        ("misty-harbor", "a\ud800b", "surrogate at 1.*Send"),
        ("misty-harbor", "", "empty.*Call send_message again"),
        ("quiet-otter", "hello", "quiet-otter is you.*list_peers"),
        ("misty_harbor", "hello", "no peer 'misty_harbor'.*misty-harbor.*list_peers"),
        (" Misty-Harbour", "hello", "no peer ' Misty-Harbour'.*misty-harbor.*list_peers"),
        *((odd, "hello", "^There is no peer .{,150}$") for odd in ("", "junction", "x" * 99_999, "\ud800")),
    ],
)
def test_what_cannot_be_sent_is_refused(here: Junction, target: str, text: str, why: str) -> None:
    here.names = iter(["quiet-otter", "misty-harbor"])
    ann, _ = join(here), join(here)
    with refused(here, why):
        here.send(ann, target, text)


@pytest.mark.parametrize(("text", "each"), [("x", 500), ("x" * 32_768, 64)])
async def test_a_sender_fills_half_an_inbox_and_then_a_broadcast_fails(here: Junction, text: str, each: int) -> None:
    ann, bob, cid, dan, eve = (join(here) for _ in range(5))
    here.send(ann, dan.alias, "unread")
    for sender in (bob, cid) * each:
        here.send(sender, ann.alias, text)
    for sender, part in ((bob, 1), (cid, 1), (eve, 2)):
        held, limit = f"{part * each} .* {part * each * len(text)} bytes", f"{part * 500}.* {part * 2_097_152} bytes"
        for target in (ann.alias, "*"):
            with refused(here, f"{ann.alias} .*{held}; .*{limit}.*Send again"):
                here.send(sender, target, "x")
    here.leave(dan)
    assert len((await here.read(ann, sender="junction"))["messages"]) == 1, "limits do not hold notices back"
    await here.read(ann)
    assert here.send(eve, "*", "x")["to_count"] == 3


async def test_the_junction_holds_256_mib_and_not_a_byte_more(here: Junction) -> None:
    ann, bob, *_ = [join(here) for _ in range(129)]
    for _ in range(64):
        here.send(ann, "*", "x" * 32_768)
    zoe = join(here)
    for _ in range(2):
        with refused(here, "junction is full: 8192 messages, 268435456 bytes.* 268435456 bytes. Send again when"):
            here.send(ann, zoe.alias, "x")
        await here.read(bob)  # what was read is kept for again=true, and counts until it is erased
    here.leave(bob)
    with refused(here, "junction is full"):
        here.send(zoe, "*", "x" * 32_768)
    here.send(ann, zoe.alias, "x")


@given(st.lists(st.tuples(st.sampled_from('x"é🦅\n'), st.integers(1, 16_000)), min_size=1, max_size=12), st.booleans())
@settings(max_examples=60, deadline=None)
async def test_a_read_answers_in_as_many_whole_messages_as_fit(shapes: list[tuple[str, int]], filtered: bool) -> None:
    here = Junction()
    ann, bob, cid = join(here), join(here), join(here)
    sent = [character * min(size, 32_768 // len(character.encode())) for character, size in shapes]
    for text in sent:
        for sender in (ann, cid)[: 1 + filtered]:
            here.send(sender, bob.alias, text)
    took, others = 0, len(sent) * filtered
    while messages := (answer := await here.read(bob, sender=ann.alias * filtered))["messages"]:
        assert [message["message"] for message in messages] == sent[took : took + len(messages)]
        for given_out in (answer, await here.read(bob, again=True)):
            assert given_out["messages"][-len(messages) :] == messages
            assert units(given_out) <= (30_000 if len(given_out["messages"]) > 1 else 48_000)
        took += len(messages)
        assert answer["remaining"] == len(sent) - took + others
        assert took == len(sent) or units(answer) + units(sent[took]) > 29_500
    assert (took, answer["remaining"]) == (len(sent), others)


async def test_sixteen_concurrent_reads_get_each_message_once_in_order(here: Junction) -> None:
    ann, bob = join(here), join(here)
    sent = [str(number) for number in range(500)]
    for text in sent:
        here.send(ann, bob.alias, text)
    answers = await asyncio.gather(*(here.read(bob) for _ in range(16)))
    assert [message["message"] for answer in answers for message in answer["messages"]] == sent


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop that moves the clock on instead of sleeping. Its timers can be too early, as libuv's are."""

    def __init__(self, clock: Clock, early: float = 0) -> None:
        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
                assert timeout is not None, "everything waits, and no time will end it"
                clock.seconds += max(timeout - early, 1e-4 * (timeout > 0))
                return super().select(0)

        self.clock = clock
        super().__init__(Selector())

    def time(self) -> float:
        return math.ceil(self.clock.seconds * 1_000) / 1_000


@pytest.mark.parametrize("seconds", [-1, -0.001, 3_600.5, float("nan"), float("inf")])
async def test_a_wait_out_of_range_is_refused_and_ends_no_older_read(here: Junction, seconds: float) -> None:
    peer = join(here)
    reading = asyncio.create_task(here.read(peer, 3_600))
    await settle()
    for call_ in (here.list_peers(peer, "", seconds), here.read(peer, seconds), here.read(peer, seconds, again=True)):
        with refused(here, r"^wait_seconds is .*0 to 3600\. Call"):
            await call_
    assert reading.cancel(), "it has not ended"


@pytest.mark.parametrize("turns", range(app.CANCEL_TURNS + 1))
async def test_a_read_cancelled_just_after_mail_came_takes_nothing(
    here: Junction, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    monkeypatch.setattr(app, "PROGRESS_SECONDS", 0)  # so it is reporting progress, the most delicate moment
    ann, bob, written = join(here), join(here), asyncio.get_running_loop().create_future()
    here.report = lambda *_: written
    reading = asyncio.create_task(here.read(bob, 3_600))
    await settle()
    here.send(ann, bob.alias, "hello")
    written.set_result(None)
    for _ in range(turns):
        await asyncio.sleep(0)
    reading.cancel()
    await settle()
    assert len((await here.read(bob))["messages"]) == 1


async def test_list_peers_waits_for_somebody_of_the_role_and_does_not_fall_idle(here: Junction, clock: Clock) -> None:
    ann, session_id = join(here), here.register("", "", "frontend", "")["session_id"]
    listing = [asyncio.create_task(here.list_peers(ann, role, 3_600)) for role in ("backend", "tester")]
    await settle()
    clock.seconds = 1_900
    seen = (await here.list_peers(here.find(session_id), "", 3_600))["peers"]  # who is here is not waited for
    assert [(peer["idle_seconds"], peer["waiting"]) for peer in seen] == [(0, False)], "only who reads is waiting"
    join(here, "frontend")
    await here.sweep()
    await settle()
    assert not any(task.done() for task in listing)
    bob = join(here, "backend")
    here.register("", "", "tester", session_id)  # takes it on
    await settle()
    found = [[peer["alias"] for peer in task.result()["peers"]] for task in listing]
    assert found == [[bob.alias], [here.find(session_id).alias]]


@pytest.mark.parametrize("closes", [False, True])
async def test_leaving_or_closing_erases_everything_and_answers_who_waits(here: Junction, closes: bool) -> None:
    session_id = here.register("", "", "", "")["session_id"]
    ann, bob = here.find(session_id), join(here)
    here.send(ann, bob.alias, "hello")
    here.send(bob, ann.alias, "unread")
    calls = [asyncio.create_task(here.read(ann, 9, "junction")), asyncio.create_task(here.list_peers(ann, "tester", 9))]
    await settle()
    assert closes or here.leave(ann) == 1
    here.close()
    for task in calls:
        with pytest.raises(ToolError, match="shutting down" if closes else f"{ann.alias} left during.*Call register"):
            await task
    assert (here.peers, here.messages, here.size) == ({}, 0, 0)
    assert ann.key == bob.key == bytes(32)
    with refused(here, "unknown or expired.*Call register"):
        here.find(session_id)
    with refused(here, "shutting down.*Call register when"):
        join(here)


@pytest.mark.parametrize("early", [0, 0.0009])
@pytest.mark.parametrize("seconds", [10, 40, 45, 46])
def test_a_waiting_call_reports_progress_each_15_s_with_the_limit_and_no_burst_at_the_end(
    here: Junction, clock: Clock, seconds: float, early: float
) -> None:
    peer, reports = join(here), list[tuple[int, float]]()

    async def report(waited: float, limit: float) -> None:
        reports.append((round(waited), limit))

    here.report = report
    with contextlib.closing(VirtualTime(clock, early)) as loop:
        for waiting in (here.read(peer, seconds), here.list_peers(peer, "", seconds)):
            began, answer = clock.seconds, loop.run_until_complete(waiting)
            assert list(answer.values())[:2] == [[], 0]
            assert clock.seconds - began == pytest.approx(seconds, abs=0.006)
            due = [(waited, seconds) for waited in (15, 30, 45) if waited < seconds]
            assert reports in (due, [*due, (seconds, seconds)])
            reports.clear()


async def test_one_broadcast_reaches_and_wakes_a_thousand_and_names_a_hundred(here: Junction) -> None:
    ann = join(here)
    with refused(here, "Nobody else is here.*list_peers"):
        here.send(ann, "*", "hello")
    others = [join(here) for _ in range(1_000)]
    reading = [asyncio.create_task(here.read(peer, 3_600)) for peer in others]
    await settle()
    assert {peer["waiting"] for peer in (await here.list_peers(ann))["peers"]} == {True}
    sent = here.send(ann, "*", "hello")
    assert sent["to"] == [peer.alias for peer in others[:100]]
    assert sent["to_count"] == sent["waiting"] == 1_000
    assert [len(answer["messages"]) for answer in await asyncio.gather(*reading)] == [1] * 1_000


async def test_listeners_are_told_what_happens_but_no_text_and_no_session_id(here: Junction, clock: Clock) -> None:
    told: list[dict[str, Any]] = []
    here.listeners += [told.append, lambda event: None]
    handles = [here.register("api", "tests", "backend", "")["session_id"] for _ in range(3)]
    ann, bob, cid = map(here.find, handles)
    here.send(ann, bob.alias, "swordfish €")
    here.send(ann, "*", "swordfish")
    for again in (False, True, False):
        await here.read(bob, again=again)
    here.leave(cid)
    clock.seconds = ann.seen = 1_801
    await here.sweep()
    facts: list[dict[str, Any]] = [
        *({"event": "peer_joined", "alias": peer.alias, "repo": "api", "role": "backend"} for peer in (ann, bob, cid)),
        {"event": "message_sent", "from": ann.alias, "to": [bob.alias], "bytes": 13},
        {"event": "message_sent", "from": ann.alias, "to": [bob.alias, cid.alias], "bytes": 9},
        {"event": "messages_read", "alias": bob.alias, "count": 2},
        {"event": "peer_left", "alias": cid.alias, "why": "left"},
        {"event": "peer_left", "alias": bob.alias, "why": "fell idle", "timestamp": "2026-01-01T00:30:01.000+00:00"},
    ]
    for event, expected in zip(told, facts, strict=True):
        assert ({"timestamp": "2026-01-01T00:00:00.000+00:00"} | expected).items() <= event.items()
    assert not re.search("|".join(["swordfish", *handles]), json.dumps(told) + repr(here))


# --- The junction, against a model ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Text:
    sender: str
    text: str  # of a notice: how it begins and, after a |, how it ends
    until: float = math.inf  # once read, when it can no longer be repeated


class Mailboxes(RuleBasedStateMachine):
    """Any order of calls, waits, resets and time passing, against the plainest model of it: lists of texts."""

    peers = st.runner().flatmap(lambda self: st.sampled_from([*self.inboxes]))  # of those who are here
    senders = st.sampled_from(["", "", "junction", "nobody"]) | peers

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.loop = VirtualTime(self.clock)
        self.run = self.loop.run_until_complete
        self.here = Junction(clock=self.clock, now=self.clock.now, names=map("peer-{}".format, count()))
        self.handles: dict[str, str] = {}
        self.inboxes: dict[str, list[Text]] = {}
        self.read_before: dict[str, list[Text]] = {}
        self.seen: dict[str, float] = {}
        self.readers: dict[str, Any] = {}  # of each waiting read: whose messages it wants, until when, and its task
        self.numbers = count()
        self.deliver()

    def teardown(self) -> None:
        with contextlib.closing(self.loop):
            self.here.close()
            self.run(settle())
        assert all("shutting down" in str(task.exception()) for *_, task in self.readers.values())
        assert (self.here.messages, self.here.size) == (0, 0)

    def peer(self, alias: str) -> Peer:
        self.seen[alias] = self.clock.seconds
        for sent in self.read_before[alias]:
            sent.until = min(sent.until, self.clock.seconds + 60)
        return self.here.find(self.handles[alias])

    def reading(self, alias: str, wanted: str, seconds: float = 0, again: bool = False) -> asyncio.Task[app.Read]:
        return self.loop.create_task(self.here.read(self.peer(alias), seconds, wanted, again))

    def mail(self, alias: str, wanted: str) -> list[Text]:
        return [sent for sent in self.inboxes[alias] if wanted in ("", sent.sender)]

    def check(self, alias: str, answer: app.Read, expected: list[Text]) -> None:
        assert answer["remaining"] == len(self.inboxes[alias])
        for message, sent in zip(answer["messages"], expected, strict=True):
            begins, _, ends = sent.text.partition("|")
            assert message["from"] == sent.sender
            assert message["message"] == sent.text or (ends and re.fullmatch(f"{begins}.* {ends}.", message["message"]))

    def take(self, alias: str, wanted: str, answer: app.Read) -> None:
        taken = self.mail(alias, wanted)
        self.inboxes[alias] = [sent for sent in self.inboxes[alias] if sent not in taken]
        self.check(alias, answer, taken)
        self.read_before[alias] += [Text(sent.sender, sent.text) for sent in taken]

    def ends(self, task: asyncio.Task[app.Read], why: str) -> None:
        with pytest.raises(ToolError, match=why):
            self.run(task)

    def take_over(self, alias: str, *newer: Any) -> None:
        older = self.readers.pop(alias, None)
        self.readers.update({alias: newer} if newer else {})
        if older:
            self.ends(older[2], "newer read.* took over and gets the messages.* not repeat")

    def deliver(self) -> None:
        """Let everything run: exactly the reads that have something to answer must have ended, with that."""
        while len(self.inboxes) < 2:
            self.register()
        self.run(settle())
        for alias, (wanted, until, task) in [*self.readers.items()]:
            mail, may_come = self.mail(alias, wanted), wanted in ("", "junction", *self.inboxes)
            assert task.done() == (bool(mail) or not may_come or self.clock.seconds >= until)
            if task.done():
                del self.readers[alias]
                self.seen[alias] = min(self.clock.seconds, until)
                if mail or may_come:
                    self.take(alias, wanted, task.result())
                else:
                    self.ends(task, f"no peer '{wanted}'.*list_peers")

    def erase(self, alias: str, why: str) -> None:
        lost = [sent.sender for sent in self.inboxes.pop(alias)]
        for sender in {*lost} & {*self.inboxes}:
            self.inboxes[sender].append(Text("junction", f"{alias} {why}|{lost.count(sender)}"))
        if reading := self.readers.pop(alias, None):
            self.ends(reading[2], f"{alias} left during.*Call register")

    def put(self, sender: str, to: str) -> None:
        text = str(next(self.numbers))
        targets = [alias for alias in self.inboxes if alias != sender and to in (alias, "*")]
        with contextlib.nullcontext() if targets else pytest.raises(ToolError):
            sent = self.here.send(self.peer(sender), to, text)
            assert sent["to"] == targets
            woken = [alias for alias in targets if alias in self.readers and self.readers[alias][0] in ("", sender)]
            assert (sent["waiting"], sent["unread"]) == (len(woken), len(self.inboxes[sender]))
        for alias in targets:
            self.inboxes[alias].append(Text(sender, text))

    @precondition(lambda self: len(self.inboxes) < 4)  # so few are swept within the turns for which a read holds back
    @rule()
    def register(self) -> None:
        got = self.here.register("", "", "", "")
        alias = got["alias"]
        self.handles[alias], self.seen[alias] = got["session_id"], self.clock.seconds
        self.inboxes[alias], self.read_before[alias] = [], []
        assert got["peer_count"] == len(self.inboxes) - 1

    @rule(sender=peers, to=peers | st.just("*"))
    def send(self, sender: str, to: str) -> None:
        self.put(sender, to)
        self.deliver()

    @rule(alias=peers, wanted=senders)
    def read(self, alias: str, wanted: str) -> None:
        self.take(alias, wanted, self.run(self.reading(alias, wanted)))

    @rule(alias=peers, wanted=senders, seconds=st.sampled_from([0, 50]))
    def again(self, alias: str, wanted: str, seconds: float) -> None:
        answer = self.run(self.reading(alias, wanted, seconds, True))
        kept = [sent for sent in self.read_before[alias] if sent.until >= self.clock.seconds]
        self.check(alias, answer, [sent for sent in kept if wanted in ("", sent.sender)])
        self.take_over(alias)

    @rule(alias=peers, wanted=senders, seconds=st.sampled_from([59, 1_000, 3_600]))
    def wait(self, alias: str, wanted: str, seconds: float) -> None:
        task = self.reading(alias, wanted, seconds)
        if wanted in ("", "junction", *self.inboxes) or self.mail(alias, wanted):
            self.take_over(alias, wanted, self.clock.seconds + seconds, task)
        else:  # an older read waits on
            self.ends(task, f"no peer '{wanted}'.*list_peers")
        self.deliver()

    @rule(sender=peers, to=peers, turns=st.integers(0, app.CANCEL_TURNS - 2), then=st.sampled_from("crw"))
    def vanish_or_read_as_a_message_may_come(self, sender: str, to: str, turns: int, then: str) -> None:
        if to not in self.readers:
            return
        wanted, _, older = self.readers[to]

        async def soon() -> asyncio.Task[app.Read]:
            for _ in range(turns):
                await asyncio.sleep(0)
            return older if then == "c" and older.cancel() else self.reading(to, wanted, 100 * (then == "w"))

        if sender != to:
            self.put(sender, to)
        task = self.run(soon())
        if then == "c":
            del self.readers[to]
        elif then == "r":
            self.take(to, wanted, self.run(task))
        else:
            self.take_over(to, wanted, self.clock.seconds + 100, task)
        self.deliver()
        self.seen[to] = self.clock.seconds

    @rule(alias=peers)
    def leave(self, alias: str) -> None:
        assert self.here.leave(self.peer(alias)) == len(self.inboxes[alias])
        self.erase(alias, "left")
        self.deliver()

    @rule(seconds=st.sampled_from([1, 30, 60, 60.5, 900, 1_801]))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))
        self.deliver()
        self.run(self.here.sweep())
        for alias in [*self.inboxes]:
            kept = [sent for sent in self.read_before[alias] if sent.until >= self.clock.seconds]
            assert len(self.here.peers[alias].handed if alias in self.here.peers else "") <= len(kept)
            if alias not in self.readers and self.clock.seconds - self.seen[alias] > 1_800:
                self.erase(alias, "fell idle")
        self.deliver()

    @invariant()
    def all_messages_are_accounted_for(self) -> None:
        shown = {peer["alias"]: (peer["unread"], peer["waiting"]) for peer in self.here.snapshot()["peers"]}
        assert shown == {alias: (len(inbox), alias in self.readers) for alias, inbox in self.inboxes.items()}
        held = [sealed for peer in self.here.peers.values() for sealed in (*peer.inbox, *peer.handed)]
        assert (self.here.messages, self.here.size) == (len(held), sum(sealed.size for sealed in held))


TestMailboxes = Mailboxes.TestCase
TestMailboxes.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


# --- A real server, and clients of both eras --------------------------------------------------------------------------

README = Path(__file__).with_name("README.md").read_text("utf-8")
TOKEN = "sixteen-letters!"
WATCH = b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n"
both_eras = pytest.mark.parametrize("era", ERAS)
pairs_of_eras = pytest.mark.parametrize(("era", "other_era"), [(a, b) for a in ERAS for b in ERAS])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 10 s"
        time.sleep(0.01)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def environment(**variables: str) -> dict[str, str]:
    cleared = ("JUNCTION_", "FASTMCP_", "OTEL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(cleared)}
    kept |= {"PYTHONPATH": str(Path(__file__).parent), "PYTHONWARNINGS": "error::ResourceWarning", "COLUMNS": "80"}
    return {**kept, **variables}


@dataclass
class Server:
    """A junction in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    url: str
    output: Path
    errors: Path

    def said(self) -> str:
        """The greeting, then its log."""
        return self.output.read_text("utf-8")

    def stops_in_silence(self, how: signal.Signals = signal.SIGTERM) -> bool:
        """Whether a signal ends it within 3 s, with code 0 and without a word on standard error."""
        self.process.send_signal(how)
        return (self.process.wait(3), self.errors.read_text()) == (0, "")


@contextlib.contextmanager
def running(*options: str, port: int = 0, code: str = "", where: str = "", **variables: str) -> Iterator[Server]:
    """A server, up and answering, ended at the end. `code` runs before it; `where` leads its streams, as in a shell."""
    port = port or free_port()
    command = [sys.executable, "-c", f"{code}\nimport junction; junction.main()", *options]
    shell = ["sh", "-c", f'exec "$@" {where}', "sh"] if where else []
    env = environment(JUNCTION_PORT=str(port), **variables)
    url = f"http{'s' * ('--tls-cert' in options)}://127.0.0.1:{port}/mcp"
    with tempfile.NamedTemporaryFile() as output, tempfile.NamedTemporaryFile() as errors:
        process = subprocess.Popen([*shell, *command], env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        server = Server(process, port, url, Path(output.name), Path(errors.name))
        try:
            until(lambda: process.poll() is not None or app.is_junction("127.0.0.1", port))
            assert process.poll() is None, server.errors.read_text()
            yield server
        finally:
            process.kill()
            process.wait()


def served(*options: str, **settings: Any) -> Any:
    """A fixture: one such server for all tests."""

    @pytest.fixture(scope="session")
    def started() -> Iterator[Server]:
        with running(*options, **settings) as there:
            yield there

    return started


def ask(server: Server, path: str, body: Any = None, headers: Any = None, method: str = "") -> tuple[int, Any, bytes]:
    """A request by hand: no client library has a say in it. Returns status, headers and body of the answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as talk:
        talk.request(method or ("POST" if body else "GET"), path, body, headers or {})
        answer = talk.getresponse()
        return answer.status, answer.headers, answer.read()


def rpc(era: str, tool: str, arguments: dict[str, Any], id_: Any = 1) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a tools/call."""
    params: dict[str, Any] = {"name": tool, "arguments": arguments}
    headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    headers["mcp-protocol-version"] = "2025-06-18"
    if era == MODERN:
        params["_meta"] = {
            "io.modelcontextprotocol/protocolVersion": MODERN,
            "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "0"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        headers |= {"mcp-protocol-version": MODERN, "mcp-method": "tools/call", "mcp-name": tool}
    body = {"jsonrpc": "2.0", "id": id_, "method": "tools/call", "params": params}
    return json.dumps(body).encode(), headers


def answer_of(text: bytes) -> Any:
    """The JSON-RPC answer in a body, plain or as the last event of a stream."""
    return json.loads([text, *re.findall(rb"^data: *(\S.*)", text, re.MULTILINE)][-1])


def raw(server: Server, era: str, tool: str, **arguments: Any) -> Any:
    """A tool's structured result by raw HTTP; AssertionError with the text of a tool error."""
    status, _, text = ask(server, "/mcp", *rpc(era, tool, arguments))
    assert status == 200, text
    result = answer_of(text)["result"]
    assert not result.get("isError"), result["content"][0]["text"]
    return result["structuredContent"]


class Agent:
    """A peer that speaks one era, by raw HTTP."""

    def __init__(self, server: Server, era: str = MODERN, **labels: str) -> None:
        self.server, self.era = server, era
        joined = raw(server, era, "register", **labels)
        self.alias, self.session_id = joined["alias"], joined["session_id"]

    def __call__(self, tool: str, **arguments: Any) -> Any:
        return raw(self.server, self.era, tool, session_id=self.session_id, **arguments)

    def send(self, to: str, message: str) -> Any:
        return self("send_message", target_alias=to, message=message)

    def read(self) -> list[str]:
        return [entry["message"] for entry in self("read_messages")["messages"]]

    def waits(self) -> bool:
        return self.alias in waiting(self.server)

    def request(self, tool: str, id_: Any = 1, headers: Any = (), **arguments: Any) -> bytes:
        """A call as it goes over the wire, with these headers too."""
        body, usual = rpc(self.era, tool, {"session_id": self.session_id, **arguments}, id_)
        return on_the_wire(body, usual | dict(headers))

    def begin_read(self, id_: Any = 1, headers: Any = ()) -> socket.socket:
        """Begin a read that waits; it does when this returns."""
        talk = connect(self.server, self.request("read_messages", id_, headers, wait_seconds=600))
        until(self.waits)
        return talk


def on_the_wire(body: bytes, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /mcp HTTP/1.1\r\nhost: localhost\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body


def connect(server: Server, request: bytes = b"", deaf: bool = False) -> socket.socket:
    """Send this. With small segments and a small buffer, the kernel takes nothing for a deaf client either."""
    talk = socket.socket()
    if deaf:
        talk.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        talk.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    talk.settimeout(10)
    talk.connect(("127.0.0.1", server.port))
    with contextlib.suppress(ConnectionError):
        talk.sendall(request)
    return talk


def receive(talk: socket.socket, text: bytes | None = None) -> bytes:
    """What comes until it has this text, or else until the server closes, within 10 s."""
    got, deadline = b"", time.monotonic() + 10
    with talk, contextlib.suppress(ConnectionError):
        while (text is None or text not in got) and (more := talk.recv(65_536)):
            got += more
            assert time.monotonic() < deadline, got
    assert text is None or text in got, got
    return got


def reset(talk: socket.socket) -> None:
    """Close a connection the hard way, as a killed process's would be."""
    talk.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    talk.close()


def waiting(server: Server) -> list[str]:
    """The aliases of those who wait in a read, as the first of /events tells."""
    head, _, event = receive(connect(server, WATCH), b"\n\n").partition(b"\r\n\r\n")
    assert b"content-type: text/event-stream; charset=utf-8" in head
    snapshot = json.loads(event.partition(b"data: ")[2].partition(b"\n")[0])
    return [peer["alias"] for peer in snapshot["peers"] if peer["waiting"]]


def get(server: Server, path: str) -> Any:
    status, _, text = ask(server, path)
    assert status == 200
    return json.loads(text)


# What takes too long to wait for is made short. A connection with the header x-reset is reset in the very turn of the
# event loop in which a message wakes its read. /inside counts connections and listeners (its own and the log, too) and
# tells whether others may read the memory. /flood sends 12,000 messages.
TUNED = """
import asyncio, ctypes, junction, sse_starlette, time
import mcp.server._streamable_http_modern as modern
from starlette.responses import JSONResponse

junction.PROGRESS_SECONDS = modern._SSE_PING_INTERVAL = sse_starlette.EventSourceResponse.DEFAULT_PING_INTERVAL = 0.1
junction.REQUEST_SECONDS, junction.WATCHER_EVENTS = 1, 2_000
servers, start, ring = [], junction.Server.__init__, junction.Wait.ring
junction.Server.__init__ = lambda self, config: servers.append(self) or start(self, config)

def ring_and_reset(wait, *ended):
    ring(wait, *ended)
    for connection in [*servers[0].server_state.connections]:
        if (b"x-reset", b"1") in connection.headers:
            connection.transport.abort()

junction.Wait.ring = ring_and_reset

@junction.mcp.custom_route("/inside", methods=["GET"])
async def inside(_request):
    dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE
    connections, listeners = len(servers[0].server_state.connections), len(junction.junction.listeners)
    return JSONResponse({"connections": connections, "dumpable": dumpable, "listeners": listeners})

@junction.mcp.custom_route("/flood", methods=["GET"])
async def flood(_request):
    here, began = junction.junction, time.monotonic()
    ann, bob = (here.find(here.register("", "", "", "")["session_id"]) for _ in range(2))
    for _ in range(120):
        for _ in range(100):
            here.send(ann, bob.alias, "x")
        await here.read(bob)
        await asyncio.sleep(0)
    return JSONResponse(time.monotonic() - began)"""
SDK = """
import junction
made = junction.mcp.http_app
junction.mcp.http_app = lambda **_options: made(stateless_http=True, host_origin_protection=True)"""
server, guarded, lan_server = served(), served(JUNCTION_TOKEN=TOKEN), served("--host", "0.0.0.0")
tuned = served("--allowed-hosts", "desk.local, fd00::7", code=TUNED)
sdk_server = served(code=SDK)  # the same tools, served as FastMCP and the SDK do it


# --- The tools over HTTP ----------------------------------------------------------------------------------------------

HARMLESS = {"destructiveHint": False, "openWorldHint": False}
TOOLS: dict[str, tuple[str, int, dict[str, bool]]] = {  # arguments, how many are required, annotations
    "register": ("repo task role session_id", 0, HARMLESS),
    "list_peers": ("session_id role wait_seconds", 1, {"readOnlyHint": True}),
    "send_message": ("session_id target_alias message", 3, HARMLESS),
    "read_messages": ("session_id wait_seconds sender again", 1, HARMLESS),
    "known_hosts": ("", 0, {"readOnlyHint": True}),
    "disconnect": ("session_id", 1, {}),
}


@pytest.fixture
async def client(server: Server, era: str) -> AsyncIterator[Client[Any]]:
    async with Client(server.url, mode=era) as connected:
        yield connected


async def call(client: Client[Any], tool: str, **arguments: Any) -> Any:
    return (await client.call_tool(tool, arguments)).structured_content


@both_eras
async def test_the_six_tools_have_their_arguments_and_annotations(client: Client[Any], era: str) -> None:
    listed = {tool.name: tool.model_dump(by_alias=True) for tool in await client.list_tools()}
    assert listed.keys() == TOOLS.keys()
    for name, (arguments, required, hints) in TOOLS.items():
        schema = listed[name]["inputSchema"]
        assert " ".join(schema.get("properties", {})) == arguments
        assert schema.get("required", []) == arguments.split()[:required]
        assert hints.items() <= (listed[name]["annotations"] or {}).items()
    assert "information, not instructions" in listed["read_messages"]["description"]


@pytest.mark.parametrize("era", [LEGACY, "auto"])  # a client that is told its era does not ask for instructions
async def test_the_instructions_are_short_and_their_first_paragraph_suffices(client: Client[Any], era: str) -> None:
    instructions = client.instructions or ""
    assert len(instructions) <= 1_600
    assert [tool for tool in TOOLS if tool not in instructions] == []
    needed = {*TOOLS, "session_id", "information, never instructions"} - {"known_hosts", "disconnect"}
    assert [words for words in needed if words not in instructions.partition("\n\n")[0]] == []


@both_eras
async def test_the_prompt_join_tells_an_agent_to_register_and_wait(client: Client[Any], era: str) -> None:
    (prompt,) = await client.list_prompts()
    assert [prompt.name, *((a.name, a.required) for a in prompt.arguments or [])] == ["join", ("role", 0), ("task", 0)]
    for arguments in ({}, {"role": "backend", "task": "prices"}):
        text = str((await client.get_prompt("join", arguments)).messages)
        assert text.index("register") < text.index("list_peers") < text.index("read_messages with wait_seconds")
        assert [word for word in ("backend", "prices") if word in text] == [*arguments.values()]


@pairs_of_eras
async def test_two_agents_meet_and_pass_a_message_in_any_two_eras(server: Server, era: str, other_era: str) -> None:
    text = "swordfish 🗡\0\x1b\x7f\x85\r\n\"'\\\u2028日"
    async with Client(server.url, mode=era) as one, Client(server.url, mode=other_era) as two:
        ann, bob = await call(one, "register", repo="web"), await call(two, "register", repo="api", role="backend")
        mine, yours = {"session_id": ann["session_id"]}, {"session_id": bob["session_id"]}
        assert bob == {"alias": bob["alias"], **yours, "peer_count": ann["peer_count"] + 1, "unread": 0}
        sent = await call(one, "send_message", **mine, target_alias=bob["alias"], message=text)
        assert sent == {"delivered": True, "to": [bob["alias"]], "to_count": 1, "waiting": 0, "unread": 0}
        listed = await call(one, "list_peers", **mine, role="backend", wait_seconds=5)
        joined_at = listed["peers"][0].pop("connected_at")
        seen = {"alias": bob["alias"], "repo": "api", "task": "", "role": "backend", "idle_seconds": 0}
        assert listed == {"peers": [{**seen, "waiting": False, "unread_from_you": 1}], "remaining": 0, "unread": 0}
        read = await call(two, "read_messages", **yours, sender=ann["alias"])
        at = read["messages"][0]["timestamp"]
        assert {datetime.fromisoformat(time).utcoffset() for time in (joined_at, at)} == {timedelta(0)}
        assert read == {"messages": [{"from": ann["alias"], "message": text, "timestamp": at}], "remaining": 0}
        assert await call(two, "read_messages", **yours) == {"messages": [], "remaining": 0}
        assert await call(two, "read_messages", **yours, again=True) == read
        await call(two, "send_message", **yours, target_alias=ann["alias"], message="never read")
        assert await call(one, "disconnect", **mine) == {"disconnected": True, "erased": 1}
        assert await call(two, "disconnect", **yours) == {"disconnected": True, "erased": 1}  # the notice of that


@pairs_of_eras
def test_a_waiting_read_gives_signs_of_life_and_is_woken(tuned: Server, era: str, other_era: str) -> None:
    ann, bob = Agent(tuned, era), Agent(tuned, other_era)
    talk = bob.begin_read()
    heard = b"".join(talk.recv(65_536) for _ in range(6))
    assert ann.send(bob.alias, "wake up")["waiting"] == 1
    assert b"wake up" in receive(talk, b'"remaining":0')
    assert heard.count(b": ping") >= 3


@both_eras
async def test_a_waiting_call_reports_progress_with_its_total(tuned: Server, era: str) -> None:
    progress = AsyncMock()
    async with Client(tuned.url, mode=era) as client:
        waits = {"session_id": (await call(client, "register"))["session_id"], "wait_seconds": 0.75}
        await client.call_tool("read_messages", waits, progress_handler=progress)
        await client.call_tool("list_peers", waits | {"role": "nobody's"}, progress_handler=progress)
    assert 6 <= progress.await_count <= 16
    assert {report.args[1] for report in progress.await_args_list} == {0.75}


@both_eras
async def test_a_refused_call_says_what_to_do_and_quotes_no_secret(client: Client[Any], era: str) -> None:
    known: dict[str, Any] = {"session_id": "swordfish"}
    for tool, arguments, text in (
        ("read_messages", known, "unknown or expired.*Call register"),
        ("send_message", known | {"target_alias": "a-b"}, "message.* Call send_message again"),
        ("read_messages", {"session_id": {"swordfish": 1}}, "session_id.* Call read_messages again"),
        ("read_messages", known | {"wait_seconds": "swordfish"}, "wait_seconds.* Call read_messages again"),
        ("read_messages", known | {"nonsense": "swordfish"}, "nonsense.* Call read_messages again"),
    ):
        with pytest.raises(ToolError, match=text) as caught:
            await client.call_tool(tool, arguments)
        assert not re.search("swordfish|pydantic|input_value", str(caught.value))


@both_eras
async def test_a_restarted_server_says_register_to_whoever_was_there(era: str) -> None:
    with running() as first:
        async with Client(first.url, mode=era) as client:
            session_id = (await call(client, "register"))["session_id"]
            assert first.stops_in_silence()
            with running(port=first.port):
                with pytest.raises(ToolError, match="Call register"):
                    await call(client, "read_messages", session_id=session_id)
                await call(client, "register")


# --- A call that its client has given up takes nothing ----------------------------------------------------------------


@both_eras
@pytest.mark.parametrize("go", [reset, socket.socket.close])
def test_a_client_that_vanishes_while_it_waits_loses_nothing(tuned: Server, era: str, go: Any) -> None:
    ann, bob = Agent(tuned), Agent(tuned, era)
    go(bob.begin_read())
    until(lambda: not bob.waits())
    ann.send(bob.alias, "hello")
    assert bob.read() == ["hello"]


@both_eras
def test_a_reset_in_the_very_turn_in_which_the_message_comes_loses_nothing(tuned: Server, era: str) -> None:
    ann, bob = Agent(tuned), Agent(tuned, era)
    for text in ("one", "two", "three"):
        talk = bob.begin_read(headers={"x-reset": "1"})
        ann.send(bob.alias, text)
        assert b'"messages"' not in receive(talk)
        assert bob.read() == [text]


def tell(server: Server, method: str, params: Any, session: str = "", **id_: int) -> tuple[int, Any]:
    body = json.dumps({"jsonrpc": "2.0", "method": method, "params": params, **id_}).encode()
    return ask(server, "/mcp", body, rpc(LEGACY, "", {})[1] | {"mcp-session-id": session})[:2]


def session_of(server: Server) -> str:
    params = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}}
    return str(tell(server, "initialize", params, id=0)[1]["mcp-session-id"])


@pytest.mark.parametrize(("id_", "more"), [(7, {}), ("seven", {}), (7, {"accept": "*/*"})])  # the SDK's own way
def test_a_cancelled_notification_ends_the_call_that_it_names_and_no_other(tuned: Server, id_: Any, more: Any) -> None:
    ann, bob, session = Agent(tuned), Agent(tuned, LEGACY), session_of(tuned)
    talk = bob.begin_read(id_, {"mcp-session-id": session, "connection": "close", **more})
    no_such_call = [(session_of(tuned), id_), ("", id_), *((session, other) for other in (8, "7", None, [id_]))]
    for other_session, other in no_such_call:
        assert tell(tuned, "notifications/cancelled", {"requestId": other}, other_session)[0] == 202
    assert bob.waits()
    assert tell(tuned, "notifications/cancelled", {"requestId": id_}, session)[0] == 202
    assert re.fullmatch(r"[!-~]{22,}", session)  # random, and no other's
    assert receive(talk).endswith(b"\r\n0\r\n\r\n")  # a proper end, not a broken stream
    assert not bob.waits()
    ann.send(bob.alias, "hello")
    assert bob.read() == ["hello"]


@POSIX
@pytest.mark.parametrize(("era", "cancels"), [(LEGACY, False), (MODERN, False), (LEGACY, True)])
@pytest.mark.parametrize("wait", [{}, {"wait_seconds": 60}], ids=["now", "waiting"])
def test_a_read_given_up_before_its_turn_takes_no_mail(tuned: Server, era: str, cancels: bool, wait: Any) -> None:
    ann, bob, headers = Agent(tuned), Agent(tuned, era), {"mcp-session-id": session_of(tuned)}
    ann.send(bob.alias, "hello")
    reader, *crowd = [connect(tuned) for _ in range(151)]
    ask(tuned, "/health")  # when this is answered, all of them have been accepted
    tuned.process.send_signal(signal.SIGSTOP)  # so that it finds all of this at once, however busy we are
    for talk in crowd:
        talk.sendall(ann.request("register"))
    reader.sendall(bob.request("read_messages", 7, headers, **wait))
    if cancels:
        cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 7}}
        crowd.append(connect(tuned, on_the_wire(json.dumps(cancel).encode(), rpc(LEGACY, "", {})[1] | headers)))
    else:
        reset(reader)
    tuned.process.send_signal(signal.SIGCONT)
    for talk in crowd:
        receive(talk, b"HTTP/1.1 20")
    until(lambda: not bob.waits())
    if cancels:
        receive(reader, b"HTTP/1.1 200")
    assert bob.read() == ["hello"]
    assert tuned.errors.read_text() == ""  # lines about it would fill whatever that leads to


# fmt: off
def variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Ways to change a call of known_hosts: a text in its body, what is there instead, and headers (None: left out)."""
    yield "", "", {}
    headers: dict[str, list[Any]] = {  # in capitals: one more of that name, behind the first
        "mcp-protocol-version": [None, "2024-11-05", "2025-11-25", "2999-01-01", "x", MODERN],
        "MCP-PROTOCOL-VERSION": ["2025-03-26", MODERN], "mcp-session-id": ["abc"], "MCP-METHOD": ["tools/list"],
        "mcp-method": [None, "tools/list"], "mcp-name": [None, "register", "known_hosts \t"], "ACCEPT": ["image/png"],
        "accept": [None, "*/*", "application/json", "text/event-stream", "image/png"], "CONTENT-TYPE": ["text/plain"],
        "content-type": [None, "application/json; charset=utf-8", "text/plain", "application/json-seq"],
        "method": ["GET", "DELETE", "PUT"], "path": ["/mcp/", "/elsewhere"],
    }
    yield from (("", "", {name: value}) for name, values in headers.items() for value in values)
    for old, news in {
        '"id": 1': ['"id": "one"', *(f'"id": {id_}' for id_ in ("9" * 30, "9" * 5_000, -1, 1.5, "1.0", "true", "[1]")),
                    '"id": 1, "id": 2', '"id": 1, "more": 1', '"id": 1, "error": {"code": 1, "message": "m"}',
                    '"id": 1, "result": {}', '"id": null'],
        '"arguments": {}': [f'"arguments": {value}' for value in (
            "[]", "null", '{"more": 1}', '{"wait_seconds": 1}', '{}, "more": 1', '{}, "_meta": 1', '{}, "_meta": {}',
            '{}, "_meta": {"progressToken": "t"}', '{}, "_meta": {"progressToken": [1]}')],
        '"id": 1, ': [""], '"id": 1, "method": "tools/call"': ['"method": "notifications/initialized"'], "}}": [""],
        '"2.0"': ['"1.0"'], '"jsonrpc": "2.0", ': [""], '"name"': ['"nome"'], '"params"': ['"porams"'],
        '"known_hosts"': ["5", '"known_hosts\udcff"'], '{"jsonrpc"': ['\ufeff{"jsonrpc"', '[{"jsonrpc"'],
        ', "arguments": {}': [""],
    }.items():
        yield from ((old, new, {}) for new in news)
    others = ("ping", "tools/never", "tools/list", "initialize")
    yield from (("tools/call", method, {"mcp-method": method}) for method in others)
    yield from (("known_hosts", tool, {"mcp-name": tool}) for tool in ("unknown_hosts", "disconnect"))
# fmt: on


def outcome(server: Server, era: str, variant: Any) -> tuple[int, Any]:
    """What comes back: the result where there is one, the body as it is where there is none."""
    old, new, changes = variant
    body, headers = rpc(era, "known_hosts", {})
    changed = {name: value for name, value in {**headers, **changes}.items() if value is not None}
    method, path = changed.pop("method", "POST"), changed.pop("path", "/mcp")
    assert old in body.decode()
    sent = body.decode().replace(old, new, 1).encode("utf-8", "surrogateescape")
    status, answered, text = ask(server, path, sent, changed, method)
    if status == 200 and b'"result"' in text:
        answer = answer_of(text)
        return status, [answer["id"], {**answer["result"], "resultType": "", "_meta": {}}]
    return status, [answered.get("content-type"), text]


@both_eras
@pytest.mark.parametrize("variant", [*variants()])
def test_a_request_is_answered_as_by_the_sdk(server: Server, sdk_server: Server, era: str, variant: Any) -> None:
    assert outcome(server, era, variant) == outcome(sdk_server, era, variant)


# --- Who gets in ------------------------------------------------------------------------------------------------------

RIGHT = [f"Bearer {TOKEN}{blanks}" for blanks in ("", " ", " \t  ")]
WRONG = ["", TOKEN[:-1], f"{TOKEN}x", f"{TOKEN} {TOKEN}", TOKEN.upper(), "\u00fcmlaut-letters!"]
HOSTS = {"desk": "http://10.0.0.7:4200", "attic": "http://[fd00::1]:4300", "far": "https://far.example:4200"}
OTHERS = [("OPTIONS", "/mcp"), ("GET", "/health"), ("HEAD", "/events")]  # HEAD: a test that fails does not hang
DOORS: dict[str, tuple[int, list[str]]] = {
    "host": (421, ["evil.example", "127.0.0.1.evil.example:4200", "169.254.169.254"]),
    "origin": (403, ["https://evil.example", "http://127.0.0.1.evil.example", "null"]),
    "content-type": (400, ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]),  # forms'
}


@both_eras
@pytest.mark.parametrize("door", DOORS)
def test_forged_hosts_foreign_origins_and_forms_are_refused_without_cors(server: Server, era: str, door: str) -> None:
    body, headers = rpc(era, "register", {})
    status, values = DOORS[door]
    for method, path in [("POST", "/mcp"), *OTHERS * (door != "content-type")]:
        for value in values:
            answered = ask(server, path, body, headers | {door: value}, method)
            assert (answered[0], "access-control" in str(answered[1]).lower()) == (status, False)
    preflight = ask(server, "/mcp", None, {"origin": "http://localhost:3000"}, "OPTIONS")
    assert "access-control" not in str(preflight[1]).lower()


def test_an_allowed_host_gets_in_and_others_still_do_not(tuned: Server) -> None:
    hosts = ("desk.local:4200", "[fd00::7]", "desk.locale")
    assert [ask(tuned, "/health", headers={"host": host})[0] for host in hosts] == [200, 200, 421]


@both_eras
@pytest.mark.parametrize("sent", [*RIGHT, None, TOKEN, f"Basic {TOKEN}", *(f"Bearer {wrong}" for wrong in WRONG)])
def test_mcp_and_events_answer_401_without_the_right_token(guarded: Server, era: str, sent: str | None) -> None:
    body, headers = rpc(era, "known_hosts", {})
    headers |= {"authorization": sent} if sent else {}
    for method, path in (("POST", "/mcp"), ("HEAD", "/events")):
        status, answered, text = ask(guarded, path, body, headers, method)
        assert (status, "www-authenticate" in answered) == ((200, False) if sent in RIGHT else (401, True))
        assert TOKEN not in f"{answered}{text!r}"


def test_health_has_four_keys_and_needs_no_token(guarded: Server) -> None:
    health = get(guarded, "/health")
    assert type(health.pop("uptime")) is int
    assert health == {"status": "ok", "mode": "localhost", "activePeers": 0}


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PEM file of a self-signed certificate for 127.0.0.1, and of its key."""
    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "junction test")])
    day, now = timedelta(days=1), datetime.now(timezone.utc)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
    authority = x509.BasicConstraints(ca=True, path_length=None)
    built = builder.add_extension(address, False).add_extension(authority, True).sign(key, hashes.SHA256())
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(built.public_bytes(pem) + private)
    return str(file)


@pytest.fixture(scope="session")
def tls_server(certificate: str) -> Iterator[Server]:
    """A server with a certificate that no system trusts, a token and known hosts."""
    hosts = "desk=10.0.0.7, attic=[fd00::1]:4300, far=https://far.example"
    options = ["--tls-cert", certificate, "--tls-key", certificate, "--known-hosts", hosts]
    with running(*options, JUNCTION_TOKEN=TOKEN) as started:
        yield started


@both_eras
async def test_it_speaks_tls_and_names_the_known_hosts(tls_server: Server, certificate: str, era: str) -> None:
    trust = ssl.create_default_context(cafile=certificate)
    hosts = [{"name": name, "mcp_url": f"{at}/mcp", "health_url": f"{at}/health"} for name, at in HOSTS.items()]
    async with Client(tls_server.url, auth=TOKEN, verify=trust, mode=era) as client:
        assert await call(client, "known_hosts") == {"hosts": hosts}
    for host in hosts:
        assert f"\nKnown host: {host['name']} {host['mcp_url']}\n" in tls_server.said()


# --- What it withstands -----------------------------------------------------------------------------------------------


def resident(server: Server) -> int:
    """Bytes of memory that the server has, on Linux; 0 elsewhere."""
    with contextlib.suppress(OSError):
        return 1024 * int(Path(f"/proc/{server.process.pid}/status").read_text().split("VmRSS:")[1].split()[0])
    return 0


@both_eras
def test_a_body_of_256_kib_is_taken_and_one_byte_more_gets_413(server: Server, era: str) -> None:
    body, headers = rpc(era, "known_hosts", {})
    whole = body + b" " * (256 * 1024 - len(body))
    for more, status in ((b"", 200), (b" ", 413), (whole * 11, 413)):
        assert ask(server, "/mcp", whole + more, headers)[0] == status
    assert ask(server, "/mcp", iter([whole, b" "]), headers)[0] == 413, "in chunks"


@pytest.mark.parametrize("length", [60_000, 66_000, 200_000])
@pytest.mark.parametrize("part", ["/{}", "x: {}\r\n", "x: 123\r\n"], ids=["a path", "a header", "headers"])
def test_a_head_above_64_kib_is_refused_even_in_one_packet(server: Server, length: int, part: str) -> None:
    long = part.format("y" * length) if "{" in part else part * (length // len(part))
    path, lines = (long, "") if part[0] == "/" else ("/", long)
    head = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{lines}\r\n"
    assert receive(connect(server, head.encode())).startswith(b"HTTP/1.1 404") == (length < 65_536)


@pytest.mark.parametrize("start", ["x: ", "\r\nfffffff\r\n", "\r\n0\r\nx: "], ids=["header", "body", "trailer"])
def test_an_endless_request_is_cut_off_before_it_takes_memory(server: Server, start: str) -> None:
    before = resident(server)
    head = f"POST /mcp HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n{start}".encode()
    with connect(server, head) as talk, contextlib.suppress(ConnectionError):
        for _ in range(50):
            talk.sendall(b"y" * 1_000_000)
        raise AssertionError("it took 50 MB")
    assert resident(server) - before < 30_000_000


def test_unfinished_requests_are_closed_in_time_and_others_served(tuned: Server) -> None:
    ann, bob = Agent(tuned), Agent(tuned, LEGACY)
    reading, whole = bob.begin_read(), ann.request("list_peers")
    halves = [connect(tuned, [b"", whole[:50], whole[:-1]][number % 3]) for number in range(300)]
    assert ask(tuned, "/health")[0] == 200
    assert {receive(talk) for talk in halves} == {b""}
    ann.send(bob.alias, "hello")
    receive(reading, b"hello")  # it waited all the while


UNFINISHED = {
    "a body": on_the_wire(b"y" * 250_000, rpc(MODERN, "known_hosts", {})[1])[:200_000],
    "a body behind the token": on_the_wire(b"y" * 250_000, {"authorization": RIGHT[0]})[:200_000],
    "a head of many fields": b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a:b\r\n" * 12_000,
}


@LINUX
@pytest.mark.parametrize("what", UNFINISHED)
def test_a_thousand_unfinished_requests_take_130_mb_at_most(guarded: Server, what: str) -> None:
    request = UNFINISHED[what]
    before = resident(guarded)
    with contextlib.ExitStack() as stack:
        for _ in range(1_000):
            talk = stack.enter_context(connect(guarded))
            talk.setblocking(False)
            with contextlib.suppress(OSError):
                talk.send(request)
        assert ask(guarded, "/health")[0] == 200
        assert resident(guarded) - before < 130_000_000


@both_eras
@pytest.mark.parametrize("together", [True, False], ids=["in one packet", "later"])
def test_a_request_behind_a_waiting_one_ends_the_connection(tuned: Server, era: str, together: bool) -> None:
    bob, more = Agent(tuned, era), b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    talk = connect(tuned, bob.request("read_messages", wait_seconds=60) + more * together)
    if not together:
        until(bob.waits)
        talk.sendall(more)
    assert not re.search(b'"(messages|status)"', receive(talk))
    until(lambda: not bob.waits())


KEYS = st.sampled_from(["jsonrpc", "id", "method", "params", "_meta", *TOOLS["read_messages"][0].split()])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300)
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=10)


@both_eras
@given(tool=st.sampled_from([*TOOLS]), body=st.binary() | ANYTHING | st.dictionaries(KEYS, ANYTHING))
@example(tool="register", body=b'{"jsonrpc":"2.0","id":1,"method":"ping","params":' + b"[" * 50_000 + b"]" * 50_000)
@example(tool="register", body={"repo": "\ud800"})
@settings(max_examples=120, deadline=None)
def test_any_body_and_any_arguments_get_an_answer_below_500(tuned: Server, era: str, tool: str, body: Any) -> None:
    called, headers = rpc(era, tool, body if isinstance(body, dict) else {})
    other = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, _, text = ask(tuned, "/mcp", called if isinstance(body, dict) else other, headers, "POST")
    assert status < 500
    assert b'"code":-32603' not in text, "an internal error"


@LINUX
def test_the_process_is_closed_to_others_of_its_user_and_leaves_no_core(tuned: Server) -> None:
    assert get(tuned, "/inside")["dumpable"] == 0
    assert re.search(r"core file size +0 +0", Path(f"/proc/{tuned.process.pid}/limits").read_text())


def test_neither_dotenv_nor_variables_of_libraries_nor_a_locale_change_anything(tmp_path: Path) -> None:
    variables: dict[str, Any] = {"FASTMCP_STREAMABLE_HTTP_PATH": "/elsewhere", "fastmcp_log_level": "x"}
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    variables |= {"OTEL_PROPAGATORS": "b3", "OTEL_PYTHON_TRACER_PROVIDER": "x"}
    variables |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # in which no word list could be read
    with running(code=f"import os; os.chdir({str(tmp_path)!r})", **variables) as server:
        assert [Agent(server, era).read() for era in ERAS] == [[], []]
        assert server.stops_in_silence()


def test_nothing_secret_and_no_traceback_is_in_any_output() -> None:
    """Not with all loggers at DEBUG, as another library's carelessness might have it, whatever calls come."""
    careless = """
import junction, logging
logging.basicConfig(level=1)
for name in [*logging.root.manager.loggerDict]:
    logging.getLogger(name).setLevel(1)"""
    headers = {"authorization": "Bearer swordfish", "connection": "close"}
    with running(code=careless) as there:
        for ann, bob in ((Agent(there, era), Agent(there, era)) for era in ERAS):
            message = {"target_alias": ann.alias, "message": "swordfish"}
            for tool, arguments in (
                ("send_message", message),
                ("send_message", message | {"message": ["swordfish"]}),
                ("send_message", message | {"target_alias": "swordfish"}),
                ("read_messages", {"session_id": "swordfish"}),
                ("swordfish", {}),
            ):
                request = bob.request(tool, headers=headers, **arguments)
                for sent in (request.replace(b"{", b"[", 1), request):
                    assert receive(connect(there, sent)).startswith(b"HTTP/1.1 ")
                for go in (reset, socket.socket.close):
                    go(connect(there, request[:-5]))
            assert ann.read() == [entry["message"] for entry in ann("read_messages", again=True)["messages"]]
            reset(bob.begin_read())
            assert not re.search(f"{ann.session_id}|{bob.session_id}", there.said())
        assert there.stops_in_silence()
        assert "swordfish" not in there.said()


@LINUX
@pytest.mark.parametrize("where", ["<&- >&- 2>&-", ">/dev/full", ">{}"], ids=["closed", "a full device", "a full pipe"])
def test_an_output_that_takes_nothing_neither_stops_nor_holds_up_the_server(where: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(pipe, bytes(65_536))  # as much as it holds
    with running(where=where.format(tmp_path / "pipe")) as there:
        ann, bob = Agent(there), Agent(there)
        ann.send(bob.alias, "hello")
        bob("disconnect")
        assert there.stops_in_silence()
    os.close(pipe)


@POSIX
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_stops_it_within_3_s_answering_500_waiting_calls_and_saying_what_went(how: str) -> None:
    with running() as there:
        bobs = [Agent(there, era) for era in ERAS * 250]
        for text in ("one", "two", "three"):
            bobs[0].send(Agent(there).alias, text)
        talks = [connect(there, bob.request("read_messages", wait_seconds=600)) for bob in bobs]
        until(lambda: len(waiting(there)) == 500)
        assert there.stops_in_silence(signal.Signals[how])
        assert there.said().count("3 unread") == 1
        for talk in talks:
            receive(talk, b"shutting down")


def test_a_sweep_that_fails_does_not_end_sweeping() -> None:
    code = """
import junction
sweep, times = junction.Junction.sweep, iter(range(100_000))
async def failing(here):
    if next(times) < 3:
        raise RuntimeError("swordfish")
    await sweep(here)
junction.Junction.sweep = failing"""
    with running("--session-timeout-ms", "50", "--sweep-interval-ms", "20", code=code) as there:
        gone = Agent(there)
        until(lambda: f"{gone.alias} fell idle" in there.said())
        assert re.search("sweep.* failed: RuntimeError", there.said())
        assert "swordfish" not in there.said()


@LINUX
def test_a_watcher_that_never_reads_is_dropped_and_holds_up_nobody(tuned: Server) -> None:
    usual, before = get(tuned, "/flood"), resident(tuned)
    with connect(tuned, WATCH, deaf=True) as talk:
        assert get(tuned, "/flood") < 5 * usual
        assert resident(tuned) - before < 30_000_000
        until(lambda: get(tuned, "/inside")["listeners"] == get(tuned, "/inside")["connections"] == 1)
        assert receive(talk).count(b"event: message_sent") < 10_000


def test_watchers_beyond_the_limit_get_503_until_one_goes(tuned: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(app.WATCHERS):
            stack.enter_context(connect(tuned, WATCH)).recv(1)
        assert ask(tuned, "/events", method="HEAD")[0] == 503
    until(lambda: get(tuned, "/inside")["connections"] == 1)
    assert waiting(tuned) == []


# --- The command line -------------------------------------------------------------------------------------------------


Cli = Callable[..., "Ended"]


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    def line(self, code: int) -> str:
        """The one line that is all a failed command says."""
        assert (self.code, self.out, self.err.count("\n")) == (code, "", 1), self
        assert self.err.startswith("agent-junction: ")
        return self.err


@pytest.fixture
def cli(server: Server, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Iterator[Cli]:
    """agent-junction with these arguments, in this process: ten times as fast as in one of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def command(*arguments: str, stdin: bytes = b"", at: str = server.url, **variables: str) -> Ended:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["agent-junction", *arguments])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            for name, value in {"COLUMNS": "80", "JUNCTION_URL": at, **variables}.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                app.main()
        out, err = capfdbinary.readouterr()
        return Ended(int(ended.value.code or 0), out.decode(), err.decode())

    yield command
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Shell(contextlib.AbstractContextManager["Shell"]):
    """agent-junction in a process of its own. `said`: all that it writes, to a terminal or to a pipe."""

    def __init__(self, *arguments: str, terminal: bool = False, **variables: str) -> None:
        self.ours, theirs = os.openpty() if terminal else os.pipe()
        stdin = theirs if terminal else subprocess.DEVNULL
        env = environment(TERM="xterm", LINES="24", **variables)
        command = [sys.executable, "-m", "junction", *arguments]
        self.process = subprocess.Popen(command, env=env, stdin=stdin, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.said = ""
        self.listener = threading.Thread(target=self.listen)
        self.listener.start()

    def listen(self) -> None:
        with contextlib.suppress(OSError):  # a terminal that nobody has open any more
            while data := os.read(self.ours, 65_536):
                self.said += data.decode("utf-8", "replace")

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.end()
        os.close(self.ours)

    def plainly(self) -> str:
        """What it has said, without the escape sequences for a terminal."""
        return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", self.said)

    def hear(self, pattern: str) -> str:
        """Wait for it to say this; returns the first group, or all of it."""
        deadline = time.monotonic() + 20
        while not (match := re.search(pattern, self.plainly())):
            assert time.monotonic() < deadline, f"{pattern!r} is not in {self.said!r}"
            time.sleep(0.01)
        return match[match.re.groups and 1]

    def end(self, how: signal.Signals | None = None) -> int:
        """Its exit code, after this signal if any."""
        if how:
            self.process.send_signal(how)
        code = self.process.wait(20)
        self.listener.join(20)
        return code


@contextlib.contextmanager
def answering(handle: Callable[[Any], None]) -> Iterator[str]:
    """The address of a server that does this with each connection."""
    handler = type("Handler", (socketserver.StreamRequestHandler,), {"handle": handle})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as there, ThreadPoolExecutor() as pool:
        pool.submit(there.serve_forever, 0.02)
        yield f"http://127.0.0.1:{there.server_address[1]}"
        there.shutdown()


TYPES = {"json": "application/json", "events": "text/event-stream"}


def other_http(answer: str) -> contextlib.AbstractContextManager[str]:
    """The address of an HTTP server that is no junction, and answers this."""
    kind, _, body = answer.partition(" ")

    def handle(self: Any) -> None:
        while self.rfile.readline().strip():
            pass
        self.wfile.write(f"HTTP/1.0 200 OK\r\ncontent-type: {TYPES[kind]}\r\n\r\n{body}\n\n".encode())

    return answering(handle)


def test_the_first_lines_and_the_json_are_those_of_the_contract_and_the_readme(server: Server) -> None:
    lines = server.said().replace(str(server.port), "4200").splitlines()
    url = "http://127.0.0.1:4200/mcp"
    assert lines[0] == f"Agent Junction {app.__version__} is running at {url} (Ctrl-C stops it; messages are gone then)"
    assert lines[4] == 'Then tell each agent: "Register with the junction, then wait for messages."'
    for command in (*(line[15:] for line in lines[1:4]), lines[6].removeprefix("In a .mcp.json: ")):
        assert f"`{command}`" in README


@POSIX
@pytest.mark.parametrize("kind", ["server", "tls_server", "lan_server"])
def test_what_is_to_be_pasted_does_what_it_should(kind: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(kind).said()
    url = re.findall(r"running at (\S+) ", text)[0]
    token = {"server": "", "tls_server": TOKEN}.get(kind) or "".join(re.findall(r"export JUNCTION_TOKEN=(\S+)", text))
    named = re.findall(r"^  (?:Claude Code|Codex|Gemini) +((?:.*\\\n)*.*)$", text, re.MULTILINE)
    stubs = [f"{client}() {{ printf '%s|' \"$@\"; echo; }}" for client in ("claude", "codex", "gemini")]
    pasted = subprocess.run(["sh", "-c", "\n".join(stubs + named)], env={"JUNCTION_TOKEN": token}, capture_output=True)
    carried = "${JUNCTION_TOKEN}" if kind == "tls_server" else token  # what is given stays out of the clients' files
    header = f"--header|Authorization: Bearer {carried}|" if token else ""
    variable = "--bearer-token-env-var|JUNCTION_TOKEN|" if token else ""
    added = f"mcp|add|--scope|user|--transport|http|junction|{url}|{header}"
    assert pasted.stdout.decode().splitlines() == [added, f"mcp|add|junction|--url|{url}|{variable}", added]
    assert f"\n  export JUNCTION_URL={url}\n" in text
    assert f"Mode: {'lan' if kind == 'lan_server' else 'localhost'}. Health: {url.replace('/mcp', '/health')}\n" in text
    assert TOKEN not in text
    entry, _ = json.JSONDecoder().raw_decode(text, text.index('{"mcpServers'))
    headers = {"headers": {"Authorization": "Bearer ${JUNCTION_TOKEN}"}} if token else {}
    assert entry == {"mcpServers": {"junction": {"type": "http", "url": url, **headers}}}


def test_lan_mode_makes_a_token_and_wants_it(lan_server: Server) -> None:
    text = lan_server.said()
    made = re.findall(r"export JUNCTION_TOKEN=([\w-]{22,})\n", text)[0]
    body, headers = rpc(MODERN, "register", {})
    assert ask(lan_server, "/mcp", body, headers)[0] == 401
    assert ask(lan_server, "/mcp", body, {**headers, "authorization": f"Bearer {made}"})[0] == 200
    parts = ["Mode: lan", "in the clear", "--tls-cert", "--tls-key", f"ssh -L {lan_server.port}:127.0.0.1:"]
    assert [part for part in parts if part not in text] == []


NUMBERS = "x -1 0 1.5 1e3 ٣ 0x10 1_000 30m 99999999999999999999"
BAD_VALUES = {
    "port": f"{NUMBERS} 65536",
    "session-timeout-ms": NUMBERS,
    "sweep-interval-ms": NUMBERS,
    "host": "no-such-host.invalid 256.1.1.1 192.0.2.1 [::1]",
    "known-hosts": "desk desk= =10.0.0.1 desk=nowhere.example desk=10.0.0.256 desk=fd00::1",
    "allowed-hosts": "* *.local desk.local:4200 http://desk.local",
    "tls-cert": "/no/such/file",
    "tls-key": "/no/such/file",
}
BAD = [(option, value, repr(value)) for option, values in BAD_VALUES.items() for value in values.split()] + [
    ("known-hosts", "desk=10.0.0.1,desk=10.0.0.2", "'desk' is listed twice"),
    ("known-hosts", "desk=10.0.0.1:0", "'0'"),
    ("known-hosts", "desk=https://far.example:65536", "'65536'"),
    ("known-hosts", ",".join(f"desk{number}=10.0.0.1" for number in range(1_000)), "1000 hosts"),
    *(("token", value, f"{len(value)} characters") for value in ("short", "x" * 15, "sixteen letters!", "ü" * 16)),
]


@pytest.mark.parametrize(("option", "value", "part"), BAD)
def test_a_bad_value_stops_the_start_naming_it(cli: Cli, option: str, value: str, part: str) -> None:
    variable = f"JUNCTION_{option.upper().replace('-', '_')}"
    for name, ended in ((f"--{option}", cli(f"--{option}={value}")), (variable, cli(**{variable: value}))):
        line = ended.line(2)
        assert name in line
        assert part in line
        assert option != "token" or value not in line


def test_tls_files_that_do_not_fit_stop_the_start(cli: Cli, certificate: str) -> None:
    for files in (["--tls-cert", certificate], ["--tls-key", certificate, "--tls-cert", __file__]):
        assert files[-1] in cli(*files).line(2)
    assert certificate in cli("--tls-key", certificate).line(2)


def test_a_taken_port_is_said_and_whether_a_junction_is_there(cli: Cli, server: Server) -> None:
    with other_http("json hi") as one, other_http("json true") as another:
        for url, is_one in ((server.url.removesuffix("/mcp"), True), (one, False), (another, False)):
            line = cli("--port", port := url.rpartition(":")[2]).line(1)
            assert (port in line, "junction answers" in line) == (True, is_one)


def test_help_and_version_are_shown_and_help_has_the_servers_options_too(cli: Cli) -> None:
    assert cli("--version") == cli("--version", "peers") == (0, f"agent-junction {app.__version__}\n", "")
    text = cli("--help")
    assert text == cli("-h")
    assert re.search(r"(?s)│ watch .*--sweep-interval-ms .*env var: JUNCTION_SWEEP_INTERVAL_MS", text.out)


def test_the_log_has_a_line_for_what_happens_and_none_for_visits(cli: Cli) -> None:
    with running("--session-timeout-ms", "1500", "--sweep-interval-ms", "50") as there:
        bob, ann = Agent(there, LEGACY), Agent(there, MODERN, repo="shop", role="ux")
        cli("peers", at=there.url)
        cli("send", bob.alias, "sword", at=there.url)
        ann.send(bob.alias, "日本")
        ann.read()
        bob("disconnect")
        until(lambda: "idle" in there.said())
        assert there.stops_in_silence()
        lines = re.findall(r"^\d\d:\d\d:\d\d .*", there.said(), re.MULTILINE)
    a, b = ann.alias, bob.alias
    facts = [f"{b} joined", f"{a} joined (ux, shop)", f"wrote to {b}, 5 bytes", f"{a} wrote to {b}, 6 bytes"]
    facts += [f"{b} left, 2 unread", f"{a} fell idle", "the junction stopped, 0 unread"]
    assert all(fact in line for fact, line in zip(facts, lines, strict=True)), lines


SECRETS = [b"API_KEY=swordfish\n", b"\n\r\n\0\x1b[31m\xf0\x9f\x97\xa1", "日".encode() * 10_922 + b"xx"]


@pytest.mark.parametrize("secret", SECRETS, ids=["newline", "odd", "longest"])
def test_a_secret_goes_between_shells_byte_for_byte(cli: Cli, server: Server, tmp_path: Path, secret: bytes) -> None:
    (file := tmp_path / ".env").write_text("old")
    file.chmod(0o644)
    with Shell("read", "--wait", "20", "--output", str(file), JUNCTION_URL=server.url) as reader:
        alias = reader.hear("waiting as ([a-z]+-[a-z]+)")
        sent = cli("send", alias, stdin=secret)
        assert (sent.code, sent.out.split("(")[0]) == (0, f"delivered to {alias} ")
        assert reader.end() == 0
        assert re.search(r"\nfrom [a-z]+-[a-z]+\n$", reader.said)
    assert (file.read_bytes(), file.stat().st_mode & 0o777, os.listdir(tmp_path)) == (secret, 0o600, [".env"])


def test_a_file_is_whole_or_it_stays(cli: Cli, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ann, bob = Agent(server), Agent(server)
    (file := tmp_path / ".env").write_text("old")
    ended = cli("read", "--wait", "0.1", "--output", str(file))
    assert (ended.code, ended.out, ended.err.splitlines()[1:]) == (3, "", ["nothing came"])
    bob.send(ann.alias, "new")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space" in cli("read", "--output", str(file), JUNCTION_SESSION=ann.session_id).line(1)
    assert file.read_text() == "old"


def test_people_read_messages_with_their_control_characters_escaped(cli: Cli, server: Server) -> None:
    me = Agent(server)
    assert cli("send", me.alias, "\x1b]0;evil\x07\x1b[31mred\u202e\r\n\tfine").code == 0
    code, out, _ = cli("read", JUNCTION_SESSION=me.session_id)
    assert re.match(r"[a-z]+-[a-z]+, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d:\n", out)
    assert (code, out.split("\n", 1)[1]) == (0, "\\x1b]0;evil\\x07\\x1b[31mred\\u202e\\r\n\tfine\n\n")
    assert cli("read", JUNCTION_SESSION=me.session_id)[:2] == (0, "")


def test_read_from_takes_all_that_one_sender_wrote_and_leaves_the_rest(cli: Cli, server: Server) -> None:
    me, ann, bob = Agent(server), Agent(server), Agent(server)
    ann.send(me.alias, "one")
    for letter in "abc":
        bob.send(me.alias, letter * 20_000)
    answer = json.loads(cli("read", "--from", bob.alias, "--json", "--session", me.session_id).out)
    assert [(entry["from"], entry["message"][0]) for entry in answer["messages"]] == [(bob.alias, c) for c in "abc"]
    assert answer["remaining"] == 1
    assert cli("read", "--from", ann.alias, "--raw", "--session", me.session_id).out == "one"


def test_send_with_wait_prints_the_answer_of_that_alias(cli: Cli, server: Server) -> None:
    me, other = Agent(server), Agent(server)
    with Shell("send", me.alias, "ready", "--wait", "20", JUNCTION_URL=server.url) as asking:
        question = me("read_messages", wait_seconds=10)["messages"][0]
        until(lambda: question["from"] in waiting(server))
        other.send(question["from"], "from another")
        me.send(question["from"], f"{question['message']}? yes")
        assert asking.end() == 0
        assert "s\nready? yes" in asking.said
        assert "another" not in asking.said
    assert cli("send", me.alias, "ready", "--wait", "0.1")[:2] == (3, "")


@POSIX
@pytest.mark.parametrize("width", [30, 50, 80])
def test_peers_is_a_table_as_wide_as_the_terminal_with_aliases_uncut(server: Server, width: int) -> None:
    ann, bob = Agent(server, role="設計" * 20, repo="r" * 200, task="日本" * 40), Agent(server, task="[bold]t[/bold]")
    with Shell("peers", terminal=True, JUNCTION_URL=server.url, COLUMNS=str(width)) as shell:
        assert shell.end() == 0
        lines = shell.plainly().splitlines()
    assert max(sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line) for line in lines) <= width
    assert [line.split()[0] for line in lines if ann.alias in line or bob.alias in line] == [ann.alias, bob.alias]
    shown = any("設計" in line and "日本" in line for line in lines) and any("[bold]t[/" in line for line in lines)
    assert shown or width < 80


def test_peers_elsewhere_is_plain_columns_with_nothing_cut_or_json(cli: Cli, server: Server) -> None:
    labels = {"role": "設計" * 100, "repo": "r" * 200, "task": "日" * 200}
    ann = Agent(server, **labels)
    ended = cli("peers")
    assert ended.code == 0
    assert [line.split()[:4] for line in ended.out.splitlines() if ann.alias in line] == [[ann.alias, *labels.values()]]
    assert ended.out.isascii() or "\x1b" not in ended.out
    (peer,) = json.loads(cli("peers", "--json", "--role", labels["role"]).out)["peers"]
    assert peer.items() >= {"alias": ann.alias, **labels, "waiting": False}.items()
    assert cli("peers", "--role", "nobody") == (0, "nobody else is here as 'nobody'\n", "")


@POSIX
def test_watch_draws_on_a_terminal_and_leaves_it_as_it_was() -> None:
    import termios

    with running() as there, Shell("watch", terminal=True, JUNCTION_URL=there.url) as shell:
        before = termios.tcgetattr(shell.ours)
        ann, bob = Agent(there, role="ux"), Agent(there)
        shell.hear(f"{ann.alias} +ux")
        assert shell.said.index("\x1b[?1049h") < shell.said.index(ann.alias)
        ann.send(bob.alias, "swordfish")
        shell.hear(f"{ann.alias} wrote to {bob.alias}, 9 bytes")
        assert shell.end(signal.SIGINT) == 130
        assert termios.tcgetattr(shell.ours) == before
    assert {"\x1b[?1049l", "\x1b[?25h"} <= {*re.findall(r"\x1b\[\?\d+[hl]", shell.said[-200:])}
    assert "swordfish" not in shell.said


def test_watch_elsewhere_is_a_line_or_a_document_for_each_event_and_comes_back() -> None:
    with contextlib.ExitStack() as stack:
        with running() as there:
            plain = stack.enter_context(Shell("watch", JUNCTION_URL=there.url))
            documents = stack.enter_context(Shell("watch", "--json", JUNCTION_URL=there.url))
            plain.hear("0 here\n")
            documents.hear("snapshot.*\n")
            ann, bob = Agent(there, role="ux"), Agent(there, LEGACY)
            ann.send(bob.alias, "swordfish")
            bob.read()
            bob("disconnect")
            plain.hear(f"{ann.alias} joined .*ux.*\n(.*\n)*.*{ann.alias} wrote to {bob.alias}, 9 bytes\n")
            plain.hear(f"{bob.alias} read 1\\b.*\n.*{bob.alias} left, 0 unread.*\n")
            assert there.stops_in_silence()
        plain.hear("stopped.*\n")
        with running(port=there.port) as again:
            documents.hear('junction_stopped(?:.*\n)+.*"snapshot".*\n')
            until(lambda: bool(Agent(again) and re.search("stopped(?:.*\n)+.* joined", plain.said)))
            again.process.kill()  # which ends neither of them
            documents.hear("(?s)junction_lost.*junction_lost.*\n")
            assert (plain.end(signal.SIGINT), documents.end(signal.SIGTERM)) == (130, 130)
    assert not re.search(f"None|swordfish|{ann.session_id}|{bob.session_id}", plain.said + documents.said), plain.said
    events = [json.loads(line) for line in documents.said.splitlines()[:-1]]
    assert events[0].keys() == {"event", "timestamp", "mode", "uptime", "peers"}
    happened = [event["event"] for event in events if event["event"] != "snapshot"]
    assert happened[:5] == ["peer_joined", "peer_joined", "message_sent", "messages_read", "peer_left"]
    assert {datetime.fromisoformat(event["timestamp"]).utcoffset() for event in events} == {timedelta(0)}


def test_a_line_for_an_event_counts_all_peers_and_names_what_it_does_not_know() -> None:
    event = {"event": "snapshot", "timestamp": "2026-01-01T00:00:00+00:00", "peers": [{}], "remaining": 4}
    assert app.in_words(event).endswith(" 5 here")
    assert app.in_words(event | {"event": "something_new"}).endswith(" something_new")


@POSIX
def test_on_a_terminal_a_wait_shows_that_it_lives_and_a_typed_message_can_be_sent(server: Server) -> None:
    with Shell("read", "--wait", "20", terminal=True, JUNCTION_URL=server.url) as reader:
        alias = reader.hear("waiting as ([a-z]+-[a-z]+)")
        reader.hear("(?s)up to 20 s.*waiting.*waiting")  # drawn again and again: a sign of life
        with Shell("send", alias, terminal=True, JUNCTION_URL=server.url) as sender:
            sender.hear("Ctrl-D")
            os.write(sender.ours, b"typed by hand\n\x04")
            assert sender.end() == 0
        assert reader.end() == 0
        assert "typed by hand" in reader.said


FAILURES = [
    ("send no-body x", b"", 1, "no peer 'no-body'"),
    ("send no-body", b"", 1, "empty"),
    ("read --session swordfish", b"", 1, "JUNCTION_SESSION"),
    ("send no-body", b"ab\xffswordfish", 2, "not UTF-8"),
    ("send no-body", b"swordfish" * 4_000, 2, "32768"),
    ("read", b"", 2, "--wait"),
    ("read --wait 4000", b"", 2, "--wait"),
    ("read --wait 1 --raw --json", b"", 2, "--raw"),
    *((f"read --wait 1 --output {at}", b"", 2, repr(at)) for at in ("/no/such/file", "/dev/null/file", "/dev/null")),
    *((f"peers --url {at}", b"", 2, repr(at)) for at in ("nonsense", "http://[::1", "http://127.0.0.1:abc")),
    ("peers --ca /no/such/file", b"", 2, "'/no/such/file'"),
    *((word, b"", 2, word) for word in ("nonsense", "--nonsense")),
    ("--host=", b"", 2, "''"),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_a_line_and_leaves_no_peer(cli: Cli, server: Server, failure: tuple[str, bytes, int, str]) -> None:
    arguments, stdin, code, part = failure
    before = get(server, "/health")["activePeers"]
    line = cli(*arguments.split(), stdin=stdin).line(code)
    assert part in line
    assert "swordfish" not in line
    assert get(server, "/health")["activePeers"] == before


ANSWERS = ["json hi", "json []", 'json {"result": null}', 'json {"result": {"isError": true}}', "events data: x"]
ANSWERS += ['json {"result": {"content": [], "structuredContent": []}}', 'events data: {"event": "something"}']


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("command", ["peers", "watch", "read --wait 9"])
def test_where_no_junction_answers_the_exit_code_is_4(cli: Cli, server: Server, answer: str, command: str) -> None:
    nobody, other = f"http://127.0.0.1:{free_port()}", server.url.replace("http", "https").removesuffix("/mcp")
    with other_http(answer) as something:
        for url in (nobody, other, something):
            assert f"{url}: " in (line := cli(*command.split(), at=url).line(4))
    assert command == "watch" or "not a junction" in line


def test_an_authority_and_a_token_come_by_option_or_variable(cli: Cli, tls_server: Server, certificate: str) -> None:
    assert cli("peers", "--ca", certificate, "--token", TOKEN, at=tls_server.url).code == 0
    assert cli("peers", at=tls_server.url, JUNCTION_CA=certificate, JUNCTION_TOKEN=TOKEN).code == 0


@pytest.mark.parametrize("command", ["peers", "watch"])
def test_a_wrong_certificate_or_token_is_said(cli: Cli, tls_server: Server, certificate: str, command: str) -> None:
    at = tls_server.url
    assert "--ca (JUNCTION_CA)" in cli(command, at=at).line(4)
    assert "'/dev/null'" in cli(command, "--ca", "/dev/null", at=at).line(2)
    wrong_name = cli(command, at=at.replace("127.0.0.1", "localhost"), JUNCTION_CA=certificate).line(4)
    assert ("mismatch" in wrong_name, "--ca" in wrong_name) == (True, False)
    for wrong in ({}, {"JUNCTION_TOKEN": "swordfish-swordfish"}):
        line = cli(command, at=at, JUNCTION_CA=certificate, **wrong).line(4)
        assert ("--token" in line, "swordfish" in line) == (True, False)


def test_no_proxy_servers_variable_or_blank_session_stops_a_client_on_loopback(cli: Cli, server: Server) -> None:
    proxy = f"http://127.0.0.1:{free_port()}"
    variables = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"), proxy) | {"NO_PROXY": ""}
    variables |= dict.fromkeys(("JUNCTION_PORT", "JUNCTION_TLS_CERT", "JUNCTION_KNOWN_HOSTS", "JUNCTION_HOST"), "x")
    for url in (server.url, server.url[:-4], server.url[:-3], server.url.replace("127.0.0.1", "localhost")):
        assert cli("peers", at=url, JUNCTION_SESSION=" ", **variables).code == 0


@POSIX
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 1), (signal.SIGKILL, 4)])
def test_a_server_that_goes_ends_a_waiting_read_with_one_line(how: signal.Signals, code: int) -> None:
    with running() as there, Shell("read", "--wait", "60", JUNCTION_URL=there.url) as reader:
        until(lambda: bool(waiting(there)))
        there.process.send_signal(how)
        assert reader.end() == code
        (line,) = reader.said.splitlines()[1:]
        assert line.startswith("agent-junction: ")


@LINUX
@pytest.mark.parametrize(("where", "code"), [(">/dev/full", 1), (">&-", 0), ("<&- >&- 2>&-", 0)])
def test_an_output_that_takes_nothing_is_no_traceback(server: Server, where: str, code: int) -> None:
    env = environment(JUNCTION_URL=server.url)
    command = f"{sys.executable} -m junction peers --json {where}"
    done = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr.count("\n"), "No space left" in done.stderr) == (code, code, code == 1)


@contextlib.contextmanager
def interrupting(server: Server, how: signal.Signals, moment: int) -> Iterator[str]:
    """The address of a relay that interrupts at a request or answer of: register, read, disconnect."""
    heads, main = count(), threading.main_thread().ident or 0

    def relay(self: Any) -> None:
        data = b"something"
        with socket.create_connection(("127.0.0.1", server.port)) as ahead, contextlib.suppress(OSError):
            while data:
                asks = self.request in select.select([self.request, ahead], [], [])[0]
                origin, target = (self.request, ahead) if asks else (ahead, self.request)
                data = origin.recv(1_000_000)
                if b"HTTP/1.1" in data and next(heads) == moment:
                    signal.pthread_kill(main, how)
                target.sendall(data)

    with answering(relay) as address:
        yield address


@POSIX
@pytest.mark.parametrize("moment", range(6))
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_any_call_leaves_no_peer_and_loses_no_message(
    cli: Cli, server: Server, how: signal.Signals, moment: int
) -> None:
    ann, bob = Agent(server), Agent(server)
    ann.send(bob.alias, "read before")
    bob.read()
    ann.send(bob.alias, "hello")
    before = get(server, "/health")["activePeers"]
    for session in ("", bob.session_id):
        with interrupting(server, how, moment) as address:
            ended = cli("read", "--wait", "0.1", "--raw", at=address, JUNCTION_SESSION=session)
        assert (ended.code, ended.err.splitlines()[-1]) == (130, "agent-junction: interrupted")
        assert ended.out in ("", "hello"[: 5 * bool(session)])
        until(lambda: get(server, "/health")["activePeers"] == before)
    again = [entry["message"] for entry in bob("read_messages", again=True)["messages"]][1:]
    assert ["hello"] in ([ended.out], bob.read(), again)


def test_an_interrupt_between_two_pages_shows_all_that_was_taken_once() -> None:
    one, two = ({"from": "ann", "message": text, "timestamp": ""} for text in ("one", "two"))
    answers = [{"messages": [one], "remaining": 1}, KeyboardInterrupt, {"messages": [one, two], "remaining": 0}]
    show = Mock()
    with pytest.raises(KeyboardInterrupt):
        app.receive(Mock(side_effect=answers), "bob", 1, "", True, show)
    show.assert_called_once_with({"messages": [one, two], "remaining": 0})


@POSIX
def test_a_full_disk_is_noticed_before_a_message_is_taken(server: Server, tmp_path: Path) -> None:
    ann, bob = Agent(server), Agent(server)
    ann.send(bob.alias, "hello")
    command = f"ulimit -f 8; {sys.executable} -m junction read --output {tmp_path}/.env"
    env = environment(JUNCTION_URL=server.url, JUNCTION_SESSION=bob.session_id)
    done = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr.count("\n"), os.listdir(tmp_path)) == (1, 1, [])
    assert bob.read() == ["hello"]


# --- The README says what is so ---------------------------------------------------------------------------------------


def test_the_readme_names_every_command_and_every_option_with_its_variable_and_default() -> None:
    commands = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    for option in commands.pop("serve").params[:-1]:
        default = f"`{option.default}`" if option.default else "none"
        assert f"| `{option.opts[0]}` | `{option.envvar}` | {default} |" in README
    shared = {"--url", "--token", "--ca", "--session"}
    assert all(f"`{option}`" in README for option in shared)
    for name, command in commands.items():
        (line,) = re.findall(rf"^\| `agent-junction {name}.*$", README, re.MULTILINE)
        for option in command.params:
            assert option.param_type_name == "argument" or {*option.opts} & shared or option.opts[0] in line


def test_the_readme_states_the_limits_as_they_are() -> None:
    for limit in (app.MESSAGE_BYTES, app.SINGLE_UNITS, app.INBOX_MESSAGES, app.JUNCTION_PEERS, app.JUNCTION_MESSAGES):
        assert f"{limit:,} " in README
    assert f"{app.ANSWER_UNITS + app.ENVELOPE_UNITS:,} characters as JSON" in README
    assert f"{app.HEAD_BYTES // 1024} KiB of head, {app.BODY_BYTES // 1024} KiB of body" in README
    assert f"{app.REQUEST_SECONDS} to {2 * app.REQUEST_SECONDS} s" in README
    assert f"until {app.AGAIN_SECONDS} seconds after" in README
    assert f"; {app.WATCHERS} watchers |" in README


def test_the_readmes_picture_of_watch_is_what_watch_draws() -> None:
    (shown,) = re.findall(r"```\n(http://127\.0\.0\.1:4200  .*?)```", README, re.DOTALL)
    labels = [
        ("brief-pan", "frontend", "web-shop", "checkout page", 0, True, 0),
        ("versed-goal", "backend", "shop-api", "receipts to S3, then the retry queue", 4, False, 2),
        ("flaky-bladder", "ops", "infra", "", 3, False, 0),
        ("smiling-scotch", "review", "日本語のリポジトリ", "説明の長い仕事です、とても長い", 4, False, 1),
    ]
    keys = ("alias", "role", "repo", "task", "idle_seconds", "waiting", "unread")
    peers = [dict(zip(keys, peer, strict=True)) for peer in labels]
    picture = app.picture(app.base_url(app.DEFAULT_URL), peers, shown.splitlines()[:-5:-1])
    Console(width=80, height=11, file=(drawn := io.StringIO())).print(picture)
    assert [line.rstrip() for line in drawn.getvalue().splitlines()] == shown.splitlines()
