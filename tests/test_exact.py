"Stopped any way, moved, extended: the bits are the straight run's; and \"exact\" is said only where it is true."
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY, events, train
from exact import CHANGES, ENDS, FILES, Case, Lab, Leg, cases
from hypothesis import HealthCheck, Phase, given, settings

from lmnb import Trainer, load_checkpoint, preset
from lmnb.check import differences
from lmnb.config import parse_settings
from lmnb.engine import Engine
from lmnb.schedule import Plan

DROPOUT = dict(dropout=.2, micro_batch_size=3)
PRECISIONS = ('off', 'bf16', 'fp16')


@pytest.fixture(scope='module')
def lab(tmp_path_factory): return Lab(tmp_path_factory.mktemp('lab'))


@pytest.fixture
def same(lab, tmp_path):
    "Play a case; it must end in the undisturbed bits."
    def check(*legs, changes={}, listeners=0, **training):
        wrong, chain = lab.check(Case(legs, training, changes, listeners), tmp_path/'chain')
        assert wrong == [] and chain.used['checkpoints compared']
        return chain
    return check


@pytest.mark.parametrize('how', ENDS)
def test_however_it_stopped(same, how):
    amp = 'fp16' if how == 'after a skip' else PRECISIONS[list(ENDS).index(how) % 3]
    stops = ((how, 6, 'latest'), (how, 9, 'latest'), (how, 2, 'latest'))
    assert same(Leg(30, stops=stops), amp=amp, **DROPOUT).used[how] or how == 'kill -9 by the clock'  # may come too late


@pytest.mark.parametrize('file', FILES)
def test_from_whichever_file(same, file):
    stops = (('SIGTERM', 17, file), ('in an evaluation', 13, file))  # the second one at the end: a final file not evaluated yet
    assert same(Leg(30, stops=stops), optimizer='adamw', **DROPOUT).used[f'from {file}']


@pytest.mark.parametrize('amp', PRECISIONS)
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('schedule', ['wsd', 'cosine'])
def test_whatever_the_training(same, amp, optimizer, schedule):
    "Stops inside warm-up, constant part and cooldown, in the middle of an epoch and past its end (after step 15)."
    chain = same(Leg(40, stops=(('SIGINT', 3, 'latest'), ('kill -9 in a step', 14, 'latest'), ('SIGTERM', 20, 'latest'))),
                 amp=amp, optimizer=optimizer, schedule=schedule, **DROPOUT)
    assert chain.used['sessions'] == 4 and (chain.used['updates skipped'] > 0) == (amp == 'fp16')


STOP = (('SIGTERM', 2, 'latest'), ('kill -9 in a step', 5, 'latest'))  # also inside a climb
EXTENSIONS = {
    'trunk': ((Leg(24), Leg(40, 'trunk', STOP)), 1),
    'inside the warm-up': ((Leg(24), Leg(40, '8', STOP)), 1),
    'the constant part': ((Leg(40), Leg(50, '24', STOP)), 1),
    'the trunk of an extension': ((Leg(16), Leg(24, 'trunk', STOP), Leg(40, 'trunk', STOP)), 1),
    'final': ((Leg(24), Leg(48, 'final', STOP)), 2),
    'best': ((Leg(24), Leg(48, 'best', STOP)), 2),
    'final, twice': ((Leg(16), Leg(30, 'final', STOP), Leg(48, 'final', STOP)), 3),
    'the trunk after a climb': ((Leg(16), Leg(90, 'final', STOP), Leg(100, 'trunk', STOP)), 2),
    'shortened in the constant part': ((Leg(60), Leg(32, '16', STOP)), 1),
    'shortened too late for a cooldown': ((Leg(60), Leg(45, '40', STOP)), 2),
}


@pytest.mark.parametrize('what', EXTENSIONS)
def test_extended(same, what):
    "From before a cooldown it is the straight run of that length; elsewhere twice the same bits, plan included."
    legs, segments = EXTENSIONS[what]
    chain = same(*legs, **(dict(warmup_steps=12) if 'warm-up' in what else {}), **DROPOUT)
    assert len(chain.plan.segments) == segments and chain.plan.max_steps == legs[-1].total


def test_extended_cosine(same):
    for source in ('best', 'final'): assert len(same(Leg(24), Leg(40, source, STOP), schedule='cosine').plan.segments) == 2


@pytest.mark.parametrize('field', CHANGES)
def test_what_changes_nothing(same, field):
    same(Leg(40, stops=(('SIGTERM', 5, 'latest'), ('SIGTERM', 20, 'latest'))), changes={field: CHANGES[field][0]}, listeners=3)


@settings(max_examples=12, derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_random_chains(lab, tmp_path_factory, case):
    wrong, _ = lab.check(case, tmp_path_factory.mktemp('random')/'chain')
    assert wrong == []


def skip_a_batch(engine): engine.corpus.train = engine.corpus.train[32:]
def lose_a_moment(engine): next(iter(engine.opts[0].state.values()))['momentum_buffer'].zero_()
def forget_the_scale(engine): engine.scaler = torch.amp.GradScaler('cpu')
def round_a_weight(engine): engine.model.state_dict()['embed.weight'][0, 0] += 1e-6


@pytest.mark.parametrize('fault', [skip_a_batch, lose_a_moment, forget_the_scale, round_a_weight])
def test_the_harness_sees_a_fault(lab, tmp_path, monkeypatch, fault):
    load = Engine.load
    monkeypatch.setattr(Engine, 'load', lambda self, *a: (load(self, *a), fault(self)))
    wrong, _ = lab.check(Case((Leg(30, stops=(('SIGTERM', 17, 'latest'),)),), dict(amp='fp16')), tmp_path/'chain')
    assert any('final_model.pt' in w for w in wrong)


def test_the_harness_sees_one_bit():
    a = dict(w=torch.ones(3), h=[dict(step=1, loss=2.)])
    b = dict(w=torch.ones(3), h=[dict(step=1, loss=2.)])
    assert differences(a, b) == []
    b['w'].view(torch.int32)[1] ^= 1
    b['h'][0]['loss'] = 2.0000000000000004
    assert differences(a, b) == ['/w', '/h/0/loss: 2.0 against 2.0000000000000004']
