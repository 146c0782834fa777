"Lives of a run, each ended from outside: what a child tells while it lives, and what must hold once it is gone."
import mmap
import os

import exact
import lmnb.checkpoint
from exact import EVALUATED, TINY, forked, vars_of
from lmnb import Trainer, load_checkpoint, preset
from lmnb.check import differences
from lmnb.config import override
from lmnb.rundir import WORDS, RunDir, is_ours, step_name

LEFT_OUT = {'software', 'lineage', 'save_interval', 'keep_last', 'save_minutes'}


def numbers(n=64):
    "Whole numbers that a child writes and its parent reads, also after a kill."
    return memoryview(mmap.mmap(-1, 8*n)).cast('q')


def tiny(text, **sets): return preset('small', **TINY | dict(data=str(text), dropout=.1, max_steps=20, eval_interval=2) | sets)


def straight(config, folder):
    "The undisturbed run, every step of it saved."
    def act(): Trainer(override(config, save_interval=1, keep_last=0, save_minutes=0), folder, quiet=True).fit(); return 0
    assert forked(act, f'{folder}.log') == 0
    return folder


def whole(run):
    "Assert that every file under one of our names verifies and that `latest` is the highest; its step, 0 if there is none."
    lmnb.checkpoint._seen.clear()
    living = RunDir(run).living(check=True)
    assert [c.error for c in living if c.error] == []
    latest = RunDir(run).latest(note=print)
    assert (latest and latest.step) == max((c.step for c in living), default=None)
    return latest.step if latest else 0


def names(run): return {p.name: p.stat().st_ino for p in run.glob('*') if is_ours(p.name)}
def halves(run, pid=None): return [p.name for p in run.glob('.tmp-*') if f'-{pid}-' not in p.name]


def same_bits(run, other):
    "Assert that what is here is what the undisturbed run has."
    for c in RunDir(run).living():
        a, b = (load_checkpoint(p, note=lambda _: None) for p in (c.path, other/step_name(c.step)))
        cut = a['val_loss'] is None and c.path.name != WORDS['final']  # saved in the middle of its evaluation
        assert differences(vars_of(a), vars_of(b), LEFT_OUT | (EVALUATED if cut else set())) == [], c.path


def done(run, config, other):
    "Assert that a run has come to its end, as if nothing had happened on the way."
    assert whole(run) == config.max_steps and halves(run) == [] and set(WORDS.values()) <= set(names(run))
    same_bits(run, other)
