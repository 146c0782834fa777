"`lmnb-verify` says so where a resume is not exact, and its exit code with it."
import sys

import pytest
from conftest import TINY, command, train

import lmnb.check
from lmnb import preset
from lmnb.config import parse_settings

FAULTY = '''
import sys
from lmnb import cli, engine
load = engine.Engine.load
def faulty(self, *a):
    load(self, *a)
    {}
engine.Engine.load = faulty
cli.train(sys.argv[1:])
'''
FAULTS = {
    'a batch skipped': ('self.corpus.train = self.corpus.train[32:]', 'two resumes agree'),
    'a moment lost': ('next(iter(self.opts[0].state.values()))["momentum_buffer"].zero_()', 'two resumes agree'),
    'noise of the machine': ('import os; next(self.model.parameters()).data[0] += 1e-3*os.getpid()', 'does not repeat itself'),
}


@pytest.fixture
def settings(text): return [*TINY, f'data={text}', 'dropout=0.1', 'max_steps=8']


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_seen(settings, tmp_path, monkeypatch, call, fault):
    code, why = FAULTS[fault]
    (tmp_path/'faulty.py').write_text(FAULTY.format(code))
    monkeypatch.setattr(lmnb.check, 'TRAIN', [sys.executable, str(tmp_path/'faulty.py')])
    done = call('--config', 'small', '--set', *settings, cwd=tmp_path, program='verify')
    last = done.out.splitlines()[-1]
    assert done.code == 1 and last.startswith('Not exact: /model_state_dict/') and why in last


def test_from_outside(settings, tmp_path):
    done = train('--config', 'small', '--set', *settings, 'amp=fp16', cwd=tmp_path, program='lmnb-verify')
    assert done.code == 0 and done.out.splitlines()[-1].startswith('Exact: the same bits in all')
    assert 'amp fp16' in done.out and list(tmp_path.iterdir()) == []


def test_what_cannot_be_tried(settings, tmp_path, call):
    done = call('--config', 'small', '--set', *settings, 'max_steps=1', cwd=tmp_path, program='verify')
    assert (done.code, done.err) == (2, 'lmnb-verify: max_steps=1 cannot be resumed in the middle: 2 or more\n')
    done = call('--config', 'small', '--set', *settings, 'data=no/such/text', cwd=tmp_path, program='verify')
    assert done.code == 2 and 'no/such/text' in done.err and done.err.count('\n') == 1
