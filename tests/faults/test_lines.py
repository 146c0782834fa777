"Event lines that are torn, foreign or junk, and a clock that is set back: nothing before or after is lost, and all goes on."
import json
import os
import random
import shutil
import threading
import time

import exact
import lmnb.engine
import numpy as np
import pytest
from exact import forked
from faults.lives import done, straight, tiny

from lmnb import Trainer, load_history
from lmnb.background import Background, condition
from lmnb.history import Events, Tail, backfill, duration, read_events, to_line
from lmnb.panel import below, headline, pace
from lmnb.rundir import AUTO, BEGAN, Heartbeat, RunDir
from lmnb.runs import runs_table, runs_tree

LINEAGE = [dict(id='a', parent=None, from_step=0, run_id='r')]
JUNK = dict(
    nul=b'\0'*4096, nul_and_bytes=b'\0'*100_000+bytes(range(11, 256)), half_utf8='{"kind":"warn","text":"ü'.encode()[:-1],
    utf16='{"kind":"train"}'.encode('utf-16'), surrogate=b'{"kind":"warn","text":"\\ud800', huge=b'x'*3_000_000, nested=b'['*100_000,
    digits=b'{"kind":"train","segment":"a","step":'+b'9'*5000+b'}', null=b'null', text=b'"x"', number=b'1e999', empty=b'{}', array=b'[[]]',
    no_segment=b'{"kind":"train","step":3,"loss":1,"time":1}', odd_segment=b'{"kind":"train","segment":[],"step":3,"loss":1,"time":1}',
    odd_kind=b'{"kind":["train"],"segment":"a","step":3,"loss":1,"time":1}', far=b'{"kind":"train","segment":"a","step":1e999,"loss":1,"time":1}',
    farther=b'{"kind":"train","segment":"a","step":1e30,"loss":1,"time":1}', when=b'{"kind":"warn","segment":"a","step":1,"time":"x"}',
    never=b'{"kind":"warn","segment":"a","step":1,"time":1e999}', torn=b'{"kind":"train","segment":"a","step":3,"lo')


def line(kind, **kw): return to_line(dict(schema=1, kind=kind, run_id='r', segment='a') | kw)
def train_line(k): return line('train', time=1000.+k, step=k, loss=2+1/k, lr=.001, grad_norm=1., tokens=128*k, tok_per_s=1e4, dt_ms=12.5)


def story(n):
    "A session's lines: a start, n steps, an evaluation and a save at each tenth."
    out = [line('start', time=1000., step=0, max_steps=n, lineage=LINEAGE, command=['x'])]
    for k in range(1, n+1):
        out.append(train_line(k))
        if k % 10 == 0: out += [line('val', time=1000.5+k, step=k, loss=3.), line('save', time=1000.6+k, step=k, names=[], bytes=1, stall_ms=1.)]
    return out


def all_readers(run, n):
    "Every reader of a run's events; none may raise."
    h = load_history(run)
    seen = Background(RunDir(run))
    seen.update()
    repr((seen.step, seen.step_s, seen.heard, seen.history, seen.plan(), runs_table(run), runs_tree(run)))
    repr([f(seen, s) for f in (headline, below) for s in ('running', 'silent', 'finished', 'died')])
    assert seen.step == n
    return h, seen


def same_curves(h, n, skipped=None):
    assert h.train['step'].tolist() == list(range(1, n+1)) and h.val['step'].tolist() == list(range(10, n+1, 10))
    assert np.array_equal(h.train['loss'], [2+1/k for k in range(1, n+1)]) and skipped in (None, h.skipped)


def test_each_prefix_of_the_last_line(row, times, tmp_path):
    row('the last event line cut off at each byte, then written on', 'one line is skipped and counted; none before or after it is lost')
    whole_story, path = story(30), tmp_path/'metrics.jsonl'
    RunDir(tmp_path).write_status(state='stopped', step=30, max_steps=30)
    for back in range(1, times(3, 37)+1):
        head, last = b''.join(whole_story[:-back]), whole_story[-back]
        for n in range(len(last)):
            path.write_bytes(head+last[:n])
            tail, events = Tail(path), Events(tmp_path, 'r', 'a')
            tail.update()
            assert read_events(path)[2] == 0  # what has no end yet may still get one
            for l in whole_story[-back:]:
                e = json.loads(l)
                events.emit(**{k: v for k, v in e.items() if k not in ('schema', 'run_id', 'segment')})
            assert events.close()
            tail.update()
            assert tail.events == read_events(path)[0]
            same_curves(load_history(tmp_path), 30, int(0 < n < len(last)-1))
            row.tried()
    all_readers(tmp_path, 30)


@pytest.mark.parametrize('place', ['beginning', 'middle', 'end', 'everywhere'])
def test_junk_among_the_lines(row, tmp_path, place):
    row('junk among the event lines: NUL blocks, binary, half UTF-8, huge, foreign', 'skipped and counted; no line before or after is lost; all readers go on')
    RunDir(tmp_path).write_status(state='stopped', step=30, max_steps=30)
    for junk in (*([b] for b in JUNK.values()), list(JUNK.values())):
        lines, block = story(30), b'\n'.join(junk)+b'\n'
        ats = dict(beginning=[0], middle=[15], end=[len(lines)], everywhere=range(len(lines), -1, -7))[place]
        for at in ats: lines.insert(at, block)
        data = b''.join(lines)
        if place == 'end': data = data[:-1]  # the junk is not ended; the next session ends it
        (tmp_path/'metrics.jsonl').write_bytes(data)
        if place == 'end':
            assert load_history(tmp_path).skipped == len(junk)-1
            events = Events(tmp_path, 'r', 'a')
            events.emit('warn', step=30, code='x', text='y')
            assert events.close()
        h, _ = all_readers(tmp_path, 30)
        same_curves(h, 30, len(junk)*len(ats))
        backfill(tmp_path, LINEAGE, dict(train=[dict(step=k, loss=2+1/k) for k in range(1, 31)], val=[]), 128)
        same_curves(load_history(tmp_path), 30)  # there was nothing to fill
        row.tried()


def test_junk_in_a_large_file(row, times, tmp_path):
    row('junk in an event file too large to read whole', 'rare events and the newest steps are all seen; all readers go on')
    n, r = 30_000, random.Random(0)
    lines = story(n)
    RunDir(tmp_path).write_status(state='stopped', step=n, max_steps=n)
    def rare(events): return [(e['kind'], e['step']) for e in events if e['kind'] not in ('train', 'val')]
    for _ in range(times(2, 40)):
        more = lines.copy()
        for junk in r.sample(list(JUNK.values()), 8): more.insert(r.choice((0, len(lines), r.randrange(len(lines)))), junk+b'\n')
        torn = r.choice((b'', b'{"kind":"tra', b'\0'*5000))
        (tmp_path/'metrics.jsonl').write_bytes(b''.join(more)+torn)
        tail = Tail(tmp_path/'metrics.jsonl')
        tail.update()
        assert rare(tail.events) == rare(json.loads(l) for l in lines)
        steps = {e['step'] for e in tail.events if e['kind'] == 'train'}
        assert len(steps) > 1000 and max(steps) == n
        all_readers(tmp_path, n)
        row.tried()


def test_a_resume_among_junk(text, row, times, tmp_path):
    row('a resume in a folder whose event file is torn and full of junk', 'every step is in the curves; the end is the straight run\'s bits')
    config, r = tiny(text, save_interval=5), random.Random(0)
    other = straight(config, tmp_path/'straight')
    def part(run, at):
        def act():
            exact.wrap(lmnb.engine, 'get_batch', lambda tokens, k, *_: os.kill(os.getpid(), 9) if k == at else None)
            Trainer.resume('latest-or-new', run, config=config, quiet=True).fit()
            return 0
        return forked(act, tmp_path/'log.txt')
    assert part(tmp_path/'half', 13) == -9
    for i in range(times(4, 40)):
        run = shutil.copytree(tmp_path/'half', tmp_path/f'run{i}')
        lines = (run/'metrics.jsonl').read_bytes().splitlines(keepends=True)
        for junk in r.sample(list(JUNK.values()), 5): lines.insert(r.choice((0, len(lines), r.randrange(len(lines)))), junk+b'\n')
        lost = b''.join(lines)
        if i % 2: lost = lost[:r.randrange(len(lost))]+r.choice((b'', b'\0'*4096))  # a power cut
        (run/'metrics.jsonl').write_bytes(lost)
        assert part(run, None) == 0, (tmp_path/'log.txt').read_text()
        h, _ = all_readers(run, 20)
        assert h.train['step'].tolist() == list(range(1, 21)) and h.val['step'].tolist() == list(range(2, 21, 2))
        done(run, config, other)
        row.tried()


# A clock that is set back ---------------------------------------------------------------------------------------------

REAL, BACK = time.time, [0.]


@pytest.fixture
def clock(monkeypatch):
    "Sets the clock back, for those who ask it."
    monkeypatch.setattr(time, 'time', lambda: REAL()-BACK[0])
    yield lambda s: BACK.__setitem__(0, s)
    BACK[0] = 0.


def no_minus(run):
    "No time that is shown is negative."
    seen = Background(RunDir(run))
    seen.update()
    shown = [seen.step_s or 0, *(duration(time.time()-t) for t in (seen.heard, seen.now.heard))]
    shown += [below(seen, s) for s in ('running', 'silent', 'finished', 'died')]+[runs_table(run)]
    assert seen.step_s is None or seen.step_s > 0
    assert not [s for s in map(str, shown) if ' -' in f' {s}'.replace('val      -', '').replace('--', '')], shown
    return seen


@pytest.mark.parametrize('when', ['in a session', 'between sessions', 'in each'])
def test_the_clock_is_set_back_an_hour(text, row, tmp_path, clock, when):
    row('the clock set back an hour', 'curves whole, the run seen alive, saved by its clock, stopped when asked; no time shown is negative')
    config, run, hour = tiny(text, save_interval=5, save_minutes=1e-9), tmp_path/'run', 3600
    other = straight(config, tmp_path/'straight')
    def act(first, jump_at, stop_at):
        def at(tokens, k, *_):
            if k == jump_at: BACK[0] += hour
            if k == stop_at:
                seen = no_minus(run)
                assert seen.now.state == 'running' and seen.step == k-1
                assert condition(run).state == 'running'
                (run/'stop').touch()
        saves = []
        exact.wrap(lmnb.engine, 'get_batch', at)
        exact.wrap(Trainer, '_after_step', lambda t, _: t.writer.wait())  # a save by the clock is left out while one is under way
        t = Trainer.resume('latest-or-new', run, config=config, quiet=True, listeners=[lambda e: saves.append(e) if e['kind'] == 'save' else None]).fit()
        if stop_at: assert t.interrupted == 'stop file' and t.step == stop_at and not (run/'stop').exists()
        if stop_at and jump_at: assert jump_at in [e['step'] for e in saves if e['names'] == [AUTO]]
        return 0
    for session, stop_at in enumerate((9, 14, None)):
        if when != 'in a session' and session: clock(hour*session)
        jump_at = None if when == 'between sessions' else (7, 11, 17)[session]
        assert forked(lambda: act(session == 0, jump_at, stop_at), tmp_path/'log.txt') == 0, (tmp_path/'log.txt').read_text()
        no_minus(run)
        h = load_history(run)
        assert h.train['step'].tolist() == list(range(1, (stop_at or 20)+1))
        row.tried()
    assert condition(run).state == 'finished'
    done(run, config, other)


def test_a_stop_file_and_the_clock(text, row, tmp_path, clock):
    row('a stop file older or newer than the process, by a clock that is wrong', 'deleted or obeyed once, the next start goes on')
    config, run = tiny(text), tmp_path/'run'
    other = straight(config, tmp_path/'straight')
    for written, ends in ((-3600, None), (3600, 'stop file')):  # as it was left in an earlier session; before the clock was set back
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        (run/'stop').touch()
        os.utime(run/'stop', (BEGAN+written,)*2)
        def act():
            t = Trainer(config, run, quiet=True).fit()
            assert t.interrupted == ends and not (run/'stop').exists()
            if ends: assert Trainer.resume('latest-or-new', run, config=config, quiet=True).fit().step == 20
            return 0
        assert forked(act, tmp_path/'log.txt') == 0, (tmp_path/'log.txt').read_text()
        done(run, config, other)
        row.tried()


def test_the_heart_beats_by_no_clock(row, tmp_path, clock, monkeypatch):
    row('the clock set back an hour', 'curves whole, the run seen alive, saved by its clock, stopped when asked; no time shown is negative')
    beat, write = threading.Event(), RunDir.write_status
    monkeypatch.setattr(RunDir, 'write_status', lambda *a, **k: (write(*a, **k), beat.set()))
    heart = Heartbeat(RunDir(tmp_path), every_s=.1, state='running', step=1, max_steps=2)
    try:
        clock(3600)
        beat.clear()
        assert beat.wait(5), 'another host would take the run for dead'
        assert condition(tmp_path).state == 'running'
    finally: heart.stop()
    row.tried()
