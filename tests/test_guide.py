"Every promise of the resume guide, from outside: what the user types, and what is on the screen and the disk afterwards."
import os
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SHORT, command, events, train, tree, unlike, write_text

from lmnb import ExperimentConfig, list_checkpoints, load_checkpoint, load_history, preset
from lmnb.checkpoint import NINE
from lmnb.data import documents, find_files, fingerprint


def rates(run):
    "Step and learning rate of every train event that counts; the steps have no gap."
    h = load_history(run).train
    assert h['step'].tolist() == list(range(1, len(h['step'])+1))
    return h['lr']


def same_end(run, other): return not unlike(*(load_checkpoint(r/'final_model.pt') for r in (run, other)))


def test_first_command_makes_the_guides_files(guide):
    names = {'best_model.pt', 'final_model.pt', *(f'checkpoint_step_{n}.pt' for n in (500, 1000, 1500, 2000))}
    assert {p.name for p in guide.run.iterdir()} == names | {'trunk_model.pt', 'metrics.jsonl', 'run.json', '.lock'}
    assert load_checkpoint(guide.run/'final_model.pt')['global_step'] == 2000
    sample, extend = guide.out.splitlines()[-2:]  # the next commands to copy
    assert sample.startswith('Sample: lmnb-sample') and 'run_experiment.py --resume trunk --extend-steps 4000' in extend


def test_best_is_the_lowest_of_all_evaluations(guide):
    best, losses = load_checkpoint(guide.run/'best_model.pt'), {e['step']: e['loss'] for e in events(guide.run, 'val')}
    assert best['best_val_loss'] == best['val_loss'] == min(losses.values()) == losses[best['global_step']]


def test_resume_from_step_1000(guide, tmp_path):
    run, before = shutil.copytree(guide.run, tmp_path/'checkpoints'), tree(guide.run)
    done = train('--resume', 'checkpoints/checkpoint_step_1000.pt', cwd=tmp_path, program='run_experiment.py')
    assert done.code == 0 and 'at step 1000, going to 2000: exact.' in done.out
    assert same_end(run, guide.run)
    aside = tree(run/'superseded'/'1')  # what was there beyond step 1000 still is, bit by bit
    assert aside == {n: before[n] for n in aside} and {'checkpoint_step_1500.pt', 'final_model.pt'} <= set(aside)


@pytest.fixture(scope='module')
def killed(text, tmp_path_factory):
    "The short run, killed somewhere after its step 100."
    cwd = tmp_path_factory.mktemp('killed')
    shutil.copy(text, cwd)
    p = subprocess.Popen([*command('lmnb-train'), '--data', 'corpus.txt', '--set', *SHORT], cwd=cwd, stdout=subprocess.DEVNULL)
    run, end = cwd/'checkpoints', time.monotonic()+60
    while not (run/'checkpoint_step_100.pt').exists():
        assert p.poll() is None and time.monotonic() < end
        time.sleep(.01)
    p.kill()
    p.wait()
    assert not (run/'final_model.pt').exists()
    return run


@pytest.mark.parametrize('what, program', [('latest', 'lmnb-train'), ('checkpoints/best_model.pt', 'run_experiment.py')])
def test_killed_run_goes_on(killed, short, tmp_path, what, program):
    run = shutil.copytree(killed, tmp_path/'checkpoints')
    newest, good = list_checkpoints(killed)[:2]
    step = good.step if what == 'latest' else load_checkpoint(run/'best_model.pt')['global_step']
    if what == 'latest':
        for name in newest.names: os.truncate(run/name, newest.size//2)
    done = train('--resume', what, cwd=tmp_path, program=program)
    assert done.code == 0 and f'at step {step}, going to 300: exact.' in done.out
    assert ('Passed over' in done.out) == (what == 'latest')
    assert same_end(run, short.run)  # weights, moments, rate, step, best loss, histories: all of them
    assert np.array_equal(rates(run), rates(short.run))


def test_extend_and_extend_again(copy):
    "As the guide's 2,000, 5,000 and 10,000 steps, scaled."
    peak = load_checkpoint(copy/'final_model.pt')['config'].lr
    for total, program in ((750, 'run_experiment.py'), (1500, 'lmnb-train')):
        start = load_checkpoint(copy/'best_model.pt')['global_step']
        done = train('--resume', 'checkpoints/best_model.pt', '--extend-steps', total, cwd=copy.parent, program=program)
        assert done.code == 0 and f'at step {start}, going to {total}' in done.out
        lr, end = rates(copy), load_checkpoint(copy/'final_model.pt')
        assert len(lr) == total and end['global_step'] == end['config'].max_steps == total
        assert np.abs(np.diff(lr[5:])).max() <= .021*peak and lr.min() > 0 and lr.argmax() < total*.8 < total-.1*total
        assert lr[int(total*.7)] == pytest.approx(peak) and lr[-1] < .02*peak  # back at the peak, then a whole cooldown
        assert [r['step'] for r in end['train_history']] == list(range(1, total+1))
        assert [r['step'] for r in end['val_history']] == load_history(copy).val['step'].tolist() == list(range(25, total+1, 25))


@pytest.mark.parametrize('name', ['small', 'medium', 'large', 'xlarge', 'rtx4090', None])
def test_presets(name, text, tmp_path, call):
    sets = dict(vocab_size=300, block_size=32, n_layer=1, n_embd=480, max_steps=1, eval_batches=1)
    args = (*(['--config', name] if name else []), '--data', text, '--set', *(f'{k}={v}' for k, v in sets.items()))
    done = call(*args, cwd=tmp_path) if name else train(*args, cwd=tmp_path, program='run_experiment.py')
    assert done.code == 0
    config = load_checkpoint(tmp_path/'checkpoints'/'final_model.pt')['config']
    assert config == preset(name or 'medium', data=str(text), amp=config.amp, **sets)


def test_plain_torch_load_gives_the_nine_keys(short):
    code = ('from lmnb import load_checkpoint\nimport torch\nc = torch.load("checkpoints/best_model.pt")\n'
            f'print(all(k in c for k in {NINE}), type(c["config"]), c["config"].n_embd, c["global_step"], load_checkpoint("checkpoints/best_model.pt").keys() == c.keys())')
    out = subprocess.run([sys.executable, '-c', code], cwd=short.cwd, capture_output=True, text=True, check=True).stdout
    assert out.split() == ['True', '<class', "'lmnb.config.ExperimentConfig'>", '16', str(load_checkpoint(short.run/'best_model.pt')['global_step']), 'True']
    assert NINE == ('model_state_dict', 'optimizer_state_dict', 'scheduler_state_dict', 'global_step', 'epoch', 'best_val_loss', 'config', 'train_history', 'val_history')
    sources = [*(ROOT/'lmnb').glob('*.py'), *(ROOT/'nbs').glob('*.ipynb'), ROOT/'README.md', ROOT/'run_experiment.py']
    assert not [p.name for p in sources if 'weights_only=False' in p.read_text(encoding='utf-8').replace(' ', '')]


def test_wrong_path(copy):
    before = tree(copy.parent)
    done = train('--resume', 'checkpoints/best.pt', cwd=copy.parent, program='run_experiment.py')
    assert done.code == 2 and 'Checkpoint not found: checkpoints/best.pt' in done.err and len(done.err.splitlines()) <= 2
    for c in list_checkpoints(copy):
        assert f'(step {c.step}' in done.err and (c.val_loss is None or f'validation loss {c.val_loss:.3f}' in done.err)
    assert tree(copy.parent) == before


def test_already_complete(copy, call):
    before = tree(copy.parent)
    runs = [train('--resume', 'checkpoints/final_model.pt', cwd=copy.parent, program='run_experiment.py')]
    runs += [call('--resume', *what, cwd=copy.parent) for what in (['latest'], ['300'], ['final', '--extend-steps', '300'])]
    for done in runs:
        assert done.code == 0 and 'Training already complete at step 300 of 300' in done.out and '--extend-steps 600' in done.out
    assert 'run_experiment.py --resume trunk --extend-steps 600' in runs[0].out
    assert tree(copy.parent) == before


def test_the_line_to_copy_works_as_it_stands(copy, call):
    copy.rename(copy.with_name('my run'))
    done = call('--resume', 'latest', '--checkpoint-dir', 'my run', cwd=copy.parent)
    line = shlex.split(done.out.split('To go on: ')[1])
    assert line[0] == 'lmnb-train' and '600' in line
    assert call(*['310' if a == '600' else a for a in line[1:]], cwd=copy.parent).code == 0
    assert load_checkpoint(copy.with_name('my run')/'final_model.pt')['global_step'] == 310


def test_another_preset_at_resume(copy, short):
    done = train('--config', 'large', '--resume', 'checkpoints/checkpoint_step_250.pt', cwd=copy.parent, program='run_experiment.py')
    said = [line for line in done.out.splitlines() if '--config' in line]
    assert done.code == 0 and len(said) == 1 and 'ignored' in said[0] and 'n_layer 1, not 11' in said[0]
    assert same_end(copy, short.run)


def test_branch_touches_nothing_in_the_old_run(copy, short):
    before, b = tree(copy), copy.parent/'B'
    done = train('--resume', 'checkpoints/checkpoint_step_250.pt', '--checkpoint-dir', 'B', cwd=copy.parent)
    assert done.code == 0 and tree(copy) == before and same_end(b, short.run)
    assert {p.name for p in b.glob('*.pt')} == {f'checkpoint_step_{n}.pt' for n in (250, 300)} | {'best_model.pt', 'final_model.pt'}
    parent, line = load_checkpoint(copy/'final_model.pt')['lineage'][-1], load_checkpoint(b/'final_model.pt')['lineage']
    assert line[-1]['parent'] == parent['id'] and line[-1]['from_step'] == 250 and line[-1]['run_id'] != parent['run_id']
    assert len(rates(b)) == 300
    again = train('--resume', 'checkpoints/checkpoint_step_200.pt', '--checkpoint-dir', 'B', cwd=copy.parent)
    assert again.code == 2 and '--checkpoint-dir B --resume latest' in again.err


@pytest.mark.parametrize('start, total, fall', [(50, 120, 96), (200, 220, 200), (250, 270, 250)])
def test_shorten(copy, call, start, total, fall):
    "A whole cooldown where there is room, else down at once; never a jump, never a step at 0."
    args = ('--resume', f'checkpoints/checkpoint_step_{start}.pt', '--extend-steps', total)
    done = train(*args, cwd=copy.parent) if start == 50 else call(*args, cwd=copy.parent)
    assert done.code == 0 and f'going to {total} (shortened from 300' in done.out
    lr = rates(copy)
    down = lr[fall-1]*(1-np.arange(total-fall+1)/(total+1-fall))
    assert len(lr) == total and np.allclose(lr[fall-1:], down) and (start == 250 or np.allclose(lr[5:fall], lr[5]))
    assert load_checkpoint(copy/'final_model.pt')['global_step'] == total


def test_data_moved(copy, short, text, tmp_path):
    moved = shutil.copy(text, tmp_path/'moved.txt')
    fresh = dict(LMNB_CACHE=str(tmp_path/'fresh'))
    gone = train('--resume', '250', cwd=tmp_path, **fresh)
    assert gone.code == 2 and 'data not found: corpus.txt' in gone.err
    done = train('--resume', '250', '--data', moved, cwd=tmp_path, program='run_experiment.py', **fresh)
    assert done.code == 0 and 'exact.' in done.out and same_end(copy, short.run)


@pytest.mark.parametrize('how', ['other data', 'source changed', 'other tokenizer'])
def test_other_data_is_refused(copy, tmp_path, call, how):
    other = write_text(tmp_path/('corpus.txt' if how == 'source changed' else 'other.txt'), seed=1)
    prints = [load_checkpoint(copy/'final_model.pt')['data_state']['fingerprint'], fingerprint(documents(find_files(str(other))[0]))[0]]
    if how == 'other tokenizer':
        assert call('--data', other, '--checkpoint-dir', 'T', '--max-steps', 1, '--set', *SHORT[:-4], cwd=tmp_path).code == 0
        (tmp_path/'other.json').write_text(load_checkpoint(tmp_path/'T'/'final_model.pt')['data_state']['tokenizer'], encoding='utf-8')
    before, what = tree(tmp_path), {'other data': ['--data', 'other.txt'], 'other tokenizer': ['--tokenizer', 'other.json']}.get(how, [])
    env = {} if what else dict(LMNB_CACHE=str(tmp_path.parent/f'{tmp_path.name}-fresh'))
    done = train('--resume', '250', *what, cwd=tmp_path, program='run_experiment.py', **env) if how == 'other data' else call('--resume', '250', *what, cwd=tmp_path, **env)
    assert done.code == 2 and len(done.err.splitlines()) <= 2 and tree(tmp_path) == before
    if how == 'other tokenizer': return assert_tokenizers(done.err)
    assert all(p[:12] in done.err for p in prints) and str(other.name) in done.err and 'corpus.txt' in done.err
    assert call('--resume', '250', *what, '--allow-new-data', cwd=tmp_path).code == 0
    if what: assert load_checkpoint(copy/'final_model.pt')['lineage'][-1]['new_data'] == prints[1]


def assert_tokenizers(err): assert 'other.json (fingerprint ' in err and 'not the tokenizer of the checkpoint' in err


def test_changed_source_with_tokens_in_the_cache_goes_on(copy, short, call):
    write_text(copy.parent/'corpus.txt', seed=1)
    assert call('--resume', '250', cwd=copy.parent).code == 0
    assert same_end(copy, short.run)
