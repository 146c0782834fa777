"Stopped any way, moved, extended: the bits are the straight run's; and \"exact\" is said only where it is true."
import subprocess
import sys
import time

import exact
import pytest
import torch
from conftest import events
from jupyter_client.manager import start_new_kernel
from exact import CHANGES, ENDS, FILES, Case, Lab, Leg, cases
from hypothesis import HealthCheck, Phase, given, settings

import lmnb.engine
from lmnb import ResumePanel, Trainer, launch, load_checkpoint, preset
from lmnb.check import differences
from lmnb.engine import Engine

DROPOUT = dict(dropout=.2, micro_batch_size=3)
PRECISIONS = ('off', 'bf16', 'fp16')


def wait_for(true, s=60):
    end = time.time()+s
    while not true():
        assert time.time() < end
        time.sleep(.02)


@pytest.fixture(scope='module')
def lab(tmp_path_factory): return Lab(tmp_path_factory.mktemp('lab'))


@pytest.fixture
def same(lab, tmp_path):
    "Play a case; it must end in the undisturbed bits."
    def check(*legs, changes={}, listeners=0, processes=1, parallel=None, **training):
        wrong, chain = lab.check(Case(legs, training, changes, listeners, processes, parallel), tmp_path/'chain')
        assert wrong == [] and chain.used['in all', 'checkpoints compared']
        return chain
    return check


@pytest.mark.parametrize('how', ENDS)
def test_however_it_stopped(same, how):
    amp = 'fp16' if how == 'after a skip' else PRECISIONS[list(ENDS).index(how) % 3]
    stops = ((how, 6, 'latest'), (how, 9, 'latest'), (how, 2, 'latest'))
    assert same(Leg(30, stops=stops), amp=amp, **DROPOUT).used['stopped by', how] or how == 'kill -9 by the clock'  # may come too late


@pytest.mark.parametrize('parallel, processes, optimizer', [('ddp', 2, 'muon'), ('fsdp', 4, 'adamw')])
def test_in_many_processes(same, parallel, processes, optimizer):
    "One of them is stopped or killed; twice the first, with the list of all, and once while they wait for it at the end."
    stops = (('SIGTERM', 3, 'latest'), ('kill -9 in a step', 6, 'latest'), ('kill -9 in half a file', 4, 'latest'),
             ('kill -9 before a rename', 12, 'latest'))
    chain = same(Leg(24, stops=stops), Leg(32, 'trunk'), processes=processes, parallel=parallel, optimizer=optimizer, **DROPOUT)
    assert chain.used['in all', 'sessions'] == 6


@pytest.mark.parametrize('file', FILES)
def test_from_whichever_file(same, file):
    stops = (('SIGTERM', 17, file), ('in an evaluation', 13, file))  # the second one at the end: a final file not evaluated yet
    assert same(Leg(30, stops=stops), optimizer='adamw', **DROPOUT).used['resumed from', file]


@pytest.mark.parametrize('amp', PRECISIONS)
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('schedule', ['wsd', 'cosine'])
def test_whatever_the_training(same, amp, optimizer, schedule):
    "Stops inside warm-up, constant part and cooldown, in the middle of an epoch and past its end (after step 15)."
    chain = same(Leg(40, stops=(('SIGINT', 3, 'latest'), ('kill -9 in a step', 14, 'latest'), ('SIGTERM', 20, 'latest'))),
                 amp=amp, optimizer=optimizer, schedule=schedule, **DROPOUT)
    assert chain.used['in all', 'sessions'] == 4 and (chain.used['in all', 'updates skipped'] > 0) == (amp == 'fp16')


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
    assert len(same(Leg(24), Leg(60, 'final', STOP), Leg(80, 'trunk', STOP), schedule='cosine').plan.segments) == 2


@pytest.mark.parametrize('field', CHANGES)
def test_what_changes_nothing(same, field):
    same(Leg(40, stops=(('SIGTERM', 5, 'latest'), ('SIGTERM', 20, 'latest'))), changes={field: CHANGES[field][0]}, listeners=3)


def test_a_watching_panel_changes_nothing(lab, tmp_path):
    config = preset('small', **exact.TINY | DROPOUT | dict(data=str(lab.text), max_steps=150))
    run, panel = launch(tmp_path/'watched', config), ResumePanel(tmp_path, every_s=.05)
    run.wait(60)
    panel.close()
    Trainer(config, tmp_path/'alone', quiet=True).fit()
    a, b = (load_checkpoint(tmp_path/d/'final_model.pt') for d in ('watched', 'alone'))
    assert differences(a, b, ('lineage', 'software')) == []


def test_interrupted_in_a_notebook(lab, tmp_path):
    "As Interrupt Kernel does it, twice; the cell that goes on is run again."
    config = preset('small', **exact.TINY | DROPOUT | dict(data=str(lab.text), max_steps=400))
    cell = f'from lmnb import Trainer, ExperimentConfig\nTrainer.resume("latest-or-new", {str(tmp_path/"cut")!r}, config={config!r}).fit()'
    manager, kernel = start_new_kernel(extra_arguments=['--HistoryManager.enabled=False'])
    try:
        for seen in (0, 1):
            kernel.execute(cell)
            wait_for(lambda: (tmp_path/'cut'/'metrics.jsonl').exists() and len(events(tmp_path/'cut', 'train')) > 20*(1+seen*4))
            manager.interrupt_kernel()
            wait_for(lambda: len(events(tmp_path/'cut', 'stop')) > seen)
        assert kernel.execute_interactive(cell, timeout=60, output_hook=lambda m: None)['content']['status'] == 'ok'
    finally: manager.shutdown_kernel(now=True)
    Trainer(config, tmp_path/'alone', quiet=True).fit()
    a, b = (load_checkpoint(tmp_path/d/'final_model.pt') for d in ('cut', 'alone'))
    assert differences(a, b, ('lineage', 'software')) == [] and len(a['lineage']) == 3


def test_micro_batches_differ_by_rounding(lab):
    assert 0 < exact.rounding(lab.text, lab.root, 'muon', 'off') < 1e-4


FAILED_ONCE = {
    'a branch begun at its trunk had none': Case(
        (Leg(40, stops=(('SIGHUP', 22, 'final'), ('an error', 11, '_orig_mod.'))), Leg(64, 'trunk', (('SIGTERM', 9, '_orig_mod.'),))),
        dict(warmup_steps=0), dict(save_interval=50)),
    'an evaluation due at the end was skipped': Case((Leg(25, stops=(('SIGINT', 25, 'module.'),)), Leg(35, 'best')), dict(schedule='cosine')),
    'the end of a run within its warm-up': Case((Leg(13, stops=(('kill -9 in an evaluation', 16, 'trunk'),)), Leg(17, 'best'), Leg(39, 'final')),
                                                dict(warmup_steps=20, schedule='cosine'), dict(log_interval=2)),
}


@pytest.mark.parametrize('what', FAILED_ONCE)
def test_what_failed_once(lab, tmp_path, what): assert lab.check(FAILED_ONCE[what], tmp_path/'chain')[0] == []


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
def forget_the_best(trainer): trainer.best_val_loss = float('inf')


@pytest.mark.parametrize('owner, name, fault', [
    (Engine, 'load', skip_a_batch), (Engine, 'load', lose_a_moment), (Engine, 'load', forget_the_scale), (Engine, 'load', round_a_weight),
    (Trainer, '_take_over', forget_the_best)])
def test_the_harness_sees_a_fault(lab, tmp_path, monkeypatch, owner, name, fault):
    sound = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *a: (sound(self, *a), fault(self)))
    wrong, _ = lab.check(Case((Leg(30, stops=(('SIGTERM', 21, 'latest'),)),), dict(amp='fp16')), tmp_path/'chain')
    assert wrong  # the trunk, at 22, still has the best of 20


# What is said of it ----------------------------------------------------------------------------------------------------

@pytest.fixture
def stopped(lab, tmp_path):
    "A run that was stopped after its first step, on one thread."
    config = preset('small', **exact.TINY | dict(data=str(lab.text), max_steps=30))
    Trainer(config, tmp_path/'run', quiet=True).fit(max_minutes=0)
    return tmp_path/'run'/'checkpoint_auto.pt'


def without(key):
    def remove(path, *_): torch.save({k: v for k, v in torch.load(path).items() if k != key}, path)
    return remove


def other_text(path, monkeypatch): (path.parent/'other.txt').write_text('quite another text\n'*400)


CHANGED = {
    'threads 1 → 2': (lambda *_: torch.set_num_threads(2), {}),
    'maths ieee → bf16': (lambda *_: torch.set_float32_matmul_precision('medium'), {}),
    'maths ieee → ieee MKL_CBWR=COMPATIBLE': (lambda path, m: m.setenv('MKL_CBWR', 'COMPATIBLE'), {}),
    'torch 2': (lambda path, m: m.setattr(torch, '__version__', '9.9'), {}),
    'lmnb 0': (lambda path, m: m.setattr(lmnb.engine, '__version__', '9.9'), {}),
    'device cpu (': (lambda path, m: m.setattr(lmnb.engine, 'device_name', lambda kind: 'cpu (another one)'), {}),
    'compile False → True': (lambda path, m: m.setattr(torch, 'compile', lambda model: model), dict(compile=True)),
    'amp off → bf16': (lambda *_: None, dict(amp='bf16')),
    'micro_batch 4 → 1': (lambda *_: None, dict(micro_batch_size=1)),
    'no scaler_state_dict': (without('scaler_state_dict'), {}),
    'no rng_state': (without('rng_state'), {}),
    'no data_state': (without('data_state'), {}),
    'other data': (other_text, dict(data='other.txt', allow_new_data=True)),
}


@pytest.mark.parametrize('what', CHANGED)
def test_what_differs_is_said(stopped, monkeypatch, capsys, what):
    change, given = CHANGED[what]
    monkeypatch.chdir(stopped.parent)
    try:
        change(stopped, monkeypatch)
        Trainer.resume(stopped, **given).fit(max_minutes=0)
    finally:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision('highest')
    line, event = next(l for l in capsys.readouterr().out.splitlines() if l.startswith('Resuming')), events(stopped.parent, 'resume')[-1]
    assert f': not exact ({what}' in line and line.endswith('): bits may differ.')
    assert event['exact'] is False and len(event['differs']) == 1 and event['differs'][0].startswith(what)


def test_exact_is_said_where_it_is_true(stopped, monkeypatch, capsys):
    monkeypatch.delenv('OMP_NUM_THREADS')
    torch.set_num_threads(2)   # the checkpoint's number is taken, and the notebook's given back
    t = Trainer.resume(stopped).fit(max_minutes=0)
    assert torch.get_num_threads() == 2 and ': exact.' in capsys.readouterr().out
    t.fit(max_minutes=0)
    monkeypatch.setenv('MKL_CBWR', 'COMPATIBLE')   # too late to act, but who knows
    t.fit(max_minutes=0)
    torch.set_num_threads(1)
    resumes = events(stopped.parent, 'resume')[-3:]
    assert [(e['exact'], e['differs']) for e in resumes] == [(True, [])]*2+[(False, ['maths ieee → ieee MKL_CBWR=COMPATIBLE'])]
    assert {e['versions']['threads'] for e in resumes} == {1}


def test_torchs_own_ways_to_set_precision():
    "The old question about it raises once the new way was taken."
    code = ("import torch; torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
            "from lmnb.engine import maths; print(maths('cpu'), maths('cuda'))")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.split() == ['tf32', 'tf32'], done.stderr


def test_a_scale_that_is_not_there_is_no_exact_resume(stopped, capsys):
    Trainer.resume(stopped, amp='fp16', quiet=True).fit(max_minutes=0)
    auto = stopped.parent/'checkpoint_auto.pt'
    torch.save(torch.load(auto) | dict(scaler_state_dict={}), auto)
    Trainer.resume(auto)
    assert 'not exact (no scaler_state_dict)' in capsys.readouterr().out


def test_of_a_compiler_only_so_much_is_said(stopped, monkeypatch, capsys):
    monkeypatch.setattr(torch, 'compile', lambda model: model)
    Trainer.resume(stopped, compile=True, quiet=True).fit(max_minutes=0)
    capsys.readouterr()
    Trainer.resume('latest', stopped.parent).fit(max_minutes=0)
    assert 'exact as far as the compiler repeats itself.' in capsys.readouterr().out
    assert events(stopped.parent, 'resume')[-1]['exact'] is False and events(stopped.parent, 'resume')[-1]['differs'] == []


def test_a_spike_is_an_event_with_the_way_back(lab, tmp_path, capsys):
    config = preset('small', **exact.TINY | dict(data=str(lab.text), max_steps=200, save_interval=50))
    t = Trainer(config, tmp_path/'run')
    forward = t.engine.forward
    def spiking(x, y): return forward(x, y)*(5 if t.step+1 in (160, 161) else 1)
    t.engine.forward = spiking
    t.fit()
    [e] = [e for e in events(tmp_path/'run', 'warn') if e['code'] == 'spike']
    assert e['step'] == 160 and f'--resume 150' in e['text'] and e['text'] in capsys.readouterr().out


def test_the_harness_sees_one_bit():
    a = dict(w=torch.ones(3), h=[dict(step=1, loss=2.)])
    b = dict(w=torch.ones(3), h=[dict(step=1, loss=2.)])
    assert differences(a, b) == []
    b['w'].view(torch.int32)[1] ^= 1
    b['h'][0]['loss'] = 2.0000000000000004
    assert differences(a, b) == ['/w', '/h/0/loss: 2.0 against 2.0000000000000004']
