"""The queue of runs: order, devices, restarts of the page, and what becomes of processes that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ldm.files import CHECKOUT
from ldm.studio.queue import Queue, train_command
from ldm.training.record import RunRecord
from ldm.util import UserError

# In place of main.py: makes the run folder, holds its lock, writes its status, and ends when it is asked to.
FAKE = f"""
import json, signal, sys, time
sys.path.insert(0, {str(CHECKOUT)!r})
from pathlib import Path
from ldm.training.run_folder import locked
words = sys.argv[1:]
if "fail" in words:
    from ldm.commands.base import guarded
    from ldm.front_ends import setting
    from ldm.util import UserError
    def fail():
        raise UserError("image folder not found: gone; choose it with " + setting("images"))
    sys.exit(guarded(fail))
if "crash" in words:
    import os
    os._exit(9)
folder = Path(words[1]) if words[0] == "-r" else Path("logs") / ("run" + words[-1].removeprefix("--postfix="))
def status(state):
    (folder / "status.json").write_text(json.dumps(dict(state=state, step=1, device="cpu", message=state)))
def stop(*arguments):
    status("stopped")
    sys.exit(143)
with locked(folder):
    signal.signal(signal.SIGTERM, stop)
    status("training")
    if "quick" not in words:
        time.sleep(60)
    if "full" in words:
        status("failed")
        sys.stderr.write("error: the disk is full\\n")
        sys.exit(1)
    status("finished")
"""


@pytest.fixture
def make(tmp_path, monkeypatch) -> Iterator[Callable[[], Queue]]:
    (tmp_path / "fake.py").write_text(FAKE)
    made: list[Queue] = []

    def make() -> Queue:
        made.append(Queue(tmp_path / "logs", tmp_path, [sys.executable, str(tmp_path / "fake.py")]))
        return made[-1]

    yield make
    for queue in made:
        for child in queue._children.values():
            child.kill()
            child.wait()


def until(condition: Callable[[], object], queue: Queue | None = None) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, f"it took too long: {queue and states(queue)}"
        time.sleep(0.02)
        if queue is not None:
            queue.tick()


def states(queue: Queue) -> list[str]:
    return [f"{job.title} {job.state}" for job in queue.jobs()]


def test_one_run_at_a_time_for_each_device(make, tmp_path):
    queue = make()
    first = queue.add(["a"], "first", "cpu")
    queue.add(["quick"], "second", "cpu")
    queue.add(["a"], "other", "cuda:0")
    queue.tick()
    assert states(queue) == ["first running", "second waiting", "other running"]
    until(lambda: queue.jobs()[0].folder == f"run-{first.id}", queue)
    until(lambda: (tmp_path / "logs" / f"run-{first.id}" / "status.json").exists())
    assert RunRecord.read(tmp_path / "logs" / f"run-{first.id}").live
    queue.stop(first.id)
    until(lambda: "second running" in states(queue), queue)
    assert RunRecord.read(tmp_path / "logs" / f"run-{first.id}").state == "stopped"
    until(lambda: states(queue) == ["other running"], queue)


def test_the_order_can_be_changed(make):
    queue = make()
    ids = {title: queue.add([title], title, "cpu").id for title in "abcd"}
    queue.move(ids["d"], -2)
    queue.move(ids["a"], 1)
    queue.move(ids["c"], 99)
    queue.move("none", 1)
    assert [job.title for job in queue.jobs()] == ["d", "a", "b", "c"]
    queue.remove(ids["a"])
    assert [job.title for job in queue.jobs()] == ["d", "b", "c"]
    assert [job.title for job in make().jobs()] == ["d", "b", "c"]  # a page that was started again


def test_runs_outlive_the_page_and_are_found_again(make, tmp_path):
    queue = make()
    job = queue.add(["a"], "first", "cpu")
    queue.add(["quick"], "second", "cpu")
    queue.tick()
    until(lambda: queue.jobs()[0].folder, queue)
    process = queue.jobs()[0].process
    assert os.getsid(process) == process != os.getsid(0)
    again = make()
    again.tick()
    assert states(again) == ["first running", "second waiting"]
    again.stop(job.id)
    queue._children[job.id].wait()
    until(lambda: states(again) == [], again)
    assert [RunRecord.read(run).state for run in sorted((tmp_path / "logs").glob("run-*"))] != []


def test_the_command_line_s_runs_count(make, tmp_path):
    queue = make()
    queue.add(["quick"], "mine", "cpu")
    theirs = tmp_path / "logs" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "status.json").write_text(json.dumps({"state": "training", "device": "cpu"}))
    job = next(iter(make().jobs()))
    holder = f"import sys, time\nsys.path.insert(0, {str(CHECKOUT)!r})\nfrom ldm.training.run_folder import locked\n"
    holder += "with locked(sys.argv[1]):\n    time.sleep(60)"

    other = subprocess.Popen([sys.executable, "-c", holder, str(theirs)])
    until(lambda: RunRecord.read(theirs).live)
    queue.tick()
    assert states(queue) == ["mine waiting"]
    queue.stop_run(theirs)
    other.wait()
    queue.tick()
    assert states(queue) == ["mine running"] and job.title == "mine"
    with pytest.raises(UserError, match="nothing trains"):
        queue.stop_run(theirs)


def test_errors_are_the_line_they_are(make):
    queue = make()
    queue.add(["fail"], "no folder", "cpu")
    until(lambda: states(queue) == ["no folder failed"], queue)
    assert queue.jobs()[0].message == "image folder not found: gone; choose it with 'Image folder'"
    queue.add(["crash"], "killed", "cpu")
    until(lambda: "killed failed" in states(queue), queue)
    assert "memory" in queue.jobs()[1].message
    queue.add(["quick", "full"], "disk", "cpu")
    until(lambda: "disk failed" in states(queue), queue)
    assert queue.jobs()[2].message == "the disk is full"
    for job in queue.jobs():
        queue.remove(job.id)
    assert queue.jobs() == []
    gone = Queue(queue.logdir, queue.root, ["/no/such/program"])
    gone.add(["a"], "program", "cpu")
    gone.tick()
    assert states(gone) == ["program failed"] and "could not be started" in gone.jobs()[0].message


def test_a_run_that_goes_on_is_continued_once(make, tmp_path):
    queue = make()
    queue.add(["-r", "logs/old", "-t", "quick"], "old", "cpu", folder="old")
    with pytest.raises(UserError, match="waits already"):
        queue.add(["-r", "logs/old", "-t"], "old", "cpu", folder="old")
    until(lambda: queue.jobs() == [], queue)
    assert RunRecord.read(tmp_path / "logs" / "old").state == "finished"


def test_two_people_press_start_at_once(make):
    queue = make()
    people = [threading.Thread(target=queue.add, args=(["quick"], f"{n}", "cpu")) for n in range(16)]
    for person in people:
        person.start()
    queue.tick()
    for person in people:
        person.join()
    queue.tick()
    assert len({job.id for job in queue.jobs()}) == 16
    assert [job.state for job in queue.jobs()].count("running") == 1


def test_a_damaged_file_is_kept(make, tmp_path, caplog):
    (tmp_path / "logs" / ".studio").mkdir(parents=True)
    (tmp_path / "logs" / ".studio" / "queue.json").write_text('[{"id": 3')
    assert make().jobs() == [] and "damaged" in caplog.text
    assert len(list((tmp_path / "logs" / ".studio").glob("queue-*.json"))) == 1


def test_a_full_disk_adds_nothing(make, monkeypatch):
    queue = make()
    queue.add(["a"], "first", "cpu")

    def full(*arguments):
        raise UserError("cannot write: the disk is full")

    monkeypatch.setattr("ldm.studio.queue.files.write_text", full)
    with pytest.raises(UserError, match="disk is full"):
        queue.add(["b"], "second", "cpu")
    assert states(queue) == ["first waiting"]


def test_a_process_of_the_same_number_is_not_the_run(make, monkeypatch):
    queue = make()
    queue.add(["a"], "first", "cpu")
    queue.tick()
    child = next(iter(queue._children.values()))
    again = make()
    child.kill()
    child.wait()
    monkeypatch.setattr("ldm.studio.queue._began", lambda process: "later")
    again.tick()
    assert states(again) == ["first failed"]
    with pytest.raises(UserError, match="does not go on"):
        again.stop(again.jobs()[0].id)


def test_the_loop_goes_on_after_an_error(make, monkeypatch, caplog):
    monkeypatch.setattr("ldm.studio.queue.PERIOD", 0.01)
    queue = make()
    calls: list[int] = []

    def tick() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("once")

    monkeypatch.setattr(queue, "tick", tick)
    queue.start()
    until(lambda: len(calls) > 2)
    queue.close()
    assert "could not be looked at" in caplog.text


def test_the_program_is_main_py(monkeypatch, tmp_path):
    assert train_command()[-1].endswith("main.py")
    monkeypatch.setattr("ldm.studio.queue.CHECKOUT", tmp_path)
    assert train_command()[-1] == "train"
