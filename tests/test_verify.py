"`lmnb-verify` says so where a resume is not exact, and its exit code with it."
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from conftest import TINY, command, train

import lmnb.check

FAULTY = '''
import sys
from lmnb import cli, engine
load, step = engine.Engine.load, engine.Engine.train_step
def load_with_a_fault(self, *a):
    load(self, *a)
    {}
def step_with_a_fault(self, *a):
    {}
    return step(self, *a)
engine.Engine.load, engine.Engine.train_step = load_with_a_fault, step_with_a_fault
cli.train(sys.argv[1:])
'''
OURS, MACHINES = 'a resume lost something: report it', 'this machine does not repeat itself'
FAULTS = {
    'a batch skipped': ('self.corpus.train = self.corpus.train[32:]', 'pass', OURS),
    'a moment lost': ('next(iter(self.opts[0].state.values()))["momentum_buffer"].zero_()', 'pass', OURS),
    'another machine': ('pass', 'import os; next(self.model.parameters()).data[0] += 1e-3*(os.getpid()%1000)', MACHINES),
}


@pytest.fixture
def settings(text): return [*TINY, f'data={text}', 'dropout=0.1', 'max_steps=8']


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_seen(settings, tmp_path, monkeypatch, call, fault):
    *code, why = FAULTS[fault]
    (tmp_path/'faulty.py').write_text(FAULTY.format(*code))
    monkeypatch.setattr(lmnb.check, 'TRAIN', [sys.executable, str(tmp_path/'faulty.py')])
    done = call('--config', 'small', '--set', *settings, cwd=tmp_path, program='verify')
    last = done.out.splitlines()[-1]
    assert done.code == 1 and last.startswith('Not exact: /model_state_dict/') and why in last


def test_a_training_that_is_killed_has_no_last_word(settings, tmp_path, monkeypatch, call):
    monkeypatch.setattr(lmnb.check, 'TRAIN', [sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'])
    done = call('--config', 'small', '--set', *settings, cwd=tmp_path, program='verify')
    assert done.code == 2 and done.err == 'lmnb-verify: the training ended with -9 and no word; out of memory, perhaps\n'


def test_asked_to_end_it_leaves_nothing(settings, tmp_path):
    p = subprocess.Popen([*command('lmnb-verify'), '--config', 'small', '--set', *settings, 'max_steps=100000'], cwd=tmp_path,
                         env=dict(os.environ, TMPDIR=str(tmp_path)), stdout=subprocess.PIPE, text=True)
    end = time.time()+60
    while not list(tmp_path.rglob('metrics.jsonl')): assert p.poll() is None and time.time() < end; time.sleep(.05)
    children = psutil.Process(p.pid).children()
    p.terminate()
    assert p.wait(30) == 143 and len(children) == 1
    psutil.wait_procs(children, 10)
    assert not children[0].is_running() and list(tmp_path.iterdir()) == []


def test_from_outside(settings, tmp_path):
    done = train('--config', 'small', '--set', *settings, 'amp=fp16', cwd=tmp_path, program='lmnb-verify')
    assert done.code == 0 and done.out.splitlines()[-1].startswith('Exact: the same bits in all')
    assert 'amp fp16' in done.out and list(tmp_path.iterdir()) == []


def test_what_cannot_be_tried(settings, tmp_path, call):
    done = call('--config', 'small', '--set', *settings, 'max_steps=1', cwd=tmp_path, program='verify')
    assert (done.code, done.err) == (2, 'lmnb-verify: max_steps=1 cannot be resumed in the middle: 2 or more\n')
    done = call('--config', 'small', '--set', *settings, 'data=no/such/text', cwd=tmp_path, program='verify')
    assert done.code == 2 and 'no/such/text' in done.err and done.err.count('\n') == 1


def test_on_all_cores_as_users_run_it(text, tmp_path, monkeypatch, call):
    "Threads that nobody has set: MKL must not pick another number of them in one process than in the other."
    monkeypatch.delenv('OMP_NUM_THREADS')
    done = call('--config', 'small', '--set', f'data={text}', 'vocab_size=300', 'max_steps=4', 'eval_batches=1', cwd=tmp_path, program='verify')
    assert done.code == 0, done.out


@pytest.mark.skipif(shutil.which('g++') is None, reason='the compiler needs another')
def test_the_compiler_repeats_itself_on_all_cores(text, tmp_path, monkeypatch, call):
    "Its threads add up an embedding's gradient in one order."
    monkeypatch.delenv('OMP_NUM_THREADS')
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path/'kernels'))
    done = call('--config', 'small', '--compile', '--set', f'data={text}', 'n_layer=1', 'max_steps=6', 'eval_batches=1', cwd=tmp_path, program='verify')
    assert done.code == 0, done.out
