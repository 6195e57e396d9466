from __future__ import annotations

import io

import pytest

from nattrace import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nobody_watches_a_file() -> None:
    stream = io.StringIO()
    with progress.progress_bar(stream) as show:
        assert show is None
    with progress.progress_bar(None) as show:
        assert show is None
    assert not stream.getvalue()


def test_work_that_is_quickly_done_shows_no_bar() -> None:
    stream = Terminal()
    with progress.progress_bar(stream) as show:
        assert show is not None
        show(10, 100)
        show(100, 100)
    assert not stream.getvalue().strip()


def test_a_bar_is_drawn_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), progress.progress_bar(stream) as show:  # noqa: PT012
        assert show is not None
        show(50, 100)
        raise KeyboardInterrupt
    assert "nattrace:" in stream.getvalue()
    assert stream.getvalue().endswith("\r")
    assert not stream.getvalue().split("\r")[-2].strip()  # the last thing written is blanks over the bar
