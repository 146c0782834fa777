"""Straight against stopped and resumed: chains of sessions, each ended in its own way, must end in the straight run's bits.

    python tests/exact.py [CHAINS [SEED]]   all of it: fixed cases, random chains (200; thousands for a night), lmnb-verify

A chain plays a `Case` in a folder, a process a session, and is compared with the same training undisturbed: every
tensor and number of every checkpoint that both have, and the batch of every step.
"""
import hashlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

os.environ.update(OMP_WAIT_POLICY='PASSIVE', OMP_NUM_THREADS='1', TORCH_CPP_LOG_LEVEL='ERROR')

import torch
from conftest import write_text
from hypothesis import strategies as st

import lmnb.checkpoint
import lmnb.engine
import lmnb.parallel
from lmnb import Trainer, load_checkpoint, preset
from lmnb.check import differences
from lmnb.checkpoint import describe
from lmnb.history import read_events
from lmnb.rundir import AUTO, WORDS, NotFound, RunDir, step_name
from lmnb.schedule import Plan, plan_from
from lmnb.trainer import TrainingFailed

TINY = dict(vocab_size=300, block_size=32, n_layer=1, n_head=2, n_embd=16, n_kv_head=1, batch_size=4, warmup_steps=5, cooldown_frac=.25,
            save_interval=8, eval_interval=4, eval_batches=2, log_interval=1)
EVALUATED = {'val_history', 'best_val_loss', 'val_loss'}
LEFT_OUT = dict(eval_interval=EVALUATED, log_interval={'train_history'})  # by what was changed


@dataclass(frozen=True)
class Leg:
    "A part of a run's life: to a total number of steps, with sessions that end early on the way."
    total: int
    source: str = None   # trunk, best, final, or a step; None: the run's beginning
    stops: tuple = ()    # of (how, after how many steps, the file to go on from)


@dataclass(frozen=True)
class Case:
    legs: tuple
    training: dict = field(default_factory=dict)  # settings beside `TINY`
    changes: dict = field(default_factory=dict)   # run-time settings that each resume changes
    listeners: int = 0                            # of which the first one raises
    processes: int = 1                            # that train together
    parallel: str = None                          # how: ddp or fsdp


# How a session ends ---------------------------------------------------------------------------------------------------

def wrap(owner, name, before):
    "Call `before` with the arguments of each call of a function."
    f = getattr(owner, name)
    def wrapped(*a, **k):
        before(*a, **k)
        return f(*a, **k)
    setattr(owner, name, wrapped)


class Fate:
    "What is to happen to this process in or after step `at`."
    def __init__(self, how, at, run): self.at, self.run, self.step, self.due = at, run, 0, True; ENDS[how](self)

    def once(self, act, *a):
        if self.due and self.step >= self.at: self.due = False; act(*a)

    def in_step(self, act, *a): wrap(lmnb.engine, 'get_batch', lambda *_, **k: self.once(act, *a))
    def in_evaluation(self, act, *a): wrap(lmnb.engine, 'val_batches', lambda *_, **k: self.once(act, *a))
    def in_save(self, name, act, *a): wrap(lmnb.checkpoint, name, lambda *_, **k: self.once(act, *a))

    def kill(self, number=signal.SIGKILL): os.kill(os.getpid(), number)
    def touch(self): (self.run/'stop').touch()
    def fail(self): raise RuntimeError('a fault put in on purpose')

    def fill_the_disk(self):
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    def half_a_file(self):
        def torn(state, f): f.write(b'PK'*5000); f.flush(); self.kill()
        torch.save = torn

    def after_a_skip(self):
        def hear(event): self.once(self.kill, signal.SIGTERM) if event.get('code') == 'skip' else None
        Trainer._display = lambda trainer: hear

    def by_the_clock(self):
        threading.Thread(target=lambda: (time.sleep(.012*self.at), self.kill()), daemon=True).start()


ENDS = {
    'SIGTERM': lambda f: f.in_step(f.kill, signal.SIGTERM),
    'SIGINT': lambda f: f.in_step(f.kill, signal.SIGINT),
    'SIGHUP': lambda f: f.in_step(f.kill, signal.SIGHUP),
    'stop file': lambda f: f.in_step(f.touch),
    'max-minutes': lambda f: None,  # an argument of `fit`: one step a session
    'in an evaluation': lambda f: f.in_evaluation(f.kill, signal.SIGTERM),
    'in a save': lambda f: f.in_save('write_checkpoint', f.kill, signal.SIGTERM),
    'after a skip': lambda f: f.after_a_skip(),
    'an error': lambda f: f.in_step(f.fail),
    'disk full': lambda f: f.in_step(f.fill_the_disk),
    'kill -9 in a step': lambda f: f.in_step(f.kill),
    'kill -9 in an evaluation': lambda f: f.in_evaluation(f.kill),
    'kill -9 in half a file': lambda f: f.in_step(f.half_a_file),
    'kill -9 before a rename': lambda f: f.in_save('replace', f.kill),
    'kill -9 between two names': lambda f: f.in_save('link', f.kill),
    'kill -9 by the clock': lambda f: f.by_the_clock(),
}
OF_THE_FIRST = 'in a save', 'after a skip', 'disk full', 'kill -9 in half a file', 'kill -9 before a rename', 'kill -9 between two names'
FILES = ('latest', 'step', 'auto', 'best', 'trunk', 'final', 'folder', 'lone file', 'moved folder', '_orig_mod.', 'module.')


# A session, in a process of its own -----------------------------------------------------------------------------------

def fork(act, log):
    "Run `act` in a child; its pid."
    if pid := os.fork(): return pid
    for s in (signal.SIGINT, signal.SIGHUP): signal.signal(s, signal.SIG_DFL)  # nohup and a shell's & would have them ignored
    code = 99
    try:
        with open(log, 'a') as sys.stdout: code = act()
    except BaseException:
        with open(log, 'a') as f: traceback.print_exc(file=f)
    finally: os._exit(code)  # whatever is refused to it: a child never goes on as its parent


def ended(pid):
    "The number that a child's `act` returned, or that of the signal that killed it, negative."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def forked(act, log): return ended(fork(act, log))


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def forked_together(n, act, log):
    "Run `act(rank)` in `n` children that find each other; their numbers."
    port = free_port()
    def one(rank):
        lmnb.parallel.TIMEOUT_S = 30
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        return act(rank)
    return [ended(pid) for pid in [fork(partial(one, rank), log) for rank in range(n)]]


def train(prepare, batches, how=None, at=0, listeners=0, doomed=0, rank=0):
    "Fit what `prepare` makes and end as `how` says, if this is the `doomed` process; 0: finished, 3: stopped, 1: failed."
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.**20, growth_interval=5)  # updates are skipped all along
    def note(tokens, k, *rest):
        x, y = fetch(tokens, k, *rest)
        with open(batches, 'a') as f: f.write(f'{k} {hashlib.sha1(x.numpy().tobytes()+y.numpy().tobytes()).hexdigest()}\n')
        return x, y
    fetch, lmnb.engine.get_batch = lmnb.engine.get_batch, note
    heard = [lambda e: 1/0, *[lambda e: None]*(listeners-1)][:listeners]
    t = prepare(listeners=heard, quiet=True)
    if how and rank == doomed:
        fate = Fate(how, t.step+at, t.run.path)
        wrap(lmnb.engine, 'get_batch', lambda tokens, k, *rest: setattr(fate, 'step', k))
    try: t.fit(max_minutes=1e-9 if how == 'max-minutes' else None)
    except TrainingFailed as e: print(e); return 1
    lmnb.parallel.disband()
    return 3 if t.interrupted else 0


# A chain of sessions --------------------------------------------------------------------------------------------------

class Chain:
    "Plays a case in `root`; `run` is the folder where it stands, `used` counts what was really tried."
    def __init__(self, case, root, text, **sets):
        self.case, self.root, self.run, self.used = case, root, root/'run', Counter()
        self.config = preset('small', **TINY | case.training | dict(data=str(text), max_steps=case.legs[0].total) | sets)
        self.plan = Plan.straight(self.config)
        root.mkdir()

    def play(self):
        for leg in self.case.legs:
            source = leg.source and self.find(leg.source)
            if source: self.plan = self.plan.extended(step_of(source), leg.total)
            self.source = source
            for stop in (*leg.stops, None):
                if self.session(source, leg.total, *stop[:2] if stop else (None, 0)) == 0: break
                source = self.pick(stop[2])
        return self

    def find(self, source):
        "A file to extend from; the latest where there is none of that name, as in a branch that began in its cooldown."
        try: path = RunDir(self.run).find(source)
        except NotFound: path, source = RunDir(self.run).find('latest'), 'latest'
        self.used['extended from', source] += 1
        return path

    def session(self, source, total, how, after):
        "One process, from the file `source` or the beginning; its code."
        many, n = dict(parallel=self.case.parallel), self.case.processes
        def prepare(**kw):
            if source is None: return Trainer(self.config, self.run, **many, **kw)
            return Trainer.resume(source, self.run, extend_steps=total, **self.case.changes, **many, **kw)
        self.used['in all', 'sessions'] += 1
        batches = self.root/f'batches{self.used["in all", "sessions"]}.txt'
        doomed = 0 if how in OF_THE_FIRST else after % n
        act = partial(train, prepare, batches, how, after, self.case.listeners, doomed)
        codes = [forked(act, self.root/'said.txt')] if n == 1 else forked_together(n, lambda r: act(rank=r), self.root/'said.txt')
        code = codes[doomed] or max(codes)
        may = {'kill': -9, 'an error': 1, 'disk full': 1}.get(how and how.split(' -9')[0], 3)
        others = {code, 1} if may in (-9, 1) else {code}  # those that lost one end with an error
        assert code in ({0, may} if how else {0}) and set(codes) <= others, f'{how}: codes {codes}\n{self.said()}'
        if code: self.used['stopped by', how] += 1
        return code

    def said(self): return (self.root/'said.txt').read_text()

    def leads(self, c):
        "Whether the run goes on from a checkpoint by the plan of this leg."
        try: return not c.error and plan_from(self.config, c.plan).extended(c.step, self.plan.max_steps) == self.plan
        except ValueError: return False

    def pick(self, name):
        "What the next session goes on from: the file called `name` if there is one, else the latest; None if there is none."
        living = [c.path for c in RunDir(self.run).living() if self.leads(c)]
        if not living: return self.source
        names = dict(step='checkpoint_step_', auto=AUTO, **WORDS)
        found = [p for p in living if name in names and p.name.startswith(names[name])]
        path = found[-1] if found else living[0]
        whole = path == RunDir(self.run).latest(note=lambda _: None).path
        if name == 'folder' and whole: path, found = self.run, True
        if name == 'moved folder': path, found = self.moved(path), True
        c = describe(path)
        complete = c.step == self.plan.max_steps and c.val_loss is not None  # nothing to do: no branch is begun
        if name in ('lone file', '_orig_mod.', 'module.') and not complete:
            path, found = self.alone(path), True
            if name.endswith('.'): with_prefix(path, name)
        self.used['resumed from', name if found or name == 'latest' else 'latest'] += 1
        return 'latest' if name == 'latest' and whole else path

    def moved(self, path):
        self.run = self.run.rename(self.root/f'moved{self.used["in all", "sessions"]}')
        return self.run/path.name

    def alone(self, path):
        "A copy in a folder of its own, carried on elsewhere: a branch."
        copy = self.root/f'alone{self.used["in all", "sessions"]}'/'mine.pt'
        copy.parent.mkdir()
        shutil.copy(path, copy)
        self.run = self.root/f'branch{self.used["in all", "sessions"]}'
        return copy

    def batches(self):
        "Step to the hashes of the batches that it was trained on, in all sessions."
        out = {}
        for line in (l for p in self.root.glob('batches*.txt') for l in p.read_text().splitlines()):
            out.setdefault(int(line.split()[0]), set()).add(line.split()[1])
        return {k: v for k, v in out.items() if k <= self.plan.max_steps}


def step_of(path): return describe(path).step


def with_prefix(path, prefix):
    "As saved by hand from a compiled or a data-parallel model."
    state = torch.load(path, weights_only=True)
    def put(d): return {prefix+k: v for k, v in d.items()}
    optim = state['optimizer_state_dict']
    groups = [g | dict(params=[prefix+n for n in g['params']]) for g in optim['param_groups']]
    torch.save(state | dict(model_state_dict=put(state['model_state_dict']),
                            optimizer_state_dict=dict(state=put(optim['state']), param_groups=groups)), path)


# The comparison -------------------------------------------------------------------------------------------------------

class Lab:
    "A text, the undisturbed trainings, and what was found so far."
    def __init__(self, root): self.root, self.known, self.text = Path(root), {}, write_text(Path(root)/'text.txt', lines=90)

    def straight(self, case, plan):
        "The training of `plan` in a session a segment, every step saved; kept, since many chains share it."
        first, *more = plan.segments
        legs = (Leg(first['max_steps']), *(Leg(s['max_steps'], str(s['from_step'])) for s in more))
        many = dict(processes=case.processes, parallel=case.parallel)
        key = repr((legs, case.training, many))
        if key not in self.known:
            chain = Chain(Case(legs, case.training, **many), self.root/f'straight{len(self.known)}', self.text, save_interval=1)
            self.known[key] = chain.play()
        return self.known[key]

    def check(self, case, root):
        "Play a case: where it differs from the undisturbed training, and the chain."
        chain = Chain(case, root, self.text).play()
        straight = self.straight(case, chain.plan)
        skip = {'software', 'lineage', 'save_interval', *case.changes}.union(*(LEFT_OUT.get(k, ()) for k in case.changes))
        claim = ': exact as far as the compiler repeats itself.' if chain.config.compile else ': exact.'
        wrong = [l for l in chain.said().splitlines() if l.startswith('Resuming') and not l.endswith(claim)]
        for c in RunDir(chain.run).living():
            a, b = (load_checkpoint(p, note=lambda _: None) for p in (c.path, straight.run/step_name(c.step)))
            last = c.path.name == 'final_model.pt'
            if a['scheduler_state_dict'] != b['scheduler_state_dict'] and not last:
                chain.used['in all', 'checkpoints of earlier legs, not compared'] += 1
                continue
            cut = a['val_loss'] is None and b['val_loss'] is not None and not last  # saved in the middle of its evaluation
            more = {leg.total for leg in case.legs[:-1]}-{r['step'] for r in b['val_history']}
            evaluated = [r for r in a['val_history'] if r['step'] not in more]  # ends of earlier legs, where no seam is left
            leave_out = skip | (EVALUATED if cut else set()) | ({'best_val_loss'} if evaluated != a['val_history'] else set())
            a['val_history'] = evaluated
            wrong += [f'{c.path.name}{d}' for d in differences(vars_of(a), vars_of(b), leave_out)]
            chain.used['in all', 'checkpoints compared'] += 1
        if chain.batches() != straight.batches(): wrong.append('batches')
        chain.used['in all', 'updates skipped'] = sum(e.get('code') == 'skip' for e in read_events(chain.run/'metrics.jsonl')[0])
        shutil.rmtree(chain.root)
        return wrong, chain


def vars_of(state): return state | dict(config=vars(state['config']))


def rounding(text, root, optimizer, amp, steps=60):
    "The largest relative difference of a loss between whole batches and micro-batches of one sequence, without dropout."
    losses = []
    for micro in (0, 1):
        sets = dict(data=str(text), max_steps=steps, optimizer=optimizer, amp=amp, micro_batch_size=micro)
        with redirect_stdout(io.StringIO()):
            t = Trainer(preset('small', **TINY | sets), Path(root)/f'micro-{optimizer}-{amp}-{micro}', quiet=True).fit()
        losses.append([r['loss'] for r in t.train_history])
    return max(abs(a-b)/a for a, b in zip(*losses, strict=True))


# Random cases ---------------------------------------------------------------------------------------------------------

TRAINING = dict(
    optimizer=('muon', 'adamw'), schedule=('wsd', 'cosine'), dropout=(0., .2), amp=('off', 'bf16', 'fp16'), micro_batch_size=(0, 1, 3),
    warmup_steps=(0, 5, 20), cooldown_frac=(.25, .5), min_lr_frac=(0., .1), n_kv_head=(1, 2), grad_clip=(0., .5), seed=(0, 1))
CHANGES = dict(eval_interval=(3, 7), save_interval=(3, 50), log_interval=(2, 5), keep_last=(2, 3), save_minutes=(1e-9,))


def make_case(choose):
    "Any training, stopped in any ways, extended from anything; `choose` picks one of several."
    training = {k: choose(v) for k, v in TRAINING.items()}
    changes = {k: choose(v) for k, v in CHANGES.items() if choose((True, False, False))}
    def stops(numbers): return tuple((choose(tuple(ENDS)), choose(range(1, 31)), choose(FILES)) for _ in range(choose(numbers)))
    legs = [Leg(choose(range(10, 41)), None, stops((1, 2, 3, 4)))]
    for _ in range(choose((0, 0, 1, 1, 2))):
        legs.append(Leg(legs[-1].total+choose(range(4, 26)), choose(('best', 'final', 'latest', 'trunk', 'trunk')), stops((0, 1, 2, 3))))
    return Case(tuple(legs), training, changes, choose((0, 0, 3)))


@st.composite
def cases(draw): return make_case(lambda options: draw(st.sampled_from(options)))


def main(chains=200, start=0):
    "Run the fixed cases, random chains and `lmnb-verify`; print the tables; exit 1 if anything differed."
    used, bad, lab = Counter(), [], Lab(tempfile.mkdtemp())
    os.environ['LMNB_CACHE'] = str(lab.root/'cache')
    fixed = subprocess.run([sys.executable, '-m', 'pytest', '-q', *('test_exact.py', 'test_lineage.py', 'test_verify.py')], cwd=Path(__file__).parent,
                           capture_output=True, text=True)

    def play(case):
        used['in all', 'chains'] += 1
        try: wrong, chain = lab.check(case, lab.root/f'chain{used["in all", "chains"]}')
        except Exception as e: wrong, chain = [repr(e)], None
        if wrong: bad.append(case); print(case, *wrong[:5], sep='\n  ', flush=True)
        used.update(chain.used if chain else {})
        used.update((k, str(v)) for k, v in case.training.items())
        used.update(('changed at each resume', k) for k in case.changes)
        used['processes', f'{case.processes} {case.parallel or ""}'.strip()] += 1
        used.update({('in all', 'extensions'): len(case.legs)-1, ('listeners, of which the first raises', str(case.listeners)): 1})

    choose = random.Random(start).choice
    for _ in range(chains):
        n, kind = choose([(1, None)]*16+[*product((2, 4), ('ddp', 'fsdp'))])
        play(replace(make_case(choose), processes=n, parallel=kind))
    for optimizer, amp in product(('muon', 'adamw'), ('off', 'bf16')):
        stops = (('SIGTERM', 7, 'latest'), ('kill -9 in a step', 6, 'lone file'))
        play(Case((Leg(24, None, stops), Leg(40, 'trunk', stops)), dict(compile=True, optimizer=optimizer, amp=amp, dropout=.2)))
    print('| what | tried | times |\n|---|---|---|')
    for (what, value), n in sorted(used.items(), key=lambda x: (x[0][0], -x[1])): print(f'| {what} | {value} | {n} |')

    print('\n| micro-batches of 1 against the whole batch, 60 steps, no dropout | largest relative difference of a loss |\n|---|---|')
    for how in product(('muon', 'adamw'), ('off', 'bf16')): print(f'| {", ".join(how)} | {rounding(lab.text, lab.root, *how):.1e} |')
    print('\n| `lmnb-verify --config small`, all cores | said |\n|---|---|')
    del os.environ['OMP_NUM_THREADS']
    for sets in ([], ['dropout=0.1', 'micro_batch_size=1'], ['optimizer=adamw', 'amp=bf16'], ['amp=fp16'], ['compile=True']):
        done = subprocess.run([sys.executable, '-m', 'lmnb.cli', 'verify', '--config', 'small', '--set', 'max_steps=10', *sets],
                              capture_output=True, text=True)
        if done.returncode: bad.append(sets)
        print(f'| {" ".join(sets) or "as it is"} | {(done.stdout or done.stderr).splitlines()[-1]} |', flush=True)
    shutil.rmtree(lab.root)
    print(f'\nFixed cases: {fixed.stdout.splitlines()[-1]}.\n{used["in all", "chains"]} chains, {len(bad)} with a difference.')
    return bool(bad) or fixed.returncode


if __name__ == '__main__': raise SystemExit(main(*map(int, sys.argv[1:])))
