"""The progress bar: there when work takes a while and somebody watches, never in the way of the items."""

import os
import pty
import subprocess
import sys

from pcafast.progress import track

SLOW = (
    "import time\nfrom pcafast import progress\n"
    "for _ in progress.track(range(8), 'working'): time.sleep(0.3)\nprint('done')"
)


def on_a_terminal(code):
    """What the code writes to standard error, which is a terminal."""
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(mine, 4096)
        except OSError:  # the other end was closed
            break
    assert process.communicate()[0] == b"done\n"
    return seen.decode()


def test_a_bar_with_the_time_left_on_a_terminal():
    seen = on_a_terminal(SLOW)
    assert "working" in seen
    assert "left" in seen
    assert "/8" in seen


def test_a_bar_while_the_first_item_takes_long():
    assert "working" in on_a_terminal(SLOW.replace("range(8)", "range(1)").replace("0.3", "1.5"))


def test_no_bar_for_quick_work():
    assert on_a_terminal(SLOW.replace("0.3", "0.01")) == ""


def test_items_pass_unchanged(capsys):
    assert list(track(iter("abc"), "letters")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
