"What a folder looks like after stops, branches, extensions and bad luck: cases that went wrong once."
import math
import os
import signal

import pytest
import torch
from conftest import EVERY, TINY, events

from lmnb import Trainer, load_checkpoint, load_history, preset
from lmnb.checkpoint import describe
from lmnb.config import ExperimentConfig, config_from, parse_settings
from lmnb.rundir import RunDir, is_ancestor
from lmnb.schedule import CLIMB_STEPS, Plan


@pytest.fixture
def config(text):
    return preset('small', **parse_settings([*TINY, *EVERY, 'max_steps=20', 'save_interval=10', 'eval_interval=10']), data=str(text))


def changed(config, **kw): return config_from(vars(config) | kw)[0]


def stopped_at(trainer, step, monkeypatch, sign=signal.SIGTERM):
    "Fit, and send this process a signal when a step is told."
    def hear(event):
        if event['kind'] == 'train' and event['step'] == step: os.kill(os.getpid(), sign)
    monkeypatch.setattr(trainer, '_display', lambda: hear, raising=False)
    return trainer.fit()


def names(folder): return sorted(p.name for p in folder.glob('*.pt'))


def test_a_signal_saves_at_the_end_of_the_step_and_fit_goes_on(config, tmp_path, monkeypatch):
    t = stopped_at(Trainer(changed(config, log_interval=1), tmp_path/'a', quiet=True), 7, monkeypatch)
    assert (t.interrupted, t.step) == ('SIGTERM', 7) and names(tmp_path/'a') == ['checkpoint_auto.pt']
    assert load_checkpoint(tmp_path/'a'/'checkpoint_auto.pt')['global_step'] == 7 and events(tmp_path/'a', 'stop')[0]['step'] == 7
    assert t.fit().step == 20 and t.interrupted is None
    assert 'checkpoint_auto.pt' not in names(tmp_path/'a')


def test_max_minutes_does_a_step_each_time(config, tmp_path):
    t = Trainer(config, tmp_path/'a', quiet=True)
    assert [t.fit(max_minutes=0).step for _ in range(3)] == [1, 2, 3] and t.fit().step == 20


def test_a_stop_in_the_last_evaluation_is_a_stop(config, tmp_path, monkeypatch):
    t = Trainer(config, tmp_path/'a', quiet=True)
    evaluate = t.evaluate
    monkeypatch.setattr(t, 'evaluate', lambda: os.kill(os.getpid(), signal.SIGTERM) if t.step == 20 else evaluate(), raising=False)
    assert t.fit().interrupted == 'SIGTERM' and load_checkpoint(tmp_path/'a'/'final_model.pt')['val_loss'] is None
    done = Trainer.resume('latest', tmp_path/'a', quiet=True).fit()
    assert done.val_history[-1]['step'] == 20 and load_checkpoint(tmp_path/'a'/'final_model.pt')['val_loss'] == done.val_history[-1]['loss']


def test_extending_to_the_step_reached_is_complete(config, tmp_path):
    Trainer(config, tmp_path/'a', quiet=True).fit()
    before = names(tmp_path/'a')
    assert Trainer.resume('10', tmp_path/'a', extend_steps=10, quiet=True).fit().step == 10
    assert names(tmp_path/'a') == before and not (tmp_path/'a'/'superseded').exists()


def test_a_branch_shows_and_records_its_steps(config, tmp_path, capsys):
    Trainer(config, tmp_path/'a', quiet=True).fit()
    Trainer.resume(tmp_path/'a'/'checkpoint_step_10.pt', tmp_path/'b').fit()
    assert 'step 20: validation loss' in (out := capsys.readouterr().out) and 'dropped' not in out
    a, b = load_history(tmp_path/'a'), load_history(tmp_path/'b')
    assert list(a.train['step']) == list(b.train['step']) and (a.train['loss'] == b.train['loss']).all() and (b.train['tokens'] > 0).all()
    runs = [load_checkpoint(tmp_path/d/'final_model.pt')['lineage'][-1]['run_id'] for d in 'ab']
    assert runs[0] != runs[1] and b.resumes == [10]


def test_out_of_superseded(config, tmp_path, monkeypatch):
    Trainer(changed(config, max_steps=40), tmp_path/'a', quiet=True).fit()
    Trainer.resume('10', tmp_path/'a', extend_steps=20, quiet=True).fit()
    aside = tmp_path/'a'/'superseded'/'1'
    assert 'checkpoint_step_30.pt' in names(aside)
    monkeypatch.chdir(aside)
    t = Trainer.resume('checkpoint_step_30.pt', quiet=True)     # as seen from inside
    assert t.run.path.resolve() == (tmp_path/'a').resolve()
    t.fit()
    losses = {c.step: c.val_loss for c in RunDir(tmp_path/'a').living() if c.val_loss}
    assert describe(tmp_path/'a'/'best_model.pt').val_loss == min(losses.values())
    other = Trainer.resume(aside/'checkpoint_step_30.pt', tmp_path/'b', quiet=True)
    assert other.lineage[-1]['run_id'] != t.lineage[-1]['run_id']


def test_a_file_with_nine_keys_is_its_continuations_ancestor(config, tmp_path):
    state = load_checkpoint(Trainer(config, tmp_path/'a', quiet=True).fit().run/'checkpoint_step_10.pt')
    keys = 'model_state_dict optimizer_state_dict scheduler_state_dict global_step epoch best_val_loss config train_history val_history'.split()
    torch.save({k: state[k] for k in keys}, tmp_path/'mine.pt')
    Trainer.resume(tmp_path/'mine.pt', tmp_path/'b', quiet=True).fit()
    run = RunDir(tmp_path/'b')
    ten, twenty = (run._describe(run/f'checkpoint_step_{s}.pt') for s in (10, 20))
    assert is_ancestor(ten, twenty) and not is_ancestor(twenty, ten)


def test_no_trunk_inside_a_climb(config, tmp_path):
    Trainer(config, tmp_path/'a', quiet=True).fit()
    t = Trainer.resume('final', tmp_path/'a', extend_steps=100, quiet=True)
    t.fit(max_minutes=0)
    Trainer.resume('latest', tmp_path/'a', extend_steps=24, quiet=True).fit()
    assert describe(tmp_path/'a'/'trunk_model.pt').step == 16


def test_best_after_a_failed_save_and_after_new_data(config, tmp_path, monkeypatch):
    t = Trainer(changed(config, max_steps=50), tmp_path/'a', quiet=True)
    losses = {10: 5., 20: 3., 30: 4., 40: 3.5, 50: 6.}
    monkeypatch.setattr(t, 'evaluate', lambda: losses[t.step], raising=False)
    from lmnb import checkpoint
    write = checkpoint.write_checkpoint
    def refuse(state, *a):
        if state['global_step'] in (20, 29): raise OSError(28, 'No space left on device')
        return write(state, *a)
    monkeypatch.setattr(checkpoint, 'write_checkpoint', refuse)
    t.fit()
    assert any(e['code'] == 'save' for e in events(tmp_path/'a', 'warn'))
    assert describe(tmp_path/'a'/'best_model.pt').val_loss == 3.5     # 3.0 could not be saved, twice
    (tmp_path/'other.txt').write_text('quite another text\n'*900)
    t = Trainer.resume('latest', tmp_path/'a', extend_steps=60, data=str(tmp_path/'other.txt'), allow_new_data=True, quiet=True)
    monkeypatch.setattr(t, 'evaluate', lambda: 7., raising=False)
    t.fit()
    assert describe(tmp_path/'a'/'best_model.pt').step == 60          # best began anew
    assert describe(tmp_path/'a'/'checkpoint_step_40.pt').val_loss == 3.5


def test_listeners_harm_nothing_and_generators_come_back(config, tmp_path):
    import threading
    hold = threading.Event()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    t = Trainer(changed(config, dropout=.1), tmp_path/'a', listeners=[lambda e: 1/0, lambda e: hold.wait(20)], quiet=True)
    assert torch.equal(state, torch.get_rng_state())
    t.fit()
    hold.set()
    assert t.step == 20 and torch.equal(state, torch.get_rng_state())
    assert [e['text'].rpartition(': ')[2] for e in events(tmp_path/'a', 'warn')] == ['division by zero', 'not done 5 s after the end']


@pytest.mark.parametrize('schedule', ['wsd', 'cosine'])
def test_random_extensions_never_jump(schedule):
    import random
    r = random.Random(0)
    for _ in range(300):
        c = ExperimentConfig(lr=1., schedule=schedule, warmup_steps=r.choice([0, 5, 20, 90]), max_steps=r.randint(2, 120),
                             cooldown_frac=r.choice([0, .2, .5, 1]), min_lr_frac=r.choice([0, .1]))
        plan, step = Plan.straight(c), 0
        for _ in range(r.randint(1, 4)):
            step = r.randint(max(step, 1), plan.max_steps)
            total = step+r.randint(1, 150)
            longer = plan.extended(step, total)
            assert longer.max_steps == total and [longer.lr(k) for k in range(1, step+1)] == [plan.lr(k) for k in range(1, step+1)]
            up = max(1/max(c.warmup_steps, 1), 1/CLIMB_STEPS)+1e-9
            assert longer.lr(step+1)-longer.lr(step) <= up
            assert all(0 < longer.lr(k) <= 1 for k in range(1, total+1))
            plan = longer


@pytest.mark.parametrize('bad', [dict(kind=[]), dict(lr='x'), dict(lr=10**400), dict(lr=True), dict(lr=-3.), dict(lr=math.nan), dict(climb_steps=0)])
def test_a_plan_from_a_stranger_is_checked(bad):
    from lmnb.schedule import plan_from
    c = ExperimentConfig()
    good = Plan.straight(c).extended(2000, 4000).state_dict()
    assert plan_from(c, good).max_steps == 4000
    good['segments'][-1] |= bad
    with pytest.raises(ValueError, match='scheduler_state_dict has a'): plan_from(c, good)


def test_an_auto_save_of_an_evaluated_step_says_its_loss(config, tmp_path, monkeypatch):
    t = Trainer(changed(config, eval_interval=1, save_interval=10), tmp_path/'a', quiet=True)
    monkeypatch.setattr(t, 'evaluate', lambda: 5.+t.step, raising=False)   # worse and worse: no best to be saved
    for _ in range(3): t.fit(max_minutes=0)
    state = load_checkpoint(tmp_path/'a'/'checkpoint_auto.pt')
    assert state['global_step'] == 3 and state['val_loss'] == state['val_history'][-1]['loss']


def test_a_branch_at_its_trunk_has_one_and_a_file_made_by_hand_gets_a_description(config, tmp_path):
    Trainer(config, tmp_path/'a', quiet=True).fit()
    state = torch.load(tmp_path/'a'/'trunk_model.pt')   # plain torch still may, after our own loading
    torch.save(state, tmp_path/'mine.pt')
    t = Trainer.resume(tmp_path/'mine.pt', tmp_path/'b', quiet=True)
    assert t.fit(max_minutes=0).step == 17
    trunk = describe(tmp_path/'b'/'trunk_model.pt')
    assert trunk.step == 16 and trunk.plan == state['scheduler_state_dict']
    assert Trainer.resume('trunk', tmp_path/'b', extend_steps=40, quiet=True).plan.segments == Plan.straight(changed(config, max_steps=40)).segments
