"""Text made by two processes is the text that one would make, also when the second one fails."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from nattrace import forking
from nattrace.forking import may_fork, texts_of_both

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="kernel has no memfd_create")


def test_the_halves_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_PIECE_BYTES", 7)
    here = os.getpid()
    made = "".join(texts_of_both(lambda: iter(["a", "bc"]), lambda: iter([f"{os.getpid() != here} " * 50])))
    assert made == "abc" + "True " * 50


def test_a_process_that_fails_is_made_up_for() -> None:
    here = os.getpid()

    def second() -> Iterator[str]:
        yield "half "
        if os.getpid() != here:
            os._exit(3)
        yield "whole"

    assert "".join(texts_of_both(lambda: iter(["first "]), second)) == "first half whole"


def test_an_abandoned_process_is_ended() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield ""

    texts = texts_of_both(lambda: iter(["first", "more"]), endless)
    assert next(texts) == "first"
    texts.close()  # type: ignore[attr-defined]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_one_processor_is_no_reason_to_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    assert not may_fork()
