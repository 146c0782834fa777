"Runs as processes of their own: who starts, finds, stops and survives what."
import os
import subprocess
import sys
import time

import psutil
import pytest
from conftest import EVERY, TINY, command, events, powerless, train

from lmnb import attach, find_runs, launch, list_checkpoints, stop
from lmnb.background import Background, condition
from lmnb.config import parse_settings, preset
from lmnb.history import to_line
from lmnb.panel import pace
from lmnb.rundir import RunBusy, RunDir, RunExists, started_at
from lmnb.runs import runs_table

LONG = preset(**parse_settings([*TINY, *EVERY, 'max_steps=100000']))


def until(f, s=60):
    end = time.monotonic()+s
    while not (value := f()):
        assert time.monotonic() < end, f'not within {s} s'
        time.sleep(.05)
    return value


@pytest.fixture
def long(text, tmp_path):
    "A run that goes on until it is stopped, launched in the background."
    run = launch(tmp_path/'long', LONG, data=str(text))
    yield run
    if condition(run.run).alive: stop(run.run, kill=True)


def at_work(run): return until(lambda: condition(run.run).state == 'running' and events(run.run.path, 'train'))


def test_launched_it_has_a_session_of_its_own(long):
    pid = condition(long.run).pid
    assert condition(long.run).state == 'starting' and os.getsid(pid) == pid
    at_work(long)
    assert condition(long.run).pid == pid
    with pytest.raises(RunBusy, match=f'a run is at work in {long.run}: running, pid {pid}'): launch(long.run, LONG)
    assert 'SIGTERM' in stop(long.run)
    assert long.wait(30).state == 'stopped'
    step = events(long.run.path, 'stop')[0]['step']
    assert list_checkpoints(long.run)[0].step == step == condition(long.run).step
    with pytest.raises(RuntimeError, match=f'nothing runs in {long.run}: stopped at {step}'): stop(long.run)
    with pytest.raises(RunExists, match='holds a run'): launch(long.run, LONG)


def test_the_kernel_s_variables_stay_with_the_kernel(text, tmp_path, monkeypatch):
    for name in ('MPLBACKEND', 'JPY_PARENT_PID'): monkeypatch.setenv(name, 'module://nowhere')
    run = launch(tmp_path/'clean', LONG, data=str(text))
    names = until(psutil.Process(condition(run.run).pid).environ)
    assert not [n for n in names if n.startswith(('MPLBACKEND', 'JPY_'))] and 'LMNB_CACHE' in names
    stop(run.run, kill=True)
    until(lambda: condition(run.run).state == 'unstarted')


def test_found_after_the_starter_is_gone(text, tmp_path):
    code = f'from lmnb import launch\nlaunch({str(tmp_path/"kept")!r}, "small", data={str(text)!r}, **{parse_settings([*TINY, *EVERY])!r}, max_steps=100000)'
    subprocess.run([sys.executable, '-c', code], check=True)
    [run] = find_runs(tmp_path)
    kept = attach(run)
    at_work(kept)
    done = train('--stop', run, cwd=tmp_path, program='lmnb-runs')
    assert done.code == 0 and f'SIGTERM sent to pid {condition(run).pid}' in done.out
    assert kept.wait(30).state == 'stopped'
    again = train('--stop', run, cwd=tmp_path, program='lmnb-runs')
    assert again.code == 2 and again.err.startswith('lmnb-runs: nothing runs in kept: stopped at')


def test_a_terminal_s_run_is_seen_and_stopped(text, tmp_path):
    p = subprocess.Popen([*command('lmnb-train'), '--checkpoint-dir', 'own', '--data', text, '--set', *TINY, *EVERY, 'max_steps=100000'],
                         cwd=tmp_path, stdout=subprocess.DEVNULL)
    run = Background(RunDir(tmp_path/'own'))
    at_work(run)
    assert attach(tmp_path/'own').stop() and p.wait(30) == 143
    assert condition(run.run).state == 'stopped'


def test_it_says_that_it_stops(long):
    at_work(long)
    stop(long.run)
    assert until(lambda: condition(long.run).state in ('stopping', 'stopped'), 10)


def test_killed_it_has_died_and_goes_on(long):
    at_work(long)
    until(long.run.living)
    assert 'was killed' in stop(long.run, kill=True)
    assert until(lambda: condition(long.run).state == 'died', 5)
    saved = long.run.latest().step
    more = launch(long.run, resume='latest')
    until(lambda: condition(long.run).state == 'running')
    assert events(long.run.path, 'resume')[-1]['step'] == saved
    assert more.stop() and more.wait(30).state == 'stopped'


def test_two_processes_are_a_run_like_any_other(text, tmp_path):
    many = launch(tmp_path/'many', 'small', processes=2, parallel='fsdp', data=str(text), max_steps=100_000, **parse_settings([*TINY, *EVERY]))
    until(lambda: many.update() or many.now.state == 'running' and many.step > 5)
    assert '2 processes (fsdp)' in runs_table(tmp_path) and '2 processes (fsdp)' in pace(many)
    many.stop()
    assert many.wait(60).state == 'stopped' and 'SIGTERM' in many.log()
    assert list_checkpoints(many.run)[0].software['processes'] == '2 (fsdp)'
    for n, parallel in ((0, None), (1, 'fsdp')):
        with pytest.raises(ValueError, match=f'processes={n} must be at least'): launch(tmp_path/'none', processes=n, parallel=parallel)
    assert not (tmp_path/'none').exists()


def test_what_is_refused_by_the_child_is_in_the_log(copy):
    launch(copy, resume='latest', extend_steps=10).wait(60)
    assert condition(copy).state == 'unstarted'
    assert "extend_steps=10 must be above the checkpoint's step 300" in attach(copy).log(3)
    run = launch(copy, resume='latest', extend_steps=310)
    assert run.wait(60).state == 'finished' and condition(copy).step == 310


def test_a_new_run_takes_the_old_log_aside(copy, text):
    (copy/'train.log').write_text('old words\n')
    run = launch(copy, LONG, new_run=True, data=str(text), max_steps=20)
    assert run.wait(60).state == 'finished'
    assert 'old words' in (copy/'superseded'/'1'/'train.log').read_text()
    until(lambda: 'Finished at step 20' in run.log(50))  # said after run.json has it
    assert 'old words' not in run.log(50)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'shut').mkdir(mode=0o555)
    code = f'from lmnb import launch; launch({str(tmp_path/"shut")!r}, "small")'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, preexec_fn=powerless)
    assert "PermissionError: [Errno 13] Permission denied" in done.stderr and 'train.log' in done.stderr
    assert not list((tmp_path/'shut').iterdir())


@pytest.mark.parametrize('words', [b'', b'{', b'[]', b'{"state": "running"}', b'{"state": "running", "step": 1e999, "max_steps": 3}',
                                   b'{"state": ["x"], "step": 1, "max_steps": 3}'])
def test_a_half_written_run_json(copy, words):
    (copy/'run.json').write_bytes(words)
    assert (condition(copy).state, condition(copy).step) == ('finished', 300)


def test_time_left_counts_this_session_only(tmp_path):
    lineage = [dict(id='a', from_step=0), dict(id='b', from_step=1000)]
    def event(kind, segment, **kw): return to_line(dict(kind=kind, segment=segment, **kw))
    fast = [event('train', 'a', step=k, loss=2., time=k/100) for k in range(1, 1001)]
    slow = [event('train', 'b', step=1000+k, loss=2., time=5000+2.*k) for k in range(1, 11)]
    begin = event('resume', 'b', step=1000, max_steps=2000, lineage=lineage, time=5000)
    run = RunDir(tmp_path)
    run.write_status(state='running', step=1010, max_steps=2000, pid=os.getpid(), pid_start=started_at(os.getpid()),
                     host=os.uname().nodename, heartbeat=time.time())
    (tmp_path/'metrics.jsonl').write_bytes(b''.join([*fast, begin]))
    seen = Background(run)
    seen.update()
    assert seen.step_s is None and seen.step == 1010  # unknown before the first step
    with open(tmp_path/'metrics.jsonl', 'ab') as f: f.write(b''.join(slow))
    seen.update()
    assert seen.step_s == pytest.approx(2)


def test_another_file_at_the_same_path_begins_anew(tmp_path):
    run = RunDir(tmp_path)
    line = dict(kind='train', segment='a', step=1, loss=2., time=0.)
    (tmp_path/'metrics.jsonl').write_bytes(to_line(line)*3)
    seen = Background(run)
    seen.update()
    (tmp_path/'metrics.jsonl').rename(tmp_path/'old')
    (tmp_path/'metrics.jsonl').write_bytes(to_line(line | dict(step=9))+b'{"kind":"train","segm')
    seen.update()
    assert [e['step'] for e in seen.tail.events] == [9]


def test_a_second_fit_does_not_count_the_pause(tmp_path):
    lineage = [dict(id='a', from_step=0)]
    def event(kind, **kw): return to_line(dict(kind=kind, segment='a', lr=.1, **kw))
    told = [event('start', step=0, max_steps=1000, lineage=lineage, time=0), *[event('train', step=k, loss=2., time=k) for k in range(1, 101)],
            event('resume', step=100, max_steps=1000, lineage=lineage, time=9000),
            *[event('train', step=100+k, loss=2., time=9000+k) for k in range(1, 20)]]
    (tmp_path/'metrics.jsonl').write_bytes(b''.join(told))
    seen = Background(RunDir(tmp_path))
    seen.update()
    assert seen.step_s == pytest.approx(1)


@pytest.mark.parametrize('words, step, to, said', [
    (['schedule=cosine', 'max_steps=200'], 200, 400, 'up from'), (['max_steps=300'], 240, 600, 'LR 0.003, down from 480'),
    (['max_steps=300'], 300, 600, 'up from 4.9e-5 to 0.003 by 310, down from 480'), (['max_steps=300'], 240, 250, 'down from 0.003 at once')])
def test_the_preview_is_the_plan(tmp_path, words, step, to, said):
    from types import SimpleNamespace

    from lmnb.background import Ahead, rate
    from lmnb.schedule import Plan
    c = preset(**parse_settings([*TINY, *EVERY, *words]))
    ckpt = SimpleNamespace(step=step, config=vars(c), plan=Plan.straight(c).state_dict(), size=1)
    a = Ahead(SimpleNamespace(step_s=None, run=tmp_path, find=lambda _: None), ckpt, str(to))
    assert said in a.rates()
    top = max(a.plan.lr(k) for k in range(step, to+1))
    assert rate(top) in a.rates() or 'at once' in a.rates()
