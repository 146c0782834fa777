"SIGKILL at any moment of a run's life, above all in the middle of a save."
import io
import os
import random
import signal
import stat
import threading
import time
from collections import Counter
from contextlib import contextmanager

import exact
import lmnb.checkpoint
import lmnb.engine
import pytest
from exact import ended, fork
from faults.lives import done, halves, names, numbers, straight, tiny, whole
from lmnb import Trainer
from lmnb.engine import Engine
from lmnb.history import Events
from lmnb.rundir import WORDS, RunDir

# each `write` of the file object, then the system's calls; an outer kind covers what is done within
KINDS = ('write', 'fsync', 'rename', 'link', 'unlink', 'folder sync', 'prune', 'run.json', 'snapshot', 'event line', 'step', 'evaluation', 'start')
MORE = ('write', 'write', 'write', 'fsync', 'rename', 'snapshot')  # these more often
OUTER = ('prune', 'run.json', 'start')
STEP, OP, SAVED = 0, 1, 63  # in the numbers that a child tells; from 2 on how often it did each kind


class Watch:
    "Tells the parent what this process is at, and kills it in the nth operation of a kind."
    def __init__(self, told, kind=None, nth=0, moment='before'): self.told, self.kind, self.nth, self.moment = told, kind, nth, moment; self.local = threading.local()

    @contextmanager
    def op(self, kind):
        before = getattr(self.local, 'kind', None)
        self.local.kind = kind = before if before in OUTER else kind
        i = KINDS.index(kind)
        self.told[OP] = 1+i
        self.told[2+i] += 1
        due = kind == self.kind and self.told[2+i] == self.nth
        if due and self.moment == 'before': self.kill()
        yield due
        if due: self.kill()
        self.local.kind, self.told[OP] = before, 0 if before is None else 1+KINDS.index(before)

    def kill(self): os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)

    def wrap(self, owner, name, kind):
        f = getattr(owner, name)
        def wrapped(*a, **k):
            with self.op(kind if isinstance(kind, str) else kind(*a)): return f(*a, **k)
        setattr(owner, name, wrapped)

    def all(self):
        watch = self
        class File(io.BufferedRandom):
            def write(self, data):
                with watch.op('write') as due:
                    if due: data = data[:len(data)//2]
                    n = super().write(data)
                    if due: self.flush()
                    return n
        lmnb.checkpoint.open = lambda path, mode='r', **k: File(io.FileIO(path, mode)) if mode.startswith('w+') else open(path, mode, **k)
        for name, kind in (('replace', 'rename'), ('link', 'link'), ('unlink', 'unlink')): self.wrap(os, name, kind)
        self.wrap(os, 'fsync', lambda fd: 'folder sync' if stat.S_ISDIR(os.fstat(fd).st_mode) else 'fsync')
        for name in ('sweep', 'heal', 'go_back'): self.wrap(RunDir, name, 'start')
        self.wrap(RunDir, 'prune', 'prune')
        self.wrap(RunDir, 'write_status', 'run.json')
        self.wrap(lmnb.checkpoint, 'snapshot', 'snapshot')
        self.wrap(Events, 'flush', 'event line')
        self.wrap(Engine, 'evaluate', 'evaluation')
        self.wrap(Engine, 'train_step', 'step')


def live(run, config, watch, bell=None):
    "A life, to its end or its kill; `bell` rings as each save begins."
    watch.all()
    def first(tokens, k, *rest):
        if not watch.told[STEP]: assert halves(run, os.getpid()) == [], 'left from a life before'
        watch.told[STEP] = k
    exact.wrap(lmnb.engine, 'get_batch', first)
    write = lmnb.checkpoint.write_checkpoint
    def saved(state, *a):
        size = write(state, *a)
        watch.told[SAVED] = state['global_step']
        return size
    lmnb.checkpoint.write_checkpoint = saved
    if bell: exact.wrap(lmnb.checkpoint, 'write_checkpoint', lambda *_, **k: os.write(bell, b'.'))
    Trainer.resume('latest-or-new', run, config=config, quiet=True).fit()
    return 0


def by_the_clock(run, config, told, log, r):
    "A life that its parent ends, a moment after a save began."
    ear, bell = os.pipe()
    pid = fork(lambda: live(run, config, Watch(told), bell), log)
    os.close(bell)
    for _ in range(r.randint(1, 6)): os.read(ear, 1)  # empty if it has ended
    time.sleep(r.random()*.012)
    os.kill(pid, signal.SIGKILL)
    os.close(ear)
    return ended(pid)


@pytest.fixture(scope='module')
def base(text, tmp_path_factory):
    "The undisturbed runs, and how often one does what."
    root = tmp_path_factory.mktemp('kills')
    told = numbers()
    assert exact.forked(lambda: live(root/'counted', tiny(text, keep_last=2, save_interval=3), Watch(told), None), root/'log') == 0
    others = {n: straight(tiny(text, eval_interval=n), root/f'straight{n}') for n in (2, 7)}
    return root, others, {k: told[2+i] for i, k in enumerate(KINDS)}


def test_a_kill_at_any_moment(text, base, row, times):
    row('SIGKILL in a save, a step, a start', 'every file verifies; at most one interval besides the save under way is lost; the end is the straight run\'s bits')
    (root, others, often), r, hit, kills, chain = base, random.Random(0), Counter(), 0, 0
    while kills < times(24, 300):
        chain += 1
        config = tiny(text, eval_interval=r.choice((2, 7, 7)), save_interval=r.choice((2, 3)), keep_last=r.choice((0, 2, 2)), save_minutes=r.choice((0, 0, 1e-9)))
        run, step, had, code = root/f'run{chain}', 0, {}, -9
        for life in range(12):
            told, kind = numbers(), r.choice(KINDS+MORE)
            if life == 11: watch = Watch(told)
            else: watch = Watch(told, kind, r.randint(1, max(1, often[kind]//3)), r.choice(('before', 'after')))
            log = root/f'log{chain}'
            code = by_the_clock(run, config, told, log, r) if life < 11 and r.random() < 1/3 else exact.forked(lambda: live(run, config, watch), log)
            assert code in (0, -9), log.read_text()
            if run.is_dir():
                reached, before = max(told[STEP]-1, 0)//config.save_interval*config.save_interval, step
                step = whole(run)
                assert step >= max(before, told[SAVED], reached-config.save_interval), (kind, log.read_text())
                assert had.keys() & set(WORDS.values()) <= names(run).keys()
                had = names(run)
            if code == 0: break
            kills += 1
            row.tried()
            hit[KINDS[told[OP]-1] if told[OP] else 'between'] += 1
        done(run, config, others[config.eval_interval])
    print(chain, dict(hit))
    assert times(True, set(hit) >= set(KINDS))
