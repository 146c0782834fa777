"One writer, also where the file system has no locks, after a kill, when the other one is on another host, or starts at the same moment."
import errno
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import time

import exact
import filelock._unix
import pytest
from exact import ended, fork
from faults.lives import done, numbers, straight, tiny

import lmnb.engine
from lmnb import Trainer, cli, stop
from lmnb.background import condition, train_words
from lmnb.rundir import FORSAKEN_S, RunBusy, RunDir, started_at

LOCKS = 'locks of runs that were killed, that are elsewhere, or of a file system without any', 'one writer, and none shut out for ever'


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def no_flock(request, monkeypatch):
    def refuse(*_): raise OSError(request.param, 'no locks here')
    monkeypatch.setattr(filelock._unix.fcntl, 'flock', refuse)


def other(run, s_ago):
    "As a run on another host leaves it: its marker and its last heartbeat."
    (run/'.lock.soft').write_text('4711\ngpu-2\n')
    run.write_status(state='running', step=7, max_steps=9, pid=4711, host='gpu-2', heartbeat=time.time()-s_ago)


def test_a_file_serves_where_there_are_no_locks(row, no_flock, tmp_path):
    row(*LOCKS)
    row.tried()
    (tmp_path/'.lock').touch()   # flock left it, on another day
    run = RunDir(tmp_path)
    for _ in range(2):
        with run.locked():
            assert (tmp_path/'.lock.soft').exists()
            with pytest.raises(RunBusy, match='another process trains in'): RunDir(tmp_path).locked().__enter__()
        assert not (tmp_path/'.lock.soft').exists()


def test_another_host_that_is_silent_is_taken_over(row, no_flock, tmp_path, capsys):
    row(*LOCKS)
    row.tried()
    run = RunDir(tmp_path)
    other(run, 5)
    with pytest.raises(RunBusy, match='pid 4711 on gpu-2, at step 7'): run.locked().__enter__()
    assert condition(run).state == 'elsewhere'
    other(run, FORSAKEN_S+60)
    assert condition(run).state == 'died'
    with run.locked(): assert 'taken over: nothing was heard from gpu-2 for 3 min' in capsys.readouterr().out


def test_without_a_sign_of_who_it_was_nothing_is_taken(row, no_flock, tmp_path):
    row(*LOCKS)
    row.tried()
    run = RunDir(tmp_path)
    other(run, 9999)
    for text in ('', '{"host": "gpu-2"}', json.dumps(dict(host='gpu-2', heartbeat='long ago'))):
        (tmp_path/'run.json').write_text(text)
        with pytest.raises(RunBusy): run.locked().__enter__()


KILLED = 'import os, sys; from lmnb.rundir import RunDir; held = RunDir(sys.argv[1]).locked(); held.__enter__(); os.kill(os.getpid(), 9)'
NO_FLOCK = 'import fcntl\ndef refuse(*_): raise OSError(38, "no")\nfcntl.flock = refuse\n'


@pytest.mark.parametrize('before', ['', NO_FLOCK], ids=['flock', 'none'])
def test_a_kill_leaves_no_lock_that_needs_a_hand(row, tmp_path, before, monkeypatch):
    row(*LOCKS)
    row.tried()
    if before: monkeypatch.setattr(filelock._unix.fcntl, 'flock', lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, 'no')))
    assert subprocess.run([sys.executable, '-c', before+KILLED, tmp_path]).returncode == -9
    assert (tmp_path/('.lock.soft' if before else '.lock')).exists()
    time.sleep(2.1*bool(before))   # filelock's own patience with a marker
    with RunDir(tmp_path).locked(): pass


def test_other_refusals_are_errors(row, tmp_path, monkeypatch):
    row(*LOCKS)
    row.tried()
    def refuse(*_): raise OSError(errno.EIO, 'a broken disk')
    monkeypatch.setattr(filelock._unix.fcntl, 'flock', refuse)
    with pytest.raises(OSError, match='broken disk'): RunDir(tmp_path).locked().__enter__()


# Two at the same moment -----------------------------------------------------------------------------------------------

def contend(run, config, told, me, gate, free):
    "Train as the command line does, from the moment when both are ready; who trains waits until the other has ended."
    sys.stderr = sys.stdout
    def hold(tokens, k, *rest):
        if not told[me]:
            told[me] = 1
            assert free.wait(20), 'the other one trains, too'
    exact.wrap(lmnb.engine, 'get_batch', hold)
    gate.wait(20)
    try: cli.train([*train_words(run, config, 'latest-or-new', None, {}), '--quiet'])
    except SystemExit as e: return e.code


def test_two_start_at_the_same_moment(text, tmp_path, row, times):
    row('two processes start in one folder at the same moment', 'one trains, the other ends with exit 2 and names its pid and host')
    config, mp = tiny(text, max_steps=6, save_interval=3), multiprocessing.get_context('fork')
    other = straight(config, tmp_path/'straight')
    for i in range(times(8, 100)):
        run, gate, free, told = tmp_path/f'run{i}', mp.Barrier(2), mp.Event(), numbers()
        if i % 2:  # there was a life before, so `run.json` names a process that is gone
            def killed(): exact.wrap(lmnb.engine, 'get_batch', lambda tokens, k, *_: os.kill(os.getpid(), 9) if k == 5 else None); Trainer(config, run, quiet=True).fit()
            assert exact.forked(killed, tmp_path/'killed.txt') == -9
        logs = [tmp_path/f'{i}{me}.txt' for me in (0, 1)]
        pids, ears = [], []
        for me in (0, 1):
            ear, mouth = os.pipe()  # which closes with the child
            pids.append(fork(lambda: contend(run, config, told, me, gate, free), logs[me]))
            ears.append(ear)
            os.close(mouth)
        loser = ears.index(select.select(ears, [], [])[0][0])
        code = ended(pids[loser])
        free.set()
        won = ended(pids[1-loser])
        for ear in ears: os.close(ear)
        said = logs[loser].read_text()
        assert (code, won, told[0]+told[1]) == (2, 0, 1), (code, won, said, logs[1-loser].read_text())
        assert f'another process trains in {run}: pid {pids[1-loser]} on {socket.gethostname()}' in said
        row.tried()
        done(run, config, other)


# A pid that is another process's now ----------------------------------------------------------------------------------

@pytest.fixture
def stranger():
    "A process that is not ours, and dies of any signal."
    pid = fork(lambda: time.sleep(60), os.devnull)
    yield pid
    os.kill(pid, signal.SIGKILL)
    ended(pid)


@pytest.mark.parametrize('state', ['starting', 'running', 'stopping'])
def test_a_reused_pid_is_never_signalled(stranger, state, tmp_path, row, capsys):
    row('the pid in run.json is another process\'s now', 'the run counts as gone; nobody is signalled')
    run = RunDir(tmp_path)
    for born in (started_at(stranger)-3600, started_at(stranger)+3600, None, 'x', [], float('nan')):
        for pid in (stranger, str(stranger), float(stranger)):
            run.write_status(state=state, step=7, max_steps=9, pid=pid, pid_start=born, host=socket.gethostname(), heartbeat=time.time())
            for kill in (False, True):
                with pytest.raises(RuntimeError, match='nothing runs in'): stop(run, kill=kill)
            with pytest.raises(SystemExit) as e: cli.runs(['--stop', str(run)])
            assert e.value.code == 2 and 'nothing runs in' in capsys.readouterr().err
            with run.locked(): pass
            row.tried()
    for pid in (0, -1, -stranger, 2**40, None, 'x', True):  # 0 and below are groups of processes
        run.write_status(state=state, step=7, max_steps=9, pid=pid, pid_start=time.time(), host=socket.gethostname(), heartbeat=time.time())
        with pytest.raises(RuntimeError, match='nothing runs in'): stop(run)
        row.tried()
    assert os.waitpid(stranger, os.WNOHANG) == (0, 0) and not (tmp_path/'stop').exists()
