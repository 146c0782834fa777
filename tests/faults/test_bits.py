"Flipped bits and cut-off files: found and named, or without any effect; never read as something else."
import random
import shutil
import zipfile

import numpy as np
import pytest
from conftest import write_text
from exact import TINY

from lmnb import Trainer, load_checkpoint, preset
from lmnb.check import differences
from lmnb.checkpoint import CheckpointError, describe
from lmnb.data import cache_key, kept_tokenizer, load_corpus, open_tokens
from lmnb.history import read_events
from lmnb.trainer import TrainingFailed

HELD = 'found and named, or provably without effect'


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    return preset('small', **TINY | dict(data=str(write_text(tmp_path_factory.mktemp('text')/'text.txt', lines=4000)), max_steps=12))


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory): return Trainer(config, tmp_path_factory.mktemp('run')/'run', quiet=True).fit().run/'final_model.pt'


def regions(path):
    "Parts of a checkpoint, so that a small one is hit as often as a large one: headers, pickle, tensors, description, directory, end."
    data = path.read_bytes()
    with zipfile.ZipFile(path) as z: members, directory = z.infolist(), z.start_dir
    out = dict(end=range(len(data)-22, len(data)), directory=range(directory, len(data)-22))
    for m in members:
        name = 'tensor' if '/data/' in m.filename else m.filename.split('/')[-1]
        start = m.header_offset+30+int.from_bytes(data[m.header_offset+26:m.header_offset+28], 'little')+int.from_bytes(data[m.header_offset+28:m.header_offset+30], 'little')
        out.setdefault('header', []).extend(range(m.header_offset, start))
        out.setdefault(name, []).extend(range(start, start+m.file_size))
    return {k: v for k, v in out.items() if len(v)}


def damaged(path, data, told):
    "Whether a file with these bytes is refused; else it is read and described as if nothing were wrong."
    path.write_bytes(data)
    seen = describe(path)
    if seen.error is None:
        assert seen.step is None or all(getattr(seen, k) == getattr(told, k) for k in ('step', 'epoch', 'val_loss', 'best_val_loss', 'lineage', 'config', 'plan', 'wanted'))
    try: state = load_checkpoint(path, note=lambda _: None)
    except CheckpointError as e:
        assert str(path) in str(e) and '\n' not in str(e) and len(str(e)) < 600
        assert describe(path, check=True).error or 'cannot be read' in str(e) or seen.step is None, str(e)
        return True
    assert differences(state, damaged.state) == []
    return False


def test_flips_in_a_checkpoint(row, times, whole, tmp_path):
    row('flipped bits in a checkpoint', HELD)
    damaged.state, told, data = load_checkpoint(whole), describe(whole), whole.read_bytes()
    r, found, parts = random.Random(1), {}, regions(whole)
    assert {'header', 'data.pkl', 'tensor', 'lmnb.json', 'directory', 'end'} <= set(parts)
    n = times(20, 200)
    for part, places in parts.items():
        for at in r.choices(places, k=n):
            row.tried()
            bad = bytearray(data)
            bad[at] ^= 1 << r.randrange(8)
            found[part] = found.get(part, 0)+damaged(tmp_path/'flipped.pt', bad, told)
    assert found['data.pkl'] == found['tensor'] == found['lmnb.json'] == n, found


def test_every_bit_of_an_entry(row, whole, tmp_path):
    "The directory's entry of the largest tensor: one of its bits makes torch take the member for a folder, and read nothing into the tensor."
    row('flipped bits in a checkpoint', HELD)
    damaged.state, told, data = load_checkpoint(whole), describe(whole), whole.read_bytes()
    with zipfile.ZipFile(whole) as z: members, start = z.infolist(), z.start_dir
    for m in members[:-1]:
        end = data.index(b'PK\1\2', start+4)
        if m is max(members, key=lambda m: m.file_size): break
        start = end
    for bit in range(8*start, 8*end):
        row.tried()
        bad = bytearray(data)
        bad[bit//8] ^= 1 << bit % 8
        damaged(tmp_path/'flipped.pt', bad, told)


def test_a_cut_off_checkpoint(row, times, whole, tmp_path):
    row('truncated checkpoints', HELD)
    damaged.state, told, data = load_checkpoint(whole), describe(whole), whole.read_bytes()
    lengths = {0, 1, 2, 3, 4, 64, len(data)-1, len(data)-22, *np.linspace(5, len(data)-2, times(20, 192), dtype=int).tolist()}
    for n in sorted(lengths):
        row.tried()
        assert damaged(tmp_path/'cut.pt', data[:n], told)


@pytest.fixture
def cache(config, tmp_path, monkeypatch):
    "A cache of this test's own, filled; the folder of its tokens, and the ids."
    monkeypatch.setenv('LMNB_CACHE', str(tmp_path/'cache'))
    c = load_corpus(config, note=lambda _: None)
    folder = tmp_path/'cache'/cache_key(c.fingerprint, c.tokenizer)
    assert len(list(folder.glob('tokens.bin'))) == 1 and (folder/'tokens.bin').stat().st_size > 2*2**16
    return folder, np.concatenate([c.train, c.val]), c


def read_all(folder):
    "All ids, window by window, as training reads them; None if they are refused."
    if (ids := open_tokens(folder)) is None: return None
    try: return np.concatenate([ids[i:i+33] for i in range(0, len(ids), 33)])
    except ValueError as e:
        assert 'damaged: block' in str(e) and str(folder) in str(e) and open_tokens(folder) is None
        (folder/'damaged.json').rename(folder/'meta.json')


def test_flips_in_the_token_cache(row, times, cache):
    row('flipped bits in the token cache', HELD)
    folder, ids, corpus = cache
    r = random.Random(3)
    tokenizer, = folder.parent.glob('*.tokenizer')
    for path in (folder/'tokens.bin', folder/'tokens.crc', folder/'meta.json', tokenizer):
        data = path.read_bytes()
        for _ in range(times(25, 250)):
            row.tried()
            bad = bytearray(data)
            bad[r.randrange(len(bad))] ^= 1 << r.randrange(8)
            path.write_bytes(bad)
            if path == tokenizer: assert kept_tokenizer(path) in (None, corpus.tokenizer)
            else:
                found = read_all(folder)
                assert found is None or np.array_equal(found, ids)
                if path.name in ('tokens.bin', 'tokens.crc'): assert found is None
        path.write_bytes(data)
    assert np.array_equal(read_all(folder), ids) and kept_tokenizer(tokenizer) == corpus.tokenizer


def test_a_cut_off_token_cache(row, times, cache):
    row('truncated token caches', HELD)
    folder, ids, _ = cache
    for path in folder.iterdir():
        data = path.read_bytes()
        for n in {0, 1, len(data)-1, *np.linspace(2, len(data)-2, times(10, 67), dtype=int).tolist()}:
            row.tried()
            path.write_bytes(data[:n])
            assert read_all(folder) is None
        path.write_bytes(data)


@pytest.mark.parametrize('part', ['train', 'val', 'tokenizer'])
def test_a_run_meets_the_damage(row, config, cache, tmp_path, part):
    "Told at the step or evaluation that reads it; the next start makes the file anew, and a resume goes on in the straight run's bits."
    row('flipped bits in the token cache', HELD)
    row.tried()
    folder, _, corpus = cache
    straight = Trainer(config, tmp_path/'straight', quiet=True).fit().run
    t = Trainer(config, tmp_path/'run', quiet=True)
    t.fit(max_minutes=1e-9)
    if part == 'tokenizer':
        tokenizer, = folder.parent.glob('*.tokenizer')
        tokenizer.write_bytes(tokenizer.read_bytes()[:-40])
        assert load_corpus(config, note=lambda _: None).tokenizer == corpus.tokenizer == kept_tokenizer(tokenizer)
        return
    data = bytearray((folder/'tokens.bin').read_bytes())
    for at in (range(0, len(data)*9//10, 2**15) if part == 'train' else [len(data)-20]): data[at] ^= 1
    (folder/'tokens.bin').write_bytes(data)
    t, out = Trainer.resume('latest', tmp_path/'run', quiet=True), ('lineage', 'software')
    if part == 'train':
        with pytest.raises(TrainingFailed, match='does not match its checksum'): t.fit()
        assert open_tokens(folder) is None
        Trainer.resume('latest', tmp_path/'run', quiet=True).fit()
    else:  # an evaluation that fails costs no training
        t.fit()
        assert 'does not match its checksum' in [e['text'] for e in read_events(t.run/'metrics.jsonl')[0] if e['kind'] == 'warn'][0]
        out += ('val_loss', 'val_history', 'best_val_loss')
    assert differences(load_checkpoint(tmp_path/'run'/'final_model.pt'), load_checkpoint(straight/'final_model.pt'), out) == []


def test_the_text_is_gone(row, config, cache, tmp_path):
    "A damaged cache is then the last there is: named, and not deleted."
    row('flipped bits in the token cache', HELD)
    row.tried()
    folder, _, corpus = cache
    shutil.copy(config.data, tmp_path/'mine.txt')
    (folder/'tokens.crc').write_bytes(b'')
    with pytest.raises(FileNotFoundError): load_corpus(config, dict(corpus.state_dict(), source=str(tmp_path/'gone.txt')), note=lambda _: None)
    assert (folder/'tokens.bin').stat().st_size == 2*len(np.fromfile(folder/'tokens.bin', 'uint16'))
    again = load_corpus(config, corpus.state_dict(), source=str(tmp_path/'mine.txt'), note=lambda _: None)
    assert np.array_equal(again.train, corpus.train)
