"Data sets of Hugging Face and .parquet files: the same tokens however they are read, one line for what cannot be."
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import TINY, tree

os.environ.update(HF_HUB_OFFLINE='1')  # before it is imported
datasets = pytest.importorskip('datasets')

from lmnb import load_checkpoint, preset  # noqa: E402
from lmnb.data import documents, find_files, fingerprint, load_corpus  # noqa: E402

TEXTS = [f'Row {i} says that {i} and {i*i} are "numbers".\nYes.' for i in range(400)]


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "The same texts in each form; `many` has two columns of text, `none` has none."
    d = tmp_path_factory.mktemp('hf')
    os.environ['HF_HOME'] = str(d/'home')
    ds = datasets.Dataset.from_dict(dict(text=TEXTS, n=list(range(400))))
    ds.save_to_disk(d/'saved')
    datasets.DatasetDict(train=ds, test=ds.select(range(9))).save_to_disk(d/'splits')
    (d/'folder').mkdir()
    for i in range(2): ds.select(range(i*200, i*200+200)).to_parquet(d/'folder'/f'train-0000{i}-of-00002.parquet')
    ds.to_parquet(d/'rows.parquet')
    ds.to_json(d/'rows.jsonl')
    ds.to_csv(d/'rows.csv')
    ds.rename_column('text', 'body').save_to_disk(d/'body')
    ds.rename_column('text', 'body').add_column('title', TEXTS).save_to_disk(d/'many')
    ds.remove_columns('text').to_parquet(d/'none.parquet')
    datasets.Dataset.from_dict(dict(text=TEXTS[:5]), split=datasets.NamedSplit('train[:5]')).save_to_disk(d/'sliced')
    return d


@pytest.fixture(autouse=True)
def inside(here, monkeypatch): monkeypatch.chdir(here)


def contents(source): return fingerprint(documents(*find_files(source)))


@pytest.mark.parametrize('source', [
    'hf:saved', 'hf:saved:train', 'hf:saved::text', 'hf:splits:train:text', 'hf:body', 'hf:many:train:title', 'hf:folder',
    'hf-stream:folder:train:text', 'hf:rows.jsonl', 'hf:rows.csv', 'hf:rows.parquet', 'rows.parquet', 'rows.parquet:text',
    'rows.jsonl:text', 'rows.csv:text'])
def test_the_same_contents_in_each_form(source):
    size = sum(map(len, TEXTS))+399  # a byte between two documents
    assert contents(source) == (contents('hf:saved')[0], size)


def test_another_split(): assert contents('hf:splits:test') == contents('hf:splits:test:text') != contents('hf:splits')


def test_a_slice_that_was_saved(): assert contents('hf:sliced') == contents('hf:sliced:train[:5]:text') != contents('hf:saved')


@pytest.mark.parametrize('source, words', [
    ('hf:', ['names no data set']), ('hf:sliced:test', ["'test'", 'train[:5]']),
    ('hf:saved:train:body', ["'body'", 'text (string), n (int64)']), ('hf:saved:train:n', ["'n'", 'text (string)']),
    ('hf:many', ["'text'", 'body (string)', 'title (string)']), ('hf:splits:dev', ["'dev'", 'train, test']),
    ('hf:folder:dev', ['dev', 'train']), ('hf:nobody/nothing', ["Couldn't reach 'nobody/nothing'"]),
    ('hf:nobody/nothing/part:train:text', ["Couldn't reach 'nobody/nothing'"]), ('hf:missing', ["Couldn't reach 'missing'"]),
    ('none.parquet', ['n (int64)']), ('rows.parquet:body', ["'body'", 'text (string)']), ('folder', ['hf:FOLDER']),
    ('missing.parquet:text', ['not found'])])
def test_refused_in_a_line(source, words, here, call, tmp_path):
    before = tree(tmp_path)
    done = call('--data', source, '--set', *TINY, '--checkpoint-dir', tmp_path/'run', cwd=here)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and len(done.err) < 500, done.err
    assert all(w in done.err for w in [source.removesuffix(':body'), *words]) and tree(tmp_path) == before, done.err


@pytest.mark.parametrize('source, asked', [
    ('hf:plain', dict(path='plain', name=None, split='train', streaming=False)),
    ('hf:owner/name:test:text', dict(path='owner/name', name=None, split='test', streaming=False)),
    ('hf-stream:owner/name/part', dict(path='owner/name', name='part', split='train', streaming=True)),
    ('hf:owner/name:train[:1%]:text', dict(path='owner/name', name=None, split='train[:1%]', streaming=False)),
    ('hf:folder', dict(path='{here}/folder', split='train', streaming=True)),  # what is here is not copied
    ('hf:rows.csv', dict(path='{here}', data_files='rows.csv', split='train', streaming=True))])
def test_what_the_library_is_asked_for(source, asked, here, monkeypatch):
    calls = []
    def load(**kw): calls.append(kw); return datasets.load_from_disk(here/'saved')
    monkeypatch.setattr(datasets, 'load_dataset', load)
    contents(source)
    assert calls == [{k: v.format(here=here) if isinstance(v, str) else v for k, v in asked.items()}]


@pytest.mark.parametrize('source, module', [('hf:saved', 'datasets'), ('rows.parquet', 'pyarrow')])
def test_a_missing_extra_is_named(source, module, monkeypatch):
    for m in (module, f'{module}.parquet'): monkeypatch.setitem(sys.modules, m, None)
    with pytest.raises(ValueError, match=rf"{source} cannot be read: it takes {module}: pip install 'lmnb\[hf\]'"): contents(source)


def test_a_version_that_could_run_foreign_code_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, '__version__', '3.6.0')
    with pytest.raises(ValueError, match='hf:saved cannot be read: it takes datasets>=4'): contents('hf:saved')


def config(source): return preset('small', data=source, vocab_size=300, block_size=16)


@pytest.mark.parametrize('fails_in', [1, 2, 3], ids=['fingerprint', 'tokenizer', 'tokens'])
def test_a_connection_is_lost(fails_in, tmp_path, monkeypatch):
    "While the source is read for the n-th time: its name and the row; and nothing in the cache that begins a later run."
    monkeypatch.setenv('LMNB_CACHE', str(tmp_path/'cache'))
    whole, times = datasets.load_dataset, []
    def lost(*args, **kw):
        times.append(1)
        def rows():
            for i, row in enumerate(whole(*args, **kw)):
                if i == 250 and len(times) == fails_in: raise ConnectionError('the network is\ngone')
                yield row
        return datasets.IterableDataset.from_generator(rows, features=whole(*args, **kw).features)
    monkeypatch.setattr(datasets, 'load_dataset', lost)
    with pytest.raises(ValueError, match=r'hf-stream:folder cannot be read beyond row 2\d\d: .*the network is gone'):
        load_corpus(config('hf-stream:folder'), note=lambda _: None)
    kept = [p.name for p in (tmp_path/'cache').iterdir() if p.suffix != '.lock']
    assert len(times) == fails_in and len(kept) == (fails_in == 3) and all(k.endswith('-300.tokenizer') for k in kept)
    again = load_corpus(config('hf-stream:folder'), note=lambda _: None)
    assert np.array_equal(again.train, load_corpus(config('hf:saved'), note=lambda _: None).train)


def test_long_reading_tells_how_far_it_is(tmp_path, monkeypatch):
    import lmnb.data
    clock, said = iter(range(0, 10**6, 5)), []
    monkeypatch.setenv('LMNB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(lmnb.data.time, 'monotonic', lambda: next(clock))
    load_corpus(config('hf:folder'), note=said.append)
    for doing in ('Reading hf:folder: 0 MB', 'Training a tokenizer: 0 of 0 MB', 'Encoding hf:folder: 0 of 0 MB'):
        assert 5 < sum(s.startswith(doing) for s in said) < 100


PEAK = r'''
import re, sys
from pathlib import Path
from lmnb.data import documents, find_files, fingerprint
fingerprint(documents(*find_files(sys.argv[1])))
print(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])
'''


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='peak memory is read from /proc')
@pytest.mark.parametrize('form', ['hf:{}.jsonl', '{}.parquet'])
def test_memory_does_not_grow_with_the_source(form, tmp_path):
    line, peaks = ' '.join(f'word{i%977} is {i*i%1009}' for i in range(200)), []
    for n in (20, 100):  # million characters
        ds = datasets.Dataset.from_dict(dict(text=[f'{i} {line}' for i in range(n*10**6//len(line))]))
        (ds.to_parquet if 'parquet' in form else ds.to_json)(tmp_path/form.format(n).removeprefix('hf:'))
        out = subprocess.run([sys.executable, '-c', PEAK, form.format(n)], cwd=tmp_path, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        peaks.append(int(out.stdout)/1024)
    assert peaks[1]-peaks[0] < 40, peaks  # MiB; the source grew by 76


def test_a_resume_finds_the_tokens_without_the_source(here, tmp_path, call, monkeypatch):
    monkeypatch.setenv('LMNB_CACHE', str(tmp_path/'cache'))
    done = call('--data', 'hf:folder:train:text', '--set', *TINY, 'max_steps=4', 'save_interval=2', 'eval_interval=2', cwd=here)
    assert done.code == 0
    whole = load_checkpoint('checkpoints/final_model.pt')
    assert whole['data_state']['source'] == 'hf:folder:train:text'
    (here/'folder').rename(here/'away')
    try:
        monkeypatch.setitem(sys.modules, 'datasets', None)  # not even the library is asked
        done = call('--resume', '2', cwd=here)
        assert done.code == 0 and 'exact.' in done.out
        monkeypatch.setenv('LMNB_CACHE', str(tmp_path/'other'))
        gone = call('--resume', '2', cwd=here)
        assert gone.code == 2 and 'hf:folder:train:text cannot be read' in gone.err
        elsewhere = call('--resume', '2', '--data', 'rows.jsonl:text', cwd=here)  # the same contents in another form
        assert elsewhere.code == 0 and 'exact.' in elsewhere.out
    finally: (here/'away').rename(here/'folder')
