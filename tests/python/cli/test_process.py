"""What `tqai`'s verbs run in processes of their own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest
from tqai.cli.process import run_fresh

TIRELESS = """
import os, signal, time
from tqai.cli.process import run_fresh

def for_ever():
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    run_fresh(for_ever)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pipes cannot be waited for")
def test_ends_when_its_parent_is_killed(tmp_path):
    program = tmp_path / "tireless.py"
    program.write_text(TIRELESS)
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        try:
            parent.kill()
            # The pipe ends with the last process that holds it.
            ended, _, _ = select.select([parent.stdout], [], [], 30)
            assert ended
            assert parent.stdout.read() == b""
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
def test_ends_when_its_parent_alone_is_interrupted(tmp_path):
    program = tmp_path / "tireless.py"
    program.write_text(TIRELESS)
    with subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as parent:
        child = int(parent.stdout.readline())
        try:
            parent.send_signal(signal.SIGINT)
            assert b"KeyboardInterrupt" in parent.communicate(timeout=60)[1]
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_result_and_exceptions_pass_through():
    assert run_fresh(divmod, 7, 3) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        run_fresh(divmod, 1, 0)


def test_one_that_ends_early_is_named():
    with pytest.raises(OSError, match="ended early"):
        run_fresh(os._exit, 3)
