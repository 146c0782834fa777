"A run resumed in a new process is the unbroken run, in every tensor and number that a checkpoint holds."
import pytest
import torch
from conftest import differences, train

from lmnb import load_checkpoint

TINY = ['vocab_size=300', 'block_size=32', 'n_layer=2', 'n_head=2', 'n_embd=32', 'dropout=0.1', 'warmup_steps=5', 'eval_batches=4',
        'eval_interval=10', 'save_interval=30', 'cooldown_frac=0.25', 'batch_size=3', 'micro_batch_size=2']


def run(text, *args):
    "One run of the command in a process of its own."
    done = train('--quiet', *args, cwd=text.parent)
    assert done.code == 0, done.err
    return done.out


def same(a, b): assert differences(load_checkpoint(a), load_checkpoint(b)) == []


@pytest.mark.parametrize('amp', ['off', 'bf16', 'fp16'])
def test_resumed_in_a_new_process(text, tmp_path, amp):
    start = ['--config', 'small', '--data', text, '--max-steps', 60, '--set', *TINY, f'amp={amp}']
    run(text, *start, '--checkpoint-dir', tmp_path/'straight')
    said = run(text, '--resume', tmp_path/'straight'/'checkpoint_step_30.pt', '--checkpoint-dir', tmp_path/'branch')
    assert 'exact' in said and 'not exact' not in said
    for name in ('final_model.pt', 'trunk_model.pt', 'checkpoint_step_60.pt'): same(tmp_path/'straight'/name, tmp_path/'branch'/name)


def test_trunk_extended_is_the_straight_run(text, tmp_path):
    start = ['--config', 'small', '--data', text, '--set', *TINY]
    run(text, *start, '--max-steps', 60, '--checkpoint-dir', tmp_path/'short')
    run(text, '--resume', 'trunk', '--extend-steps', 90, '--checkpoint-dir', tmp_path/'short')
    run(text, *start, '--max-steps', 90, '--checkpoint-dir', tmp_path/'long')
    same(tmp_path/'short'/'final_model.pt', tmp_path/'long'/'final_model.pt')


def test_the_harness_sees_one_bit():
    a = dict(w=torch.ones(3), h=[dict(step=1, loss=2.)])
    b = dict(w=torch.ones(3), h=[dict(step=1, loss=2.)])
    assert differences(a, b) == []
    b['w'].view(torch.int32)[1] ^= 1
    b['h'][0]['loss'] = 2.0000000000000004
    assert differences(a, b) == ['/w', '/h/0/loss: 2.0 against 2.0000000000000004']
