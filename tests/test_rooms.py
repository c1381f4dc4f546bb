"""The house keeps its order: arrows run one way, no files import one another, and the face names only what is there."""

import fedllm
from evidence.pages import rooms


def test_every_room_imports_only_what_the_table_allows():
    assert not rooms.astray()


def test_no_circle_between_files():
    assert not rooms.circles()


def test_the_table_itself_has_no_circle():
    order: list[str] = []
    while left := [r for r in rooms.MAY if r not in order]:
        free = [r for r in left if set(rooms.MAY[r].split()) <= set(order)]
        assert free, f"each of {left} waits for another of them"
        order += free


def test_every_room_that_is_there_stands_in_the_table():
    assert {rooms.room(m) for m in rooms.modules()} <= rooms.MAY.keys()


def test_a_forbidden_import_would_be_found(monkeypatch):
    monkeypatch.setattr(rooms, "imports", lambda: {"fedllm.core.ask": {"fedllm.runs.run"},
                                                   "fedllm.runs.run": {"fedllm.core.ask"}})
    assert rooms.astray() == ["fedllm.core.ask imports fedllm.runs.run"]
    assert rooms.circles() == [["fedllm.core.ask", "fedllm.runs.run"]]


def test_the_face():
    for name in fedllm.__all__:
        assert getattr(fedllm, name).__doc__, name
