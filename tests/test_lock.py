"One writer, also where the file system has no locks, after a kill, and when the other one is on another host."
import errno
import json
import subprocess
import sys
import time

import filelock._unix
import pytest

from lmnb.background import condition
from lmnb.rundir import FORSAKEN_S, RunBusy, RunDir


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def no_flock(request, monkeypatch):
    def refuse(*_): raise OSError(request.param, 'no locks here')
    monkeypatch.setattr(filelock._unix.fcntl, 'flock', refuse)


def other(run, s_ago):
    "As a run on another host leaves it: its marker and its last heartbeat."
    (run/'.lock.soft').write_text('4711\ngpu-2\n')
    run.write_status(state='running', step=7, max_steps=9, pid=4711, host='gpu-2', heartbeat=time.time()-s_ago)


def test_a_file_serves_where_there_are_no_locks(no_flock, tmp_path):
    (tmp_path/'.lock').touch()   # flock left it, on another day
    run = RunDir(tmp_path)
    for _ in range(2):
        with run.locked():
            assert (tmp_path/'.lock.soft').exists()
            with pytest.raises(RunBusy, match='another process trains in'): RunDir(tmp_path).locked().__enter__()
        assert not (tmp_path/'.lock.soft').exists()


def test_another_host_that_is_silent_is_taken_over(no_flock, tmp_path, capsys):
    run = RunDir(tmp_path)
    other(run, 5)
    with pytest.raises(RunBusy, match='pid 4711 on gpu-2, at step 7'): run.locked().__enter__()
    assert condition(run).state == 'elsewhere'
    other(run, FORSAKEN_S+60)
    assert condition(run).state == 'died'
    with run.locked(): assert 'taken over: nothing was heard from gpu-2 for 3 min' in capsys.readouterr().out


def test_without_a_sign_of_who_it_was_nothing_is_taken(no_flock, tmp_path):
    run = RunDir(tmp_path)
    other(run, 9999)
    for text in ('', '{"host": "gpu-2"}', json.dumps(dict(host='gpu-2', heartbeat='long ago'))):
        (tmp_path/'run.json').write_text(text)
        with pytest.raises(RunBusy): run.locked().__enter__()


KILLED = 'import os, sys; from lmnb.rundir import RunDir; held = RunDir(sys.argv[1]).locked(); held.__enter__(); os.kill(os.getpid(), 9)'
NO_FLOCK = 'import fcntl\ndef refuse(*_): raise OSError(38, "no")\nfcntl.flock = refuse\n'


@pytest.mark.parametrize('before', ['', NO_FLOCK], ids=['flock', 'none'])
def test_a_kill_leaves_no_lock_that_needs_a_hand(tmp_path, before, monkeypatch):
    if before: monkeypatch.setattr(filelock._unix.fcntl, 'flock', lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, 'no')))
    assert subprocess.run([sys.executable, '-c', before+KILLED, tmp_path]).returncode == -9
    assert (tmp_path/('.lock.soft' if before else '.lock')).exists()
    time.sleep(2.1*bool(before))   # filelock's own patience with a marker
    with RunDir(tmp_path).locked(): pass


def test_other_refusals_are_errors(tmp_path, monkeypatch):
    def refuse(*_): raise OSError(errno.EIO, 'a broken disk')
    monkeypatch.setattr(filelock._unix.fcntl, 'flock', refuse)
    with pytest.raises(OSError, match='broken disk'): RunDir(tmp_path).locked().__enter__()
