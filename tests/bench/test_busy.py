import os
import subprocess

import pytest

from torchrec_amort.bench import busy


def state(process: subprocess.Popen[bytes]) -> str:
    """`T` of a process that is stopped."""
    with open(f"/proc/{process.pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0]


def test_busy_processes_rest_and_work_and_end() -> None:
    with pytest.raises(KeyboardInterrupt), busy.busy_processes(2) as processes:
        started = processes._processes
        processes.rest()
        assert [state(process) for process in started] == ["T", "T"]
        processes.work()
        for process in started:
            assert os.WIFCONTINUED(os.waitpid(process.pid, os.WCONTINUED)[1])
        raise KeyboardInterrupt
    assert len(started) == 2
    assert all(process.returncode == -9 for process in started)


@pytest.mark.parametrize("is_known", [False, True], ids=["just now", "before"])
def test_a_busy_process_that_ended_is_told(is_known: bool) -> None:
    with busy.busy_processes(1) as processes:
        (process,) = processes._processes
        os.kill(process.pid, 15)
        if is_known:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(RuntimeError, match="a busy process ended"):
            processes.rest()
