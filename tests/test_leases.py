import contextlib
import errno
import itertools
import json
import os
import signal
import time
from dataclasses import dataclass, replace

import pytest
from studies import process

from speccert.experiments import lease_files, leases, processes
from speccert.experiments.leases import CancelledRunError, Lease, LeaseLostError, LeaseState, claim, read_lease
from speccert.experiments.store import StoreError

SETUP = """
import sys, time, os, signal
from pathlib import Path
from speccert.experiments import leases, processes
from speccert.experiments.leases import Lease, LeaseLostError, claim
def say(text): print(text, flush=True)
"""
HOLD = SETUP + "lease = claim(Path(sys.argv[1]), 't'); lease.__enter__(); say(lease.number); time.sleep(60)"


@pytest.fixture
def quick(monkeypatch):
    """Leases that end after half a second without a beat."""
    monkeypatch.setattr(leases, "LEASE_S", 0.5)
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "_CLOCK_S", 0.05)


@pytest.fixture
def elsewhere(monkeypatch):
    """This process, as if on another machine than those it starts."""
    monkeypatch.setattr(processes, "_machine", lambda: "elsewhere")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed_owner(folder):
    """Leave the lease of a process that was killed."""
    with process(HOLD, folder) as owner:
        owner.line()
        owner.kill()
        owner.wait()


def test_a_claimed_cell_is_held_and_a_released_one_is_free(tmp_path):
    folder = tmp_path / "new" / "cell"
    with claim(folder, "token") as lease:
        found = claim(folder, "other")
        assert isinstance(found, LeaseState)
        assert (found.number, found.live, found.content["token"]) == (1, True, "token")
        assert found.owner == f"process {os.getpid()} on {found.content['host']}"
        lease.check()
    assert not read_lease(folder).live
    with claim(folder, "other") as lease:
        assert lease.number == 2
        lease.finish()
    assert names(folder) == []
    assert read_lease(folder) == LeaseState(0, False, {})
    assert read_lease(tmp_path / "none") == LeaseState(0, False, {})


def test_an_interruption_releases(tmp_path):
    with pytest.raises(KeyboardInterrupt), claim(tmp_path, "t"):
        raise KeyboardInterrupt
    assert not read_lease(tmp_path).live


def test_a_cancelled_run_is_told_at_the_next_check(tmp_path):
    marker = tmp_path / "cancel"
    with claim(tmp_path / "cell", "t", marker.exists) as lease:
        lease.check()
        marker.touch()
        with pytest.raises(CancelledRunError):
            lease.check()


def test_progress_is_told_at_the_next_beat(tmp_path, quick):
    with claim(tmp_path, "t") as lease:
        lease.progress("training", 0.0)
        lease.progress("epoch 5/10", 0.5)
        lease.progress("epoch 6/10 " + "x" * 10**5, 0.6)
        for _ in range(100):
            content = read_lease(tmp_path).content
            if content["fraction"] == 0.6:
                break
            time.sleep(0.05)
        assert (content["fraction"], content["first"], content["stage"][:10]) == (0.6, 0.5, "epoch 6/10")
        assert content["elapsed_s"] >= content["first_s"] >= 0
        assert (tmp_path / "lease.1").stat().st_size == lease_files._SIZE


def test_the_lease_of_a_killed_process_is_free_at_once(tmp_path):
    with process(HOLD, tmp_path) as owner:
        owner.line()
        assert isinstance(claim(tmp_path, "t"), LeaseState)
        owner.send_signal(signal.SIGSTOP)
        assert read_lease(tmp_path).live  # stopped, and on this machine: it is alive
        owner.kill()
        owner.wait()
        start = time.monotonic()
        lease = claim(tmp_path, "t")
        assert isinstance(lease, Lease)
        assert time.monotonic() - start < 5.0  # no waiting for LEASE_S
        assert lease.number == 2


def test_a_reused_process_id_is_not_the_owner(tmp_path):
    with claim(tmp_path, "t"):
        content = json.loads((tmp_path / "lease.1").read_text())
        (tmp_path / "lease.1").write_text(json.dumps({**content, "start": "17"}))
        assert not read_lease(tmp_path).live


def test_an_owner_elsewhere_is_dead_after_the_time_of_a_lease(tmp_path, quick, elsewhere):
    with process(HOLD, tmp_path) as owner:
        owner.line()
        owner.kill()
        owner.wait()
        assert read_lease(tmp_path).live
        assert isinstance(claim(tmp_path, "t"), LeaseState)
        time.sleep(0.6)
        assert not read_lease(tmp_path).live
        assert claim(tmp_path, "t").number == 2


def test_an_owner_elsewhere_that_beats_is_live(tmp_path, quick, elsewhere):
    code = SETUP + "leases.BEAT_S = 0.1; claim(Path(sys.argv[1]), 't').__enter__(); say(1); time.sleep(60)"
    with process(code, tmp_path) as owner:
        owner.line()
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert read_lease(tmp_path).live
            time.sleep(0.05)


@pytest.mark.parametrize(("shift", "live"), [(0, True), (-50, True), (50, True), (-70, False), (70, False)])
def test_only_the_clock_that_stamps_files_counts(tmp_path, elsewhere, monkeypatch, shift, live):
    killed_owner(tmp_path)
    at = time.time() + shift  # a time to come: the clock was set back since, and a live owner would have beaten again
    os.utime(tmp_path / "lease.1", (at, at))
    monkeypatch.setattr(lease_files.time, "time", lambda: 0.0)
    lease_files._clocks.clear()
    assert read_lease(tmp_path).live is live
    assert names(tmp_path) == ["lease.1"]  # no probe is left


def test_many_leases_elsewhere_ask_the_clock_once(tmp_path, elsewhere, monkeypatch):
    killed_owner(tmp_path / "0")
    content = (tmp_path / "0" / "lease.1").read_bytes()
    lease_files._clocks.clear()
    asked = []
    monkeypatch.setattr(lease_files, "_asked_clock", lambda folder: asked.append(folder) or time.time())
    for k in range(1, 20):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "lease.1").write_bytes(content)
        assert read_lease(tmp_path / str(k)).live
    assert len(asked) == 1


def test_the_same_job_before_it_was_requeued_is_dead_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    killed_owner(tmp_path)
    monkeypatch.setattr(processes, "_machine", lambda: "another node")
    assert read_lease(tmp_path).live
    assert read_lease(tmp_path).owner.endswith("(Slurm job 7)")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not read_lease(tmp_path).live


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"machine": 3}', b'{"pid": "x"}', b" " * 99]
)
def test_a_damaged_lease_counts_by_its_age(tmp_path, content):
    path = tmp_path / "lease.7"
    path.write_bytes(content)
    assert read_lease(tmp_path).live
    os.utime(path, (time.time() - 100,) * 2)
    assert not read_lease(tmp_path).live
    lease = claim(tmp_path, "t")
    assert lease.number == 8
    assert lease.stuck_stage(1) is None


def test_other_files_are_no_leases(tmp_path):
    for name in ("lease.0", "lease.x", "lease.3.bak", ".lease.4", "lease.²", "lease.01"):
        (tmp_path / name).touch()
    assert read_lease(tmp_path).number == 0


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file: cannot be claimed \("):
        claim(tmp_path / "file", "t")


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user")
def test_a_lease_in_a_read_only_folder_is_read_and_not_claimed(tmp_path, monkeypatch):
    killed_owner(tmp_path)
    for path in (tmp_path, *tmp_path.parents[:3]):
        path.chmod(0o755)
    code = SETUP + (
        "processes._machine = lambda: 'elsewhere'\n"
        "os.setuid(65534)\n"
        "say(leases.read_lease(Path(sys.argv[1])).live)\n"
        "leases.LEASE_S = 0\n"
        "try: claim(Path(sys.argv[1]), 't')\n"
        "except ValueError as error: say(error)"
    )
    with process(code, tmp_path) as reader:
        assert reader.line() == "True"
        assert reader.line().endswith("cannot be claimed (Permission denied)")
    assert names(tmp_path) == ["lease.1"]


def test_a_full_disk_leaves_no_lease_that_nobody_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_files, "_encoded", lambda content: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StoreError, match=r"cannot be claimed \(full\)"):
        claim(tmp_path, "t")
    assert names(tmp_path) == []


def test_a_beat_on_a_full_disk_still_says_that_the_owner_lives(tmp_path, quick, monkeypatch):
    with claim(tmp_path, "t"):
        monkeypatch.setattr(
            lease_files, "_encoded", lambda content: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
        )
        os.utime(tmp_path / "lease.1", (1, 1))
        for _ in range(100):
            if (tmp_path / "lease.1").stat().st_mtime > 1:
                break
            time.sleep(0.05)
        assert (tmp_path / "lease.1").stat().st_mtime > 1
    assert not read_lease(tmp_path).live  # could not be marked as released, so it was removed
    assert names(tmp_path) == []


STOPPED = (
    SETUP
    + """
leases.BEAT_S = 0.1
with claim(Path(sys.argv[1]), 't') as lease:
    say(lease.number)
    sys.stdin.readline()
    time.sleep(0.5)  # some beats
    try:
        lease.check()
        say('mine')
    except LeaseLostError as error:
        say('lost')
say('out')
"""
)


@pytest.mark.parametrize("end", ["works", "finished", "released", "finished, begun anew"])
def test_an_owner_that_was_stopped_notices_that_it_lost_the_cell(tmp_path, quick, elsewhere, end):
    with process(STOPPED, tmp_path) as owner:
        owner.line()
        owner.send_signal(signal.SIGSTOP)
        time.sleep(0.7)
        with claim(tmp_path, "t") as lease:
            assert lease.number == 2
            if end != "works":
                if end.startswith("finished"):
                    lease.finish()
                lease.__exit__(None, None, None)
            if end.endswith("anew"):
                again = claim(tmp_path, "u")
                assert again.number == 1  # the very number of the owner that was stopped
                again.__enter__()
            before = names(tmp_path)
            owner.send_signal(signal.SIGCONT)
            owner.tell("go on")
            assert owner.line() == "lost"
            assert owner.line() == "out"
            assert names(tmp_path) == before  # it brings nothing back, and removes nothing
            if end == "works":
                lease.check()
            if end.endswith("anew"):
                again.check()
                assert read_lease(tmp_path).content["token"] == "u"


def test_a_cell_whose_folder_was_deleted_is_lost(tmp_path):
    with claim(tmp_path / "cell", "t") as lease:
        (tmp_path / "cell" / "lease.1").unlink()
        (tmp_path / "cell").rmdir()
        with pytest.raises(LeaseLostError, match="taken over by another process, or deleted"):
            lease.check()
    assert not (tmp_path / "cell").exists()


def test_three_deaths_without_an_epoch_are_told(tmp_path):
    for deaths in range(3):
        lease = claim(tmp_path, "t")
        assert lease.stuck_stage(3) is None
        with lease:
            pass
        (tmp_path / f"lease.{lease.number}").unlink()
        killed_owner(tmp_path)
        assert read_lease(tmp_path).number == deaths + 1
    with claim(tmp_path, "t") as lease:
        assert lease.stuck_stage(3) == "starting"
    assert claim(tmp_path, "t").stuck_stage(3) is None  # the one that told it let go


def test_deaths_with_epochs_between_them_are_none_that_matter(tmp_path):
    for k in range(3):
        (tmp_path / "resume.pt").write_bytes(b"x")
        os.utime(tmp_path / "resume.pt", ns=(k, k))
        killed_owner(tmp_path)
    assert claim(tmp_path, "t").stuck_stage(3) is None


RACE = (
    SETUP
    + """
wins = []
for line in sys.stdin:
    folder, at = line.split()
    while time.time() < float(at): pass
    lease = claim(Path(folder), 't')
    if isinstance(lease, Lease):
        wins.append(lease.__enter__())
    say('won' if isinstance(lease, Lease) else 'held')
"""
)


@pytest.mark.parametrize("stale", [False, True], ids=["new cells", "cells of a dead owner"])
def test_of_many_processes_one_gets_the_cell(tmp_path, stale):
    count, rounds = 8, 50
    if stale:
        killed_owner(tmp_path / "dead")
        content = (tmp_path / "dead" / "lease.1").read_bytes()
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(process(RACE)) for _ in range(count)]
        for racer in racers:
            racer.tell(f"{tmp_path / str(racer.pid)} 0")
        assert [racer.line() for racer in racers] == ["won"] * count  # all are awake
        for k in range(rounds):
            folder = tmp_path / f"round{k}"
            if stale:
                folder.mkdir()
                (folder / "lease.1").write_bytes(content)
            at = time.time() + 0.01
            for racer in racers:
                racer.tell(f"{folder} {at}")
            ends = [racer.line() for racer in racers]
            assert ends.count("won") == 1
            assert read_lease(folder).number == 1 + stale


WORKER = (
    SETUP
    + """
import random
random.seed(int(sys.argv[2]))
cells = sorted(Path(sys.argv[1]).glob('cell*'))
journal = os.open(Path(sys.argv[1]) / 'journal', os.O_WRONLY | os.O_APPEND)
def note(text): os.write(journal, f'{text} {os.getpid()}\\n'.encode())
while open_cells := [cell for cell in cells if not (cell / 'summary').exists()]:
    cell = random.choice(open_cells)
    lease = claim(cell, 't')
    if not isinstance(lease, Lease):
        continue
    with lease:
        if (cell / 'summary').exists():
            lease.finish()
            continue
        note(f'begin {cell.name}')
        time.sleep(0.005 * random.random())
        if random.random() < 0.25: os.kill(os.getpid(), signal.SIGKILL)
        if random.random() < 0.2:
            note(f'end {cell.name}')
            continue
        lease.check()
        note(f'end {cell.name}')
        (cell / 'summary').touch()
        note(f'finished {cell.name}')
        if random.random() < 0.2: os.kill(os.getpid(), signal.SIGKILL)
        lease.finish()
"""
)


@pytest.mark.slow
def test_workers_that_are_killed_at_random_finish_every_cell_once(tmp_path):
    cells = [tmp_path / f"cell{k}" for k in range(60)]
    for cell in cells:
        cell.mkdir()
    (tmp_path / "journal").touch()
    seeds = itertools.count()
    dead = set()
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(process(WORKER, tmp_path, next(seeds))) for _ in range(6)]
        while any(worker.poll() is None for worker in workers):
            for k, worker in enumerate(workers):
                if worker.poll() not in (None, 0):
                    dead.add(worker.pid)
                    workers[k] = stack.enter_context(process(WORKER, tmp_path, next(seeds)))
            time.sleep(0.02)
        assert [worker.returncode for worker in workers] == [0] * 6
    assert len(dead) > 5
    lines = [line.split() for line in (tmp_path / "journal").read_text().splitlines()]
    for cell in cells:
        mine = [(event, int(pid)) for event, name, pid in lines if name == cell.name]
        assert [event for event, _ in mine].count("finished") == 1
        for (event, pid), (_, following) in itertools.pairwise(mine):
            assert pid == following or event != "begin" or pid in dead  # nobody begins while another is at it
    assert all(names(cell) == ["summary"] for cell in cells if not read_lease(cell).content)


# The steps of the protocol, and all their interleavings.


@dataclass(frozen=True)
class Actor:
    """One process: its next step, the N it saw, whether it is dead, how often it may still come back."""

    step: str = "list"
    seen: int = 0
    key: int = 0  # of the lease that it saw
    dead: bool = False
    tries: int = 0
    left: tuple[int, ...] = ()  # leases still to remove


@dataclass(frozen=True)
class World:
    """Leases by number, each with its owner and whether it was released; the actors; what may still happen."""

    leases: tuple[tuple[int, int, bool], ...]
    actors: tuple[Actor, ...]
    finished: bool = False
    crashes: int = 1
    damages: int = 1
    twice: bool = False

    def lease(self, number):
        return next((lease for lease in self.leases if lease[0] == number), None)


def successors(world, verify, suspect):
    """Every world that one step of one actor, or one accident, leads to."""
    if world.finished and world.damages:  # somebody damages the summary
        yield replace(world, finished=False, damages=world.damages - 1)
    for k, actor in enumerate(world.actors):
        if actor.dead:
            continue
        if world.crashes and actor.step != "out":
            yield act(world, k, replace(actor, dead=True), crashes=world.crashes - 1)
        yield from steps(world, k, actor, verify, suspect)


def act(world, k, actor, **changes):
    return replace(world, actors=(*world.actors[:k], actor, *world.actors[k + 1 :]), **changes)


def steps(world, k, actor, verify, suspect):
    numbers = [lease[0] for lease in world.leases]
    own = world.lease(actor.seen + 1)
    key = 10 * k + actor.tries
    mine = own is not None and own[1] == key
    others = [lease for lease in world.leases if lease is not own]

    def to(step, **changes):
        return act(world, k, replace(actor, step=step), **changes)

    if actor.step == "list":
        yield act(world, k, replace(actor, step="judge", seen=max(numbers, default=0)))
    elif actor.step == "judge":
        found = world.lease(actor.seen)
        actor = replace(actor, key=found[1] if found else 0)
        if actor.seen == 0 or (found and (found[2] or found[1] < 0 or world.actors[found[1] // 10].dead)):
            yield to("create")
        else:
            yield to("out")
            if found and suspect:  # it was silent for too long
                yield to("create")
    elif actor.step == "create":
        created = (*world.leases, (actor.seen + 1, key, False))
        yield to("out") if own else to("verify" if verify else "ask", leases=created)
    elif actor.step == "verify":
        good = (
            max(numbers, default=0) == actor.seen + 1 and max((lease[0] for lease in others), default=0) == actor.seen
        )
        yield to("read" if good else "withdraw")
    elif actor.step == "read":
        yield to("compare" if mine and actor.seen else "ask" if mine else "withdraw")
    elif actor.step == "compare":  # and mark it as taken
        found = world.lease(actor.seen)
        yield to("ask" if found and found[1] == actor.key else "withdraw")
    elif actor.step == "withdraw":
        yield to("out", leases=tuple(others) if mine else world.leases)
    elif actor.step == "ask":
        yield to("sum" if world.finished else "own")
    elif actor.step == "own":
        held = mine and max(numbers, default=0) == actor.seen + 1
        yield to("sum", finished=True, twice=world.finished) if held else to("release")
        yield to("release")  # an error, or it was told to stop
    elif actor.step == "release":
        yield to("out", leases=(*others, (own[0], key, True)) if mine else world.leases)
    elif actor.step == "sum":
        left = tuple(sorted(number for number in numbers if number <= actor.seen + 1)) if mine else ()
        yield act(world, k, replace(actor, step="remove", left=left))
    elif actor.step == "remove":
        if not actor.left:
            yield to("out")
        else:
            rest = tuple(lease for lease in world.leases if lease[0] != actor.left[0])
            yield act(world, k, replace(actor, left=actor.left[1:]), leases=rest)
    elif actor.step == "out" and actor.tries:
        yield act(world, k, Actor(tries=actor.tries - 1))


def violations(verify=True, suspect=False, dead_leases=1, actors=3, tries=0):
    """How many worlds there are in which two work on one unfinished cell, or (with suspicion) one is finished twice."""
    start = World(tuple((number, -1, False) for number in range(1, dead_leases + 1)), (Actor(tries=tries),) * actors)
    seen, queue = {start}, [start]
    found = 0
    while queue:
        world = queue.pop()
        owners = [actor for actor in world.actors if actor.step == "own" and not actor.dead]
        found += world.twice or (not suspect and len(owners) > 1 and not world.finished)
        for following in successors(world, verify, suspect):
            following = replace(following, leases=tuple(sorted(following.leases)))
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return found, len(seen)


@pytest.mark.parametrize("dead_leases", [0, 1])
def test_in_all_interleavings_one_works_on_an_unfinished_cell(dead_leases):
    assert violations(dead_leases=dead_leases)[0] == 0


def test_without_reading_again_two_would_work_on_it():
    assert violations(verify=False, actors=2, tries=1)[0] > 0


def test_in_all_interleavings_an_owner_that_lost_the_cell_does_not_finish_it_again():
    assert violations(suspect=True, actors=2)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [{"suspect": True}, {"suspect": True, "actors": 2, "tries": 1}, {"actors": 2, "tries": 2}, {"dead_leases": 2}],
)
def test_in_more_interleavings(case):
    assert violations(**case)[0] == 0
