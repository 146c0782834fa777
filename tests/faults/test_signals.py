"SIGINT, SIGTERM, SIGHUP, once and twice, at any line of a command's life: saved once, the right exit code, and the way on."
import os
import random
import signal
import subprocess
import sys
import threading

import exact
import lmnb
import lmnb.checkpoint
import lmnb.engine
import pytest
from conftest import tree
from exact import forked
from faults.lives import done, halves, names, numbers, straight, tiny, whole

from lmnb import cli
from lmnb.background import condition, train_words
from lmnb.engine import Engine
from lmnb.rundir import AUTO, RunDir

HERE = os.path.dirname(lmnb.__file__)
# from which function's nth call on, and how many lines after it, in any thread
PHASES = {'start-up': ('_train', 1, 150), 'data': ('_text_ids', 1, 60), 'the folder': ('_begin', 1, 90), 'a step': ('train_step', 9, 40),
          'an evaluation': ('evaluate', 5, 30), 'a save': ('_save', 9, 60), 'the writer': ('write_checkpoint', 9, 30), 'the end': ('_finish', 1, 80)}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
STEPS, SENT, FIRST = 0, 1, 2  # in the numbers that a child tells: steps done, signals sent, steps done at the first one


def heard(number): return signal.getsignal(number) != signal.SIG_DFL  # else the command is over, or has not begun


class Aim:
    "Sends a signal after so many lines of lmnb's code, counted from a function's nth call; another one so many calls later."
    def __init__(self, told, function, nth, lines, first, second=None, calls=0):
        self.told, self.function, self.nth, self.lines, self.first, self.second, self.calls = told, function, nth, lines, first, second, calls
        threading.settrace(self.trace)
        sys.settrace(self.trace)

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(HERE): return None
        if event == 'call' and frame.f_code.co_name == self.function: self.nth -= 1
        if event == 'line' and self.nth <= 0 and not self.told[SENT]:
            self.lines -= 1
            if self.lines < 0 and heard(self.first): self.send()
        return self.trace

    def send(self):
        self.told[SENT], self.told[FIRST] = 1, self.told[STEPS]
        if self.second: sys.setprofile(self.profile)  # an error ends a thread's tracing, but not its profiling
        os.kill(os.getpid(), self.first)

    def profile(self, frame, event, arg):
        if frame.f_code.co_filename.startswith(HERE): self.calls -= 1
        if self.calls < 0 and self.told[SENT] == 1 and heard(self.second): self.told[SENT] = 2; os.kill(os.getpid(), self.second)


def command(words, told, cache, aim=()):
    "`lmnb-train` in this process; its exit code."
    os.environ['LMNB_CACHE'] = str(cache)
    os.dup2(sys.stdout.fileno(), 2)
    step = Engine.train_step
    def counted(*a):
        record = step(*a)
        told[STEPS] += 1
        return record
    Engine.train_step, sys.stderr = counted, sys.stdout
    if aim: Aim(told, *aim)
    try: cli.train(words)
    except SystemExit as e: return e.code


@pytest.fixture(scope='module')
def base(text, tmp_path_factory):
    root = tmp_path_factory.mktemp('signals')
    config = tiny(text, save_interval=4)
    return root, config, straight(config, root/'straight')


def words(run, config): return [*train_words(run, config, 'latest-or-new', None, {}), '--quiet']


def judge(run, told, code, said, first, second, before, step):
    "What must hold once a session has ended."
    if 'nothing was written' in said: assert tree(run) == before
    at_once = 'Left at once' in said
    now, state = whole(run), RunDir(run).status().get('state')
    assert now >= step and not condition(run).alive
    if at_once: assert code == 130 and (first, second, told[SENT]) == (signal.SIGINT, signal.SIGINT, 2); return
    if code == 0: assert state == 'finished' and now == 20 and told[STEPS]; return
    assert code == CODES[first], said
    if not told[STEPS]:
        now, then = ({k: v for k, v in t.items() if k.endswith('.pt')} for t in (tree(run), before))
        assert now == then and state in (None, 'stopped', 'finished')
        return
    assert state == 'stopped' and now == step+told[STEPS] and told[STEPS]-told[FIRST] <= 1
    if now % 4 == 0: assert f'checkpoint_step_{now}.pt' in names(run) and AUTO not in names(run)


@pytest.mark.parametrize('phase', PHASES)
def test_a_signal_at_any_line(base, row, times, phase):
    row(f'SIGINT, SIGTERM, SIGHUP, once and twice, in {phase}', 'saved once, the signal\'s exit code, nothing half; the end is the straight run\'s bits')
    (root, config, other), r = base, random.Random(phase)
    function, nth, lines = PHASES[phase]
    tries, chain = 0, 0
    while tries < times(6, 90):
        chain += 1
        run, log, cache, step = root/f'{phase}{chain}', root/f'{phase}{chain}.txt', root/f'cache {phase}{chain}', 0
        for _ in range(6):
            told, first = numbers(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[tries % 3]
            second = r.choice((None, first, first, signal.SIGTERM)) if tries >= 3 else None
            before, said = tree(run), log.stat().st_size if log.exists() else 0
            aim = function, r.randint(1, nth), r.randrange(lines), first, second, r.choice((0, r.randrange(40), r.randrange(400)))
            code = forked(lambda: command(words(run, config), told, cache, aim), log)
            text = log.read_text()[said:]
            assert code != 99, (aim, text)
            if told[SENT]:
                tries += 1
                row.tried()
                try: judge(run, told, code, text, first, second, before, step)
                except AssertionError as e: raise AssertionError(f'{aim} code {code} told {list(told[:3])}\n{text}\n{sorted(names(run))} {RunDir(run).status()}') from e
            if code == 0: break
            step = whole(run)
        assert forked(lambda: command(words(run, config), numbers(), cache), log) == 0, log.read_text()
        done(run, config, other)
        assert not [p for p in cache.glob('*') if p.name.startswith('.tmp-') or p.name.endswith('.part')]


@pytest.mark.parametrize('where', ['_loop', '_finish'])
def test_a_second_one_leaves_at_once_whatever_hangs(base, row, where):
    row('SIGINT twice while a save hangs', 'the second one ends the process with 130, and the files that were there verify')
    root, config, other = base
    run, log = root/f'hangs in {where}', root/f'hangs in {where}.txt'
    def hang():
        signal.alarm(20)  # ends what still waits
        write = lmnb.checkpoint.write_checkpoint
        lmnb.checkpoint.write_checkpoint = lambda state, folder, names: write(state, folder, names) if names != [AUTO] and state['global_step'] <= 8 else threading.Event().wait()
        def interrupt(writer):
            frame, names = sys._getframe(), set()
            while frame := frame.f_back: names.add(frame.f_code.co_name)
            if writer.busy and 'train' in names and max((c.step or 0 for c in RunDir(run).living()), default=0) >= 8 and (where in names) and not told[SENT]:
                told[SENT] = 2
                for _ in range(2 if where == '_loop' else 1): os.kill(os.getpid(), signal.SIGINT)
        exact.wrap(lmnb.checkpoint.Writer, 'wait', interrupt)
        if where == '_finish':
            def ask(tokens, k, *rest): os.kill(os.getpid(), signal.SIGINT) if k == 9 else None
            exact.wrap(lmnb.engine, 'get_batch', ask)
        return command(words(run, config), told, root/'cache')
    told = numbers()
    assert forked(hang, log) == 130, log.read_text()
    row.tried()
    assert told[SENT] == 2 and whole(run) == 8 and not condition(run).alive and 'Left at once' in log.read_text()
    assert forked(lambda: command(words(run, config), told, root/'cache'), log) == 0
    done(run, config, other)


# The beginning and the end of a real process --------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
number, name, nth = getattr(signal, sys.argv[1]), sys.argv[2], int(sys.argv[3])
class Finder:
    nth = nth
    def find_spec(self, module, *_):
        if module.startswith(name):
            Finder.nth -= 1
            if Finder.nth == 0: print('sent', flush=True); os.kill(os.getpid(), number)
sys.meta_path.insert(0, Finder())
from lmnb.cli import train
train(sys.argv[4:])
"""


def hearing():
    for s in (signal.SIGINT, signal.SIGHUP): signal.signal(s, signal.SIG_DFL)


def test_a_signal_among_the_imports(base, row, times, tmp_path):
    row('SIGINT, SIGTERM, SIGHUP while torch is imported', 'exit code 130, 143, 129, a line and no traceback, nothing written')
    (_, config, _), r = base, random.Random(0)
    for i in range(times(3, 30)):
        name = ('SIGINT', 'SIGTERM', 'SIGHUP')[i % 3]
        begin = ('torch', r.randint(1, 200)) if i else ('torch', 1)
        p = subprocess.run([sys.executable, '-c', SCRIPT, name, *map(str, begin), *words(tmp_path/'run', config)], cwd=tmp_path,
                           capture_output=True, text=True, preexec_fn=hearing)  # a shell's & would have SIGINT ignored
        row.tried('sent' in p.stdout)
        assert p.returncode == CODES[getattr(signal, name)] and 'nothing was written' in p.stdout and p.stderr == '', (name, begin, p)
        assert list(tmp_path.iterdir()) == []
