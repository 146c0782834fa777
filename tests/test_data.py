"Data larger than memory stream; the same contents are the same tokens."
import gzip
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from lmnb.config import preset
from lmnb.data import documents, find_files, load_corpus, read_blocks

PEAK = r'''
import re, sys
from pathlib import Path
from lmnb.data import documents, find_files, fingerprint, token_file
files, _ = find_files(sys.argv[1])
contents, size = fingerprint(documents(files))
tokenizer = Path(sys.argv[2]).read_text()
ids = token_file(Path(sys.argv[3]), contents, tokenizer, lambda: documents(files))
print(size, len(ids), re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])
'''


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv('LMNB_CACHE', str(tmp_path/'cache'))
    return preset('small', vocab_size=400, block_size=16)


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='peak memory is read from /proc')
@pytest.mark.parametrize('end, slack', [('\n', 15), (' ', 40)], ids=['lines', 'one_line'])  # MiB; pieces of one line are ten times larger
def test_memory_does_not_grow_with_the_corpus(tmp_path, config, end, slack):
    line = ' '.join(f'word{i%977} is {i*i%1009}' for i in range(200))+end
    (tmp_path/'seed.txt').write_text(line*50)
    corpus = load_corpus(preset('small', vocab_size=400, block_size=16, data=str(tmp_path/'seed.txt')), note=lambda _: None)
    (tmp_path/'tok.json').write_text(corpus.tokenizer)
    peaks = []
    for n in (8, 24):  # million characters
        (tmp_path/f'{n}.txt').write_text(line*(n*10**6//len(line)))
        out = subprocess.run([sys.executable, '-c', PEAK, tmp_path/f'{n}.txt', tmp_path/'tok.json', tmp_path/'peak'], capture_output=True, text=True,
                             env=dict(os.environ, RAYON_NUM_THREADS='1'))
        assert out.returncode == 0, out.stderr
        peaks.append(int(out.stdout.split()[2])/1024)
    assert peaks[1]-peaks[0] < slack, peaks  # the corpus grew by 16 MB, its ids as Python objects by far more


def test_the_cache_changes_nothing(tmp_path, config):
    (tmp_path/'d').mkdir()
    for name in ('b', 'a'): (tmp_path/'d'/f'{name}.txt').write_text(f'{name} '*900)
    with gzip.open(tmp_path/'d'/'c.gz', 'wt') as f: f.write('zipped '*500)
    here = preset('small', vocab_size=400, block_size=16, data=str(tmp_path/'d'))
    first = load_corpus(here, note=lambda _: None)
    ids = np.array(first.train)
    for p in (tmp_path/'cache').iterdir():
        if p.is_dir(): [f.unlink() for f in p.iterdir()]; p.rmdir()
    again = load_corpus(here, first.state_dict(), note=lambda _: None)
    assert np.array_equal(ids, again.train) and [n for n, _ in find_files(str(tmp_path/'d'))[0]] == ['a.txt', 'b.txt', 'c.gz']


def test_half_a_token_file_is_never_taken_for_a_whole_one(tmp_path, config):
    (tmp_path/'t.txt').write_text('some words '*900)
    here = preset('small', vocab_size=400, block_size=16, data=str(tmp_path/'t.txt'))
    whole = np.array(load_corpus(here, note=lambda _: None).train)
    file, = (tmp_path/'cache').glob('*/tokens.bin')
    file.write_bytes(file.read_bytes()[:-100])
    assert np.array_equal(load_corpus(here, note=lambda _: None).train, whole)


def test_rows_of_another_encoding_are_told_once(tmp_path):
    (tmp_path/'r.csv').write_bytes('n,text\n1,déjà\n2,vu\n'.encode('utf-16'))
    said = []
    assert [p for p in documents(*find_files(f'{tmp_path}/r.csv:text'), said.append) if p] == ['déjà', 'vu']
    assert len(said) == 1 and 'r.csv is read as UTF-16-LE' in said[0]


def test_bin_folder(tmp_path, config):
    (tmp_path/'t.txt').write_text('plain words here '*900)
    tok = load_corpus(preset('small', vocab_size=400, block_size=16, data=str(tmp_path/'t.txt')), note=lambda _: None).tokenizer
    (tmp_path/'tok.json').write_text(tok)
    (tmp_path/'bin').mkdir()
    np.arange(300, dtype=np.uint16).repeat(3).tofile(tmp_path/'bin'/'train.bin')
    np.arange(100, dtype=np.uint16).tofile(tmp_path/'bin'/'val.bin')
    here = dict(vocab_size=400, block_size=16, data=str(tmp_path/'bin'))
    with pytest.raises(ValueError, match='no tokenizer; add --tokenizer'): load_corpus(preset('small', **here))
    corpus = load_corpus(preset('small', **here, tokenizer=str(tmp_path/'tok.json')))
    assert len(corpus.train) == 900 and len(corpus.val) == 100
    (tmp_path/'bin'/'val.bin').unlink()
    corpus = load_corpus(preset('small', **here, val_fraction=.1, tokenizer=str(tmp_path/'tok.json')))
    assert len(corpus.train) == 810 and len(corpus.val) == 90
    np.full(900, 65535, np.uint16).tofile(tmp_path/'bin'/'train.bin')
    with pytest.raises(ValueError, match='id 65535, beyond vocab_size=400'): load_corpus(preset('small', **here, tokenizer=str(tmp_path/'tok.json')))


@pytest.mark.parametrize('harm', [lambda b: b[:-9], lambda b: b[:40]+bytes(60)+b[100:], lambda b: b'\x1f\x8b'+b[2:4]])
def test_a_damaged_gz_is_named(tmp_path, harm):
    import random
    whole = gzip.compress(random.Random(0).randbytes(3000).hex().encode())
    (tmp_path/'t.gz').write_bytes(harm(whole))
    with pytest.raises(ValueError, match=r't\.gz: damaged \.gz'): list(read_blocks(tmp_path/'t.gz'))


def test_asked_to_end_while_a_tokenizer_is_trained(tmp_path):
    "At whatever moment: the signal's exit code, and nothing left behind."
    line = ' '.join(f'word{i%977} is {i*i%1009}' for i in range(200))+'\n'
    (tmp_path/'long.txt').write_text(line*(30*10**6//len(line)))
    for after_s in (.1, .4, .8):
        p = subprocess.Popen([sys.executable, '-m', 'lmnb.cli', 'train', '--config', 'small', '--data', 'long.txt'], cwd=tmp_path, text=True,
                             env=dict(os.environ, LMNB_CACHE=str(tmp_path/'cache')), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while 'Training a tokenizer' not in (line := p.stdout.readline()): assert line, p.stderr.read()
        time.sleep(after_s)
        p.terminate()
        assert p.wait(30) == 143 and 'nothing was written' in p.stdout.read(), p.stderr.read()
    assert not (tmp_path/'checkpoints').exists() and not [f for f in tmp_path.rglob('.tmp-*')]


def test_a_full_disk_leaves_no_part_of_a_tokenizer(tmp_path, config, monkeypatch):
    (tmp_path/'text.txt').write_text('some words and more of them\n'*900)
    def refuse(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(OSError, match='No space'): load_corpus(preset('small', vocab_size=400, data=str(tmp_path/'text.txt')), note=lambda _: None)
    assert not [f for f in (tmp_path/'cache').rglob('.tmp-*')]
