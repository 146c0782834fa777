"Troubles that people have with other trainers: each part is a kind of fault, with the forms in which it was reported."
import gzip
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EVERY, SHORT, TINY, command, events, guided, train, tree

from lmnb import Trainer, list_checkpoints, load_checkpoint, preset, sample
from lmnb.check import differences
from lmnb.config import parse_settings
from lmnb.data import as_tokenizer, encode, eot_id, load_corpus, train_tokenizer
from lmnb.history import Console, keep_record
from lmnb.model import stream_text


def corpus(source, vocab_size=300, note=lambda _: None, **kw):
    return load_corpus(preset('small', data=str(source), vocab_size=vocab_size, block_size=4, **kw), note=note)


def ids(c): return np.concatenate([c.train, c.val]).tolist()
def decoded(c): return as_tokenizer(c.tokenizer).decode(ids(c))


# Started again in the same folder

def test_new_run_sets_aside_every_file(copy, text, call):
    for name in ('notes.txt', 'train.log'): (copy/name).write_text(name)
    before, again = tree(copy), ('--new-run', '--data', text, '--max-steps', '2', '--set', *TINY, *EVERY)
    assert call(*again, cwd=copy.parent).code == 0
    aside = tree(copy/'superseded'/'1')
    assert aside == {n: before[n] for n in before if n != 'notes.txt'} and (copy/'notes.txt').exists()
    assert {c.step for c in list_checkpoints(copy)} == {2} and events(copy, 'train')[0]['step'] == 1
    assert call(*again, cwd=copy.parent).code == 0
    assert tree(copy/'superseded'/'1') == aside and (copy/'superseded'/'2'/'final_model.pt').exists()
    mixed = call('--resume', 'checkpoints/superseded/1/final_model.pt', cwd=copy.parent)
    assert mixed.code == 2 and '--checkpoint-dir NEW' in mixed.err


def test_one_writer_who_ends_when_asked(text, tmp_path, call):
    "A second process is told who writes; SIGTERM saves, ends with 143 and says how to go on."
    shutil.copy(text, tmp_path)
    args = ('--data', 'corpus.txt', '--set', *SHORT, 'max_steps=9000')
    p = subprocess.Popen([*command('lmnb-train'), *args], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    run = tmp_path/'checkpoints'
    while not (run/'checkpoint_step_50.pt').exists(): assert p.poll() is None; time.sleep(.01)
    second = call('--resume', 'latest', cwd=tmp_path)
    p.send_signal(signal.SIGTERM)
    out, latest = p.communicate(timeout=60)[0], list_checkpoints(run)[0]
    assert second.code == 2 and f'another process trains in checkpoints: pid {p.pid}' in second.err
    assert p.returncode == 143 and f'Stopped at step {latest.step} of 9000 (SIGTERM)' in out and '--resume' in out
    assert [e['step'] for e in events(run, 'stop')] == [latest.step] == [events(run, 'save')[-1]['step']]
    only_plain(latest.path)


# The disk fills

def test_room_for_tokens_and_checkpoints_is_told_before_the_first_step(text, tmp_path, monkeypatch, capsys):
    "Each on the file system where it goes; on one and the same, the checkpoints must fit beside the tokens."
    disks = {}
    def usage(path):
        disk = next((d for d in disks if Path(path).is_relative_to(d)), None)
        return SimpleNamespace(free=much) if disk is None else SimpleNamespace(free=disks[disk]-sum(p.stat().st_size for p in disk.rglob('*') if p.is_file()))
    monkeypatch.setattr(shutil, 'disk_usage', usage)
    config = preset('small', **parse_settings([*TINY, 'max_steps=2', 'save_interval=1', 'n_embd=64']), data=str(text))
    def told(name, cache, run=None):
        "Whether too little room for tokens, and for checkpoints, is told, with so many bytes free; `run` None: on the same disk."
        tokens, home = tmp_path/name/'cache', tmp_path/name/('cache' if run is None else 'runs')
        for disk, size in {home: run, tokens: cache}.items(): disk.mkdir(parents=True, exist_ok=True); disks[disk] = size
        monkeypatch.setenv('LMNB_CACHE', str(tokens/'tokens'))
        capsys.readouterr()
        Trainer(config, home/'run', quiet=True).fit(max_minutes=0)
        kinds = [(e['kind'], e.get('code')) for e in map(json.loads, (home/'run'/'metrics.jsonl').read_text().splitlines())]
        early, out = ('warn', 'disk') in kinds[:kinds.index(('train', None))], capsys.readouterr().out
        assert early == (f'{home/"run"}: ' in out and 'see keep_last' in out)
        return f'{tokens/"tokens"} has' in out and 'LMNB_CACHE names a folder' in out, early
    much, tokens = 10**9, text.stat().st_size
    need = 6*Trainer(config, tmp_path/'a', quiet=True).engine.n_bytes()  # steps 1 and 2, best, trunk, and room to write
    assert need > 2*tokens
    assert told('both', much, much) == (False, False)
    assert told('small cache', tokens//2, much) == (True, False)
    assert told('small disk', much, need//2) == (False, True)
    assert told('one', need+2*tokens) == (False, False)
    assert told('one, small', need+tokens//10) == (False, True)  # enough for either


def test_half_a_token_file_is_nobody_s(tmp_path, monkeypatch):
    "A disk that fills leaves nothing of it; what a kill left is removed, and taken for a whole one by none."
    (tmp_path/'a.txt').write_text('some words and more of them\n'*400)
    monkeypatch.setenv('LMNB_CACHE', str(tmp_path/'cache'))
    def fill(pieces, tok, out, dtype):
        out.write(bytes(100))
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m, pytest.raises(OSError, match='No space'):
        m.setattr('lmnb.data.encode', fill)
        corpus(tmp_path/'a.txt')
    kept = {p.name for p in (tmp_path/'cache').iterdir()}
    assert not [n for n in kept if not n.endswith(('.tokenizer', '.lock'))], kept
    key, = (n.removesuffix('.lock') for n in kept if n.endswith('.lock'))
    for folder in (f'{key}.part', key):  # as a kill leaves the first, and a kill amid the renaming of files could leave the second
        (tmp_path/'cache'/folder).mkdir()
        (tmp_path/'cache'/folder/'tokens.bin').write_bytes(bytes(100))
    assert decoded(corpus(tmp_path/'a.txt')) == (tmp_path/'a.txt').read_text()
    assert {p.name for p in (tmp_path/'cache').iterdir()} == kept | {key}


# "Keep the last -1, 0 or 1" deleted everything

@pytest.mark.parametrize('keep', [-1, 0, 1, 2])
def test_keep_last(keep, text, tmp_path, call):
    sets = [*TINY, 'max_steps=50', 'save_interval=5', 'eval_interval=5']
    done = call('--data', text, '--keep-last', keep, '--set', *sets, cwd=tmp_path)
    if keep in (-1, 1):
        assert done.code == 2 and f'keep_last={keep}' in done.err and not list(tmp_path.iterdir())
        return
    names = {p.name for p in (tmp_path/'checkpoints').glob('*.pt')}
    periodic = {int(n[16:-3]) for n in names if n.startswith('checkpoint_step')}
    assert {'best_model.pt', 'trunk_model.pt', 'final_model.pt'} <= names
    assert periodic == set(range(5, 51, 5)) if keep == 0 else {45, 50} <= periodic and len(periodic) <= 4
    for n in names: load_checkpoint(tmp_path/'checkpoints'/n)


def test_help_says_what_zero_keeps(tmp_path):
    done = guided('--help', cwd=tmp_path)
    assert done.code == 0 and '2 or more; 0: all' in ' '.join(done.out.split()) and 'run_experiment.py' in done.out


# Own files refused by safe loading

def only_plain(path):
    "Ask torch itself which classes and functions the file needs."
    known = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try: assert set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) <= {'lmnb.config.ExperimentConfig'}
    finally: torch.serialization.add_safe_globals(known)
    state = load_checkpoint(path, note=pytest.fail)
    assert all(t.isfinite().all() for t in state['model_state_dict'].values())


def test_files_hold_plain_types_only(guide, copy, text, tmp_path, call):
    "Also after an extension, after a stop, and after ten losses that are no numbers."
    assert call('--resume', 'latest', '--extend-steps', '320', cwd=tmp_path).code == 0
    assert call('--resume', 'trunk', '--extend-steps', '900', '--max-minutes', '1e-6', cwd=tmp_path).code == 0
    sets = [*TINY, 'lr=1e30', 'save_interval=2', 'eval_interval=2', 'warmup_steps=0']
    done = call('--data', text, '--checkpoint-dir', 'nan', '--set', *sets, cwd=tmp_path)
    assert done.code == 1 and 'not finite' in done.err and len(done.err.splitlines()) <= 2
    assert [e['code'] for e in events(tmp_path/'nan', 'warn')] == ['skip']*10
    files = [p for run in (guide.run, tmp_path) for p in run.rglob('*.pt')]
    assert {'checkpoint_auto.pt', 'checkpoint_step_320.pt', 'checkpoint_step_2.pt'} <= {p.name for p in files}
    for p in files: only_plain(p)


# Ids beyond 65,535, and special tokens' names inside the text

@pytest.mark.parametrize('n, dtype', [(65_536, 'uint16'), (65_537, 'uint32'), (70_000, 'uint32')])
def test_ids_do_not_wrap_round(n, dtype, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    tok, numbers = Tokenizer(models.WordLevel({f'w{i}': i for i in range(n)}, unk_token='w0')), [1, 65_535, n-1]*20
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.save(str(tmp_path/'t.json'))
    (tmp_path/'a.txt').write_text(' '.join(f'w{i}' for i in numbers))
    c = corpus(tmp_path/'a.txt', vocab_size=n, tokenizer=str(tmp_path/'t.json'), val_fraction=.2)
    assert ids(c) == numbers and c.train.dtype == dtype
    with pytest.raises(ValueError, match=f'{n} ids, vocab_size={n-1}; set vocab_size={n}'):
        corpus(tmp_path/'a.txt', vocab_size=n-1, tokenizer=str(tmp_path/'t.json'))


def test_ids_are_checked_as_they_are_written():
    tok = as_tokenizer(train_tokenizer(['some plain text'], 15, 300))
    with pytest.raises(ValueError, match='id .* does not fit uint8'): encode(['a text with a word or two'*9], tok, io.BytesIO(), np.dtype('uint8'))


def test_special_names_in_a_text_are_text(tmp_path):
    texts = ['a <|endoftext|> b <|im_end|> </s>\n'*30, '<|endoftext|>'*40]
    for i, t in enumerate(texts): (tmp_path/f'{i}.txt').write_text(t)
    c = corpus(tmp_path)
    assert decoded(c) == ''.join(texts) and ids(c).count(eot_id(as_tokenizer(c.tokenizer))) == 1  # between the files


# One line without an end, a script without blanks

def test_no_word_is_long_so_no_line_is_dear():
    tok = as_tokenizer(train_tokenizer(['some plain text'], 15, 300))
    for text in ('a'*400_000, ' '*400_000, '日本語'*100_000, '🙂'*50_000, '0123456789'*20_000, 'no blanks,just_this'*9_000):
        words = [w for w, _ in tok.pre_tokenizer.pre_tokenize_str(text)]
        assert max(map(len, words)) <= 4*64 and len(words) > 1000  # bytes: merging costs by the word


def test_cuts_change_no_character(tmp_path):
    text = 'ab é 日本 🙂'*150_000  # 1.65 million characters on a line
    (tmp_path/'line.txt').write_text(text, encoding='utf-8')
    assert decoded(corpus(tmp_path/'line.txt')) == text


# .jsonl, .csv, .gz, .parquet

def test_columns_and_compressed_files(tmp_path):
    texts = [f'text {i}, "quoted"\nand é' for i in range(60)]
    (tmp_path/'a.jsonl').write_text('\n'.join(json.dumps(dict(text=t, n=1)) for t in texts))
    rows = ['1,"{}"\n'.format(t.replace('"', '""')) for t in texts]
    (tmp_path/'a.csv').write_text('n,text\n'+''.join(rows), encoding='utf-8')
    for n in ('a.jsonl', 'a.csv'): (tmp_path/f'{n}.gz').write_bytes(gzip.compress((tmp_path/n).read_bytes()))
    said = {n: [] for n in ('a.jsonl', 'a.csv', 'a.jsonl.gz')}
    raw = {n: corpus(tmp_path/n, note=said[n].append).fingerprint for n in said}
    assert all('as it stands' in s[0] and f'{n}:COLUMN' in s[0] for n, s in said.items())
    assert raw['a.jsonl'] == raw['a.jsonl.gz'] != raw['a.csv']
    columns = [corpus(f'{tmp_path/n}:text') for n in ('a.jsonl', 'a.csv', 'a.jsonl.gz', 'a.csv.gz')]
    assert len({c.fingerprint for c in columns}) == 1 and decoded(columns[0]) == ''.join(texts)


@pytest.mark.parametrize('name, content, column, word', [
    ('a.parquet', b'PAR1', '', 'cannot be read'), ('a.zip', b'PK\3\4', '', 'unpack'), ('a.txt', b'PK\3\4\0\0'*99, '', 'binary'),
    ('a.gz', b'no gzip', '', '.gz'), ('a.csv', b'a,b\n1,2\n', ':c', 'it has a, b'),
    ('a.jsonl', b'{"a": 1}\n', ':b', 'it has a'), ('a.jsonl', b'{"a": 1}\n{"a": \n', ':a', 'row 2'),
    ('a.csv', 'a\ndéjà\n'.encode('latin-1'), ':a', 'UTF-8'),
    ('a.txt', b'abc', ':a', 'column')])
def test_refused_files_are_named(name, content, column, word, tmp_path):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError) as e: corpus(f'{tmp_path/name}{column}')
    assert name in str(e.value) and word in str(e.value)


def test_other_encodings_are_read_with_a_notice(tmp_path):
    said, prints = [], set()
    for codec in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-32'):
        (tmp_path/f'{codec}.txt').write_bytes(('naïve 日本 🙂\n'*99).encode(codec))
        prints.add(corpus(tmp_path/f'{codec}.txt', note=said.append).fingerprint)
    assert len(prints) == 1 and any('utf-16.txt' in s and 'utf-16-le' in s.lower() for s in said)


# Sampling

def test_sampling(short, call):
    def write(*args, **kw): return sample(short.run, *args, **kw)
    greedy = write('def ', max_tokens=40, temperature=0, seed=1)
    assert greedy == write('def ', max_tokens=40, temperature=0, seed=2) and len(greedy) > 20 and greedy[:4] == 'def '
    assert write('x', top_k=10**6, seed=3) == write('x', top_k=0, seed=3) != write('x', top_k=0, seed=4)
    assert write('', max_tokens=100)  # more than block_size
    prompt = 'def word '*30
    done = train('checkpoints', '--prompt', prompt, '--max-tokens', 50, cwd=short.cwd, program='lmnb-sample')
    assert done.code == 0 and done.out.startswith(prompt) and len(done.out) > len(prompt)+20
    assert 'prompt' in done.err and len(done.err.splitlines()) == 1
    for flag, value in (('--temperature', -1), ('--temperature', 'nan'), ('--top-k', -1), ('--max-tokens', -5)):
        bad = call('checkpoints', flag, value, cwd=short.cwd, program='sample')
        assert bad.code == 2 and len(bad.err.splitlines()) == 1 and flag[2:5] in bad.err and not bad.out


@pytest.mark.parametrize('temperature', [1e-40, 1e300])
def test_extreme_temperatures(temperature, short):
    text = sample(short.run, 'x', max_tokens=20, temperature=temperature)
    assert temperature > 1 or text == sample(short.run, 'x', max_tokens=20, temperature=0)


@pytest.mark.parametrize('vocab_size', [257, 400])
def test_streamed_text_is_the_decoded_text(vocab_size):
    text = 'naïve 日本語の文 🙂👩‍👩‍👧 end. '*20
    tok = as_tokenizer(train_tokenizer([text], len(text.encode()), vocab_size))
    pieces = list(stream_text(tok.encode(text, add_special_tokens=False).ids, tok))
    assert ''.join(pieces) == text and len(pieces) > 100 and not any('\ufffd' in p for p in pieces)
    for seed in range(20):  # bytes that are no characters, too
        noise = random.Random(seed).choices(range(tok.get_vocab_size()), k=300)
        assert ''.join(stream_text(noise, tok)) == tok.decode(noise)


# A folder where a file was wanted; "~"

def test_folders_and_home(short, tmp_path, call):
    home, here = tmp_path/'home', tmp_path/'here'
    here.mkdir()
    shutil.copytree(short.run, home/'run')
    shutil.copy(short.cwd/'corpus.txt', home)
    for args in ([home/'run'], ['~/run'], ['best', '--checkpoint-dir', '~/run']):
        assert 'complete at step 300' in call('--resume', *args, cwd=here, HOME=home, USERPROFILE=home).out
    a, b = (call(p, '--max-tokens', 9, cwd=here, program='sample') for p in ('~/run', home/'run'/'final_model.pt'))
    assert a.code == 0 and a.out == b.out and 'final_model.pt' in call('~', cwd=here, program='runs').out
    tokenizer = load_checkpoint('~/run/final_model.pt')['data_state']['tokenizer']
    (home/'t.json').write_text(tokenizer, encoding='utf-8')
    new = ('--data', '~/corpus.txt', '--tokenizer', '~/t.json', '--checkpoint-dir', '~/new', '--max-steps', 1)
    assert call(*new, '--set', *TINY, cwd=here).code == 0 and (home/'new'/'final_model.pt').exists()
    empty = call('--resume', '.', cwd=here)
    assert empty.code == 2 and 'Checkpoint not found' in empty.err and not list(here.iterdir())


# Overrides in slightly other forms

@pytest.mark.parametrize('pair, value', [
    ('lr=1', 1.), ('lr=1e-3', .001), ('dropout=0', 0.), ('compile=False', False), ('compile=true', True),
    ('betas=0.9,0.95', (.9, .95)), ('betas=(0.9, 0.95)', (.9, .95)), ('max_steps=1e3', 1000), ('n_layer= 2', 2),
    ('seed=123456789012', 123456789012), ('data=a=b.txt', 'a=b.txt')])
def test_overrides_have_the_fields_type(pair, value):
    got = getattr(preset('small', **parse_settings([pair])), pair.split('=')[0])
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('pair', ['lr=abc', 'lr=', 'lr=inf', 'dropout=two', 'compile=maybe', 'betas=0.9', 'betas=0.9,x',
                                  'max_steps=1.5', 'max_steps=1e400', 'n_layer=True', 'seed=9e18'])
def test_overrides_that_cannot_be_are_named(pair):
    with pytest.raises(ValueError) as e: preset('small', **parse_settings([pair]))
    name, _, value = pair.partition('=')
    assert name in str(e.value) and 'must be' in str(e.value) and '\n' not in str(e.value)
    assert value in str(e.value) or str(int(float(value))) in str(e.value)


def test_the_last_override_wins(text, tmp_path, call):
    sets = ('--set', *TINY, 'seed=1', '--set', 'seed=2', 'lr=1e-2', 'lr=3e-3', '--max-steps', '1e0')
    assert call('--data', text, *sets, cwd=tmp_path).code == 0
    config = load_checkpoint(tmp_path/'checkpoints'/'final_model.pt')['config']
    assert (config.seed, config.lr, config.max_steps) == (2, .003, 1)


# Time left after a resume was far too small

def test_time_left_counts_this_session(copy, call, capsys, monkeypatch):
    clock, show = [1000.], Console()
    with monkeypatch.context() as m:
        m.setattr('lmnb.history.time.monotonic', lambda: clock[0])
        show(dict(kind='resume', step=900_000, max_steps=1_000_000))
        assert 'left' not in capsys.readouterr().out  # unknown before the first step
        for k in range(900_001, 900_011):
            clock[0] += 3
            show(dict(kind='train', step=k, loss=1., lr=1e-3, tok_per_s=1., grad_norm=1.))
        assert '3 d 11 h left' in capsys.readouterr().out.splitlines()[-1]  # 99,990 steps of 3 s
    began = time.time()
    assert call('--resume', '250', cwd=copy.parent).code == 0
    told = [e for e in events(copy, 'train') if e['time'] >= began]
    assert told[0]['step'] == 251 and sum(e['dt_ms'] for e in told) < 1e3*(time.time()-began)
    assert all(e['tok_per_s']*e['dt_ms'] == pytest.approx(64_000) for e in told)  # 64 tokens a step


# Resumed, and part of the state was silently new

@pytest.mark.parametrize('amp', ['off', 'fp16'])
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_all_that_the_file_holds_is_in_the_running_objects(text, tmp_path, monkeypatch, amp, optimizer):
    "Also right after an update that fp16 skipped."
    monkeypatch.setattr(torch.amp, 'GradScaler', partial(torch.amp.GradScaler, init_scale=2.**40))
    config = preset('small', **parse_settings([*TINY, *EVERY, 'max_steps=20']), data=str(text), amp=amp, optimizer=optimizer)
    Trainer(config, tmp_path/'run', quiet=True).fit(max_minutes=0)
    assert len(events(tmp_path/'run', 'warn')) == (amp == 'fp16')
    saved = load_checkpoint(tmp_path/'run'/'checkpoint_auto.pt')
    live = Trainer.resume('latest', tmp_path/'run', quiet=True).state_dict()
    assert differences(live | dict(model_state_dict=dict(live['model_state_dict'])), saved, skip=('lineage',)) == []


@pytest.mark.parametrize('damage, told', [
    (lambda o: next(iter(o['state'].values())).popitem(), 'lacks'),
    (lambda o: o['state'].popitem(), 'lacks'),
    (lambda o: next(iter(o['state'].values())).update(more=torch.zeros(1)), 'unknown'),
    (lambda o: o['state'].update(more={}), 'unknown'),
    (lambda o: o['param_groups'][0].pop('lr'), 'lacks'),
], ids=['a moment', 'a parameter', 'one moment more', 'one parameter more', 'a setting'])
def test_a_missing_or_left_over_key_is_an_error(copy, damage, told):
    state = load_checkpoint(copy/'final_model.pt')
    damage(state['optimizer_state_dict'])
    torch.save(state, copy/'checkpoint_step_300.pt')
    with pytest.raises(ValueError, match=told): Trainer.resume(copy/'checkpoint_step_300.pt', extend_steps=400)


# The session ends after fixed hours

def test_pieces_of_a_session_are_the_straight_run(text, tmp_path):
    "The one line of a job script, until it has nothing left to do; each ends with 0 and the line to copy."
    args = ('--quiet', '--resume', 'latest-or-new', '--config', 'small', '--data', text, '--max-steps', 8, '--set', *TINY, 'dropout=0.1')
    said = [train(*args, '--checkpoint-dir', 'pieces', '--max-minutes', '1e-6', cwd=tmp_path) for _ in range(9)]
    assert [d.code for d in said] == [0]*9 and all('--resume latest --checkpoint-dir pieces' in d.out for d in said[:7])
    assert 'already complete' in said[8].out
    assert train(*args, '--checkpoint-dir', 'straight', cwd=tmp_path).code == 0
    a, b = (load_checkpoint(tmp_path/run/'final_model.pt') for run in ('pieces', 'straight'))
    assert differences(a, b, ('lineage', 'software')) == []


# Fits in memory from scratch, not after a resume

PEAK = r'''
import re, sys
from pathlib import Path
from lmnb import ExperimentConfig, Trainer
config = eval(sys.argv[1])
t = Trainer.resume(sys.argv[3], sys.argv[2], quiet=True) if sys.argv[3:] else Trainer(config, sys.argv[2], quiet=True)
t.fit()
print(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])
'''


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='peak memory is read from /proc')
def test_a_resume_takes_no_more_memory(text, tmp_path):
    config = preset('small', data=str(text), n_embd=256, n_head=4, n_kv_head=4, n_layer=6, block_size=32, max_steps=4, save_interval=2,
                    eval_interval=4, eval_batches=1)
    def peak(*args):
        done = subprocess.run([sys.executable, '-c', PEAK, repr(config), *args], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])*1024
    fresh, size = peak('run'), (tmp_path/'run'/'checkpoint_step_2.pt').stat().st_size
    resumed = min(peak(f'branch{i}', 'run/checkpoint_step_2.pt') for i in range(2))  # allocators differ by chance
    assert size > 60e6 and resumed < fresh+size/4, (fresh, resumed, size)


# The same data gave another vocabulary on another day

def test_the_tokens_come_with_the_checkpoint(text, tmp_path):
    "Without the cache, with other hash seeds and more threads in the tokenizer: the same tokens, so the same run."
    shutil.copy(text, tmp_path)
    args = ('--quiet', '--config', 'small', '--data', 'corpus.txt', '--max-steps', 20, '--set', *TINY, 'save_interval=10')
    assert train(*args, cwd=tmp_path, LMNB_CACHE=tmp_path/'one', PYTHONHASHSEED='1', RAYON_NUM_THREADS='1').code == 0
    done = train('--resume', 'checkpoints/checkpoint_step_10.pt', '--checkpoint-dir', 'b', cwd=tmp_path, LMNB_CACHE=tmp_path/'two',
                 PYTHONHASHSEED='2', RAYON_NUM_THREADS='4')
    assert done.code == 0 and ': exact.' in done.out and 'Training a tokenizer' not in done.out and 'Encoding' in done.out
    a, b = (load_checkpoint(tmp_path/run/'final_model.pt') for run in ('checkpoints', 'b'))
    assert differences(a, b, ('lineage', 'software')) == []


# A program started from a notebook died on the notebook's own plot back end

ALL = r'''
import sys
from lmnb import cli
for name, *args in ('train', '--quiet', '--set', *sys.argv[1:]), ('sample', 'checkpoints'), ('runs', '.'):
    try: getattr(cli, name)(args)
    except SystemExit as e: print('END', name, e.code)
assert 'matplotlib' not in sys.modules
'''


def test_a_plot_back_end_that_is_not_there(text, tmp_path):
    "Every command as a notebook's `!` starts it, with its kernel's variables: none so much as imports matplotlib."
    for name in ('nowhere', 'module://not.installed'):
        args = [*TINY, f'data={text}', 'max_steps=4', 'save_interval=2', 'eval_interval=2']
        done = subprocess.run([sys.executable, '-c', ALL, *args], cwd=tmp_path, env=dict(os.environ, MPLBACKEND=name), capture_output=True, text=True)
        ends = [l.split()[1:] for l in done.stdout.splitlines() if l.startswith('END')]
        assert done.returncode == 0 and ends == [[n, '0'] for n in ('train', 'sample', 'runs')], done
        shutil.rmtree(tmp_path/'checkpoints')


# Saving slowed with the run's length

def test_a_history_is_bounded(short):
    "A million steps leave as much in a checkpoint as two thousand do."
    def bytes_after(n):
        history = []
        for k in range(1, n+1): keep_record(history, dict(step=k, loss=1., lr=1e-3, grad_norm=.5), 1)
        return len(pickle.dumps(history)), history
    (few, _), (many, history) = bytes_after(2000), bytes_after(10**6)
    assert many < 1.2*few and len(history) <= 2000 and history[0]['step'] == 512 and history[-1]['step'] == 10**6//512*512


def test_a_save_costs_the_same_after_a_million_steps(text, tmp_path, monkeypatch):
    "Bytes of the file, tensors copied, and memory taken for it; histories as runs of those lengths leave them, at the default intervals."
    config = preset('small', data=str(text), vocab_size=300, block_size=32, max_steps=10**7)
    t, copied = Trainer(config, tmp_path, quiet=True), []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, '_foreach_copy_', lambda dst, src: copied.append((len(src), sum(s.nbytes for s in src))) or copy(dst, src))
    def cost(step):
        t.step, t.train_history, t.val_history = step, [], []
        for k in range(10, step+1, 10): keep_record(t.train_history, dict(step=k, loss=1/k, lr=1e-3, grad_norm=.1+1/k), config.log_interval)
        for k in range(100, step+1, 100): keep_record(t.val_history, dict(step=k, loss=1/k), config.eval_interval)
        buffers = []
        for _ in range(2):  # the second save finds the buffers of the first
            tracemalloc.start()
            t.writer.save(t.state_dict(), [f'checkpoint_step_{step}.pt'])
            taken = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            t.writer.wait()
            buffers.append([b.data_ptr() for b in t.writer.kept.values()])
        assert buffers[0] == buffers[1]
        written = t.writer.results.get(), t.writer.results.get()
        return written[1]['bytes'], copied[-1], taken
    (few, copies, little), (many, again, much), (most, *_) = (cost(n) for n in (1000, 10**6, 10**7))
    assert few > 5e6 and copies == again and many < few+2*2000*100 and most < many*1.01
    assert much < little+2*2000*500  # at most 2,000 records of each history, small dicts both
