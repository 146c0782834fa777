"Every promise of the resume guide: what the user types, and what is then on the screen and on the disk."
import os
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import EVERY, ROOT, SHORT, TINY, command, events, guided, train, tree, write_text

from lmnb import list_checkpoints, load_checkpoint, load_history, preset
from lmnb.check import differences
from lmnb.data import documents, find_files, fingerprint
from lmnb.schedule import CLIMB_STEPS

NINE = {'model_state_dict', 'optimizer_state_dict', 'scheduler_state_dict', 'global_step', 'epoch', 'best_val_loss',
        'config', 'train_history', 'val_history'}


def rates(run):
    "The learning rate of every step that counts; no step is missing."
    h = load_history(run).train
    assert h['step'].tolist() == list(range(1, len(h['step'])+1))
    return h['lr']


def unlike(run, other):
    "Where the last checkpoints of two runs differ; where their data lie aside."
    return differences(*(load_checkpoint(r/'final_model.pt') for r in (run, other)), skip=('lineage', 'software', 'data_state'))


def same_end(run, other): return not unlike(run, other)


def test_first_command_makes_the_guides_files(guide):
    names = {'best_model.pt', 'final_model.pt', *(f'checkpoint_step_{n}.pt' for n in (500, 1000, 1500, 2000))}
    assert {p.name for p in guide.run.iterdir()} == names | {'trunk_model.pt', 'metrics.jsonl', 'run.json', '.lock'}
    assert load_checkpoint(guide.run/'final_model.pt')['global_step'] == 2000
    best, losses = load_checkpoint(guide.run/'best_model.pt'), {e['step']: e['loss'] for e in events(guide.run, 'val')}
    assert best['best_val_loss'] == best['val_loss'] == min(losses.values()) == losses[best['global_step']]
    sample, extend = guide.out.splitlines()[-2:]  # the next commands, to copy
    assert sample.startswith('Sample: lmnb-sample')
    assert 'run_experiment.py --resume trunk --extend-steps 4000' in extend


def test_resume_from_step_1000(guide, tmp_path):
    run, before = shutil.copytree(guide.run, tmp_path/'checkpoints'), tree(guide.run)
    done = guided('--resume', 'checkpoints/checkpoint_step_1000.pt', cwd=tmp_path)
    assert done.code == 0 and 'at step 1000, going to 2000: exact.' in done.out and same_end(run, guide.run)
    aside = tree(run/'superseded'/'1')  # what was beyond step 1000 is still there
    assert aside == {n: before[n] for n in aside} and {'checkpoint_step_1500.pt', 'final_model.pt'} <= set(aside)


@pytest.fixture(scope='module')
def killed(text, tmp_path_factory):
    "The short run, killed somewhere after its step 100."
    cwd = tmp_path_factory.mktemp('killed')
    shutil.copy(text, cwd)
    p = subprocess.Popen([*command('lmnb-train'), '--data', 'corpus.txt', '--quiet', '--set', *SHORT], cwd=cwd)
    run = cwd/'checkpoints'
    while not (run/'checkpoint_step_100.pt').exists(): assert p.poll() is None; time.sleep(.01)
    p.kill()
    p.wait()
    assert not (run/'final_model.pt').exists()
    return run


@pytest.mark.parametrize('what', ['latest', 'checkpoints/best_model.pt'])
def test_killed_run_goes_on(killed, short, tmp_path, what):
    run, (newest, good) = shutil.copytree(killed, tmp_path/'checkpoints'), list_checkpoints(killed)[:2]
    step = good.step if what == 'latest' else load_checkpoint(run/'best_model.pt')['global_step']
    if what == 'latest':
        for name in newest.names: os.truncate(run/name, newest.size//2)
    done = (train if what == 'latest' else guided)('--resume', what, cwd=tmp_path)
    assert done.code == 0 and f'at step {step}, going to 300: exact.' in done.out
    assert ('Passed over' in done.out) == (what == 'latest')
    assert same_end(run, short.run)  # weights, moments, rate, step, best loss, histories
    assert np.array_equal(rates(run), rates(short.run))


def test_extend_and_extend_again(copy):
    "As the guide's 2,000, 5,000 and 10,000 steps, scaled."
    peak = load_checkpoint(copy/'final_model.pt')['config'].lr
    for total, start in ((500, guided), (800, train)):
        step = load_checkpoint(copy/'best_model.pt')['global_step']
        done = start('--resume', 'checkpoints/best_model.pt', '--extend-steps', total, cwd=copy.parent)
        assert done.code == 0 and f'at step {step}, going to {total}' in done.out
        lr, end = rates(copy), load_checkpoint(copy/'final_model.pt')
        assert len(lr) == total and end['global_step'] == end['config'].max_steps == total
        assert np.abs(np.diff(lr[5:])).max() <= 1.01/CLIMB_STEPS*peak and lr.min() > 0  # no jump
        assert lr[int(total*.79)] == pytest.approx(peak) and lr[-1] < .02*peak  # the peak again, then a whole cooldown
        assert [r['step'] for r in end['train_history']] == list(range(1, total+1))
        evaluated = [r['step'] for r in end['val_history']]
        assert evaluated == load_history(copy).val['step'].tolist() == list(range(25, total+1, 25))


@pytest.mark.parametrize('name', ['small', 'medium', 'large', 'xlarge', 'rtx4090', None])
def test_presets(name, text, tmp_path, call):
    sets = dict(vocab_size=300, block_size=32, n_layer=1, n_embd=480, max_steps=1, eval_batches=1)
    args = (*(['--config', name] if name else []), '--data', text, '--set', *(f'{k}={v}' for k, v in sets.items()))
    assert (call if name else guided)(*args, cwd=tmp_path).code == 0
    config = load_checkpoint(tmp_path/'checkpoints'/'final_model.pt')['config']
    assert config == preset(name or 'medium', data=str(text), amp=config.amp, **sets)


def test_plain_torch_load_gives_the_nine_keys(short):
    code = ('from lmnb import load_checkpoint\nimport torch\nc = torch.load("checkpoints/best_model.pt")\n'
            'print(*c); print(type(c["config"]), c["config"].n_embd)')
    p = subprocess.run([sys.executable, '-c', code], cwd=short.cwd, capture_output=True, text=True, check=True)
    keys, config = p.stdout.splitlines()
    assert NINE <= set(keys.split()) and config == "<class 'lmnb.config.ExperimentConfig'> 16"
    sources = [*(ROOT/'lmnb').glob('*.py'), *(ROOT/'nbs').glob('*.ipynb'), ROOT/'README.md']
    assert not [p.name for p in sources if 'weights_only=False' in p.read_text(encoding='utf-8').replace(' ', '')]


def test_file_with_only_the_nine_keys_resumes(short, tmp_path, call):
    state = load_checkpoint(short.run/'checkpoint_step_250.pt')
    torch.save({k: state[k] for k in NINE}, tmp_path/'mine.pt')
    done = call('--resume', 'mine.pt', '--data', short.cwd/'corpus.txt', cwd=tmp_path)
    assert done.code == 0 and 'has no format_version' in done.out and 'not exact' in done.out
    assert 'could not be checked' in done.out
    assert not [d for d in unlike(tmp_path/'checkpoints', short.run) if d.startswith(('/model_state_dict', '/train_history'))]


def test_wrong_path(copy):
    before = tree(copy.parent)
    done = guided('--resume', 'checkpoints/best.pt', cwd=copy.parent)
    assert done.code == 2 and 'Checkpoint not found: checkpoints/best.pt' in done.err
    for c in list_checkpoints(copy):
        assert f'(step {c.step}' in done.err and (not c.val_loss or f'validation loss {c.val_loss:.3f}' in done.err)
    assert len(done.err.splitlines()) <= 2 and tree(copy.parent) == before


def test_already_complete(copy, call):
    before = tree(copy.parent)
    runs = [guided('--resume', 'checkpoints/final_model.pt', cwd=copy.parent)]
    runs += [call('--resume', *w, cwd=copy.parent) for w in (['latest'], ['300'], ['final', '--extend-steps', '300'])]
    for done in runs: assert done.code == 0 and 'Training already complete at step 300 of 300' in done.out
    assert 'run_experiment.py --resume trunk --extend-steps 600' in runs[0].out and tree(copy.parent) == before


def test_the_line_to_copy_works_as_it_stands(copy, call):
    copy.rename(copy.with_name('my run'))
    done = call('--resume', 'latest', '--checkpoint-dir', 'my run', cwd=copy.parent)
    program, *args = shlex.split(done.out.split('To go on: ')[1].replace('600', '301'))
    assert program == 'lmnb-train' and call(*args, cwd=copy.parent).code == 0
    assert load_checkpoint(copy.with_name('my run')/'final_model.pt')['global_step'] == 301


def test_another_preset_at_resume(copy, short):
    done = guided('--config', 'large', '--resume', 'checkpoints/checkpoint_step_250.pt', cwd=copy.parent)
    said, = [line for line in done.out.splitlines() if '--config' in line]
    assert done.code == 0 and 'ignored' in said and 'n_layer 1, not 11' in said and same_end(copy, short.run)


def test_branch_touches_nothing_in_the_old_run(copy, short, call):
    before, b = tree(copy), copy.parent/'B'
    done = train('--resume', 'checkpoints/checkpoint_step_250.pt', '--checkpoint-dir', 'B', cwd=copy.parent)
    assert done.code == 0 and tree(copy) == before and same_end(b, short.run) and len(rates(b)) == 300
    old, new = (load_checkpoint(r/'final_model.pt')['lineage'][-1] for r in (copy, b))
    assert new['parent'] == old['id'] and new['from_step'] == 250 and new['run_id'] != old['run_id']
    again = call('--resume', 'checkpoints/checkpoint_step_200.pt', '--checkpoint-dir', 'B', cwd=copy.parent)
    assert again.code == 2 and '--checkpoint-dir B --resume latest' in again.err


@pytest.mark.parametrize('start, total, fall', [(50, 120, 96), (200, 220, 200), (250, 270, 250)])
def test_shorten(copy, call, start, total, fall):
    "A whole cooldown where there is room, else down at once; never a jump, never a step at 0."
    done = (guided if start == 50 else call)('--resume', start, '--extend-steps', total, cwd=copy.parent)
    assert done.code == 0 and f'going to {total} (shortened from 300' in done.out
    lr = rates(copy)
    assert np.allclose(lr[fall-1:], lr[fall-1]*(1-np.arange(total-fall+1)/(total+1-fall)))
    assert len(lr) == total and (start == 250 or np.allclose(lr[5:fall], lr[5]))
    assert load_checkpoint(copy/'final_model.pt')['global_step'] == total


def test_data_moved(copy, short, text, tmp_path, call):
    moved, fresh = shutil.copy(text, tmp_path/'moved.txt'), dict(LMNB_CACHE=str(tmp_path/'fresh'))
    gone = call('--resume', '250', cwd=tmp_path, **fresh)
    assert gone.code == 2 and 'data not found: corpus.txt' in gone.err
    done = guided('--resume', '250', '--data', moved, cwd=tmp_path, **fresh)
    assert done.code == 0 and 'exact.' in done.out and same_end(copy, short.run)


@pytest.mark.parametrize('args', [['--data', 'other.txt'], []], ids=['other data', 'source changed'])
def test_other_data_is_refused(copy, short, tmp_path, call, args):
    other = write_text(tmp_path/(args or ['', 'corpus.txt'])[1], seed=1)
    prints = [load_checkpoint(copy/'final_model.pt')['data_state']['fingerprint'],
              fingerprint(documents(find_files(str(other))[0]))[0]]
    before, kept = tree(tmp_path), os.environ['LMNB_CACHE']
    fresh = dict(LMNB_CACHE=kept if args else f'{tmp_path}-fresh')
    done = (guided if args else call)('--resume', '250', *args, cwd=tmp_path, **fresh)
    assert done.code == 2 and len(done.err.splitlines()) <= 2 and tree(tmp_path) == before
    assert all(p[:12] in done.err for p in prints) and other.name in done.err and 'corpus.txt' in done.err
    if args:
        assert call('--resume', '250', *args, '--allow-new-data', cwd=tmp_path).code == 0
        assert load_checkpoint(copy/'final_model.pt')['lineage'][-1]['new_data'] == prints[1]
    else:  # with the tokens in the cache the source is not read
        assert call('--resume', '250', cwd=tmp_path, LMNB_CACHE=kept).code == 0 and same_end(copy, short.run)


def test_other_tokenizer_is_refused(copy, tmp_path, call):
    new = ('--data', write_text(tmp_path/'other.txt', seed=1), '--checkpoint-dir', 'T', '--max-steps', 1)
    assert call(*new, '--set', *TINY, *EVERY, cwd=tmp_path).code == 0
    words = [load_checkpoint(r/'final_model.pt')['data_state']['tokenizer'] for r in (tmp_path/'T', copy)]
    for name, w in zip(('other.json', 'same.json'), words): (tmp_path/name).write_text(w, encoding='utf-8')
    before = tree(tmp_path)
    done = call('--resume', '250', '--tokenizer', 'other.json', cwd=tmp_path)
    assert done.code == 2 and 'other.json (fingerprint' in done.err and 'tokenizer of the checkpoint (' in done.err
    assert tree(tmp_path) == before and call('--resume', '300', '--tokenizer', 'same.json', cwd=tmp_path).code == 0
