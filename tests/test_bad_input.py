"Bad input ends in one or two plain lines and exit code 2, with nothing changed on disk and nothing run."
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile

import pytest
import torch
from conftest import SHORT, TINY, guided, powerless, train, tree

from lmnb import ExperimentConfig, load_checkpoint
from lmnb.checkpoint import MEMBER

FILE = 'checkpoints/checkpoint_step_250.pt'


def refused(done, before, folder, *words):
    "Assert all of it."
    assert done.code == 2, done
    assert 1 <= len(done.err.splitlines()) <= 2 and len(done.err) < 1000 and 'Traceback' not in done.err + done.out
    assert all(str(w) in done.err for w in words), done.err
    assert tree(folder) == before


def rows(table): return pytest.mark.parametrize('args, words', [pytest.param(a, w, id=' '.join(a)) for a, *w in table])


@rows([
    (['--config', 'smal'], 'smal', "'small'"),
    (['--confg', 'small'], '--confg', '--config'),
    (['--set', 'n_layr=2'], 'n_layr', "'n_layer'"),
    (['--set', 'n_layer=two'], 'n_layer=two', 'whole number'),
    (['--set', 'n_layer'], 'n_layer', 'key=value'),
    (['--set', 'optimizer=sgd'], "optimizer='sgd'", 'muon, adamw'),
    (['--set', 'lr=nan'], 'lr=nan', 'finite'),
    (['--set', 'dropout=2', 'n_layer=0'], 'dropout=2', 'n_layer=0'),  # all told at once
    (['--set', 'n_embd=70', 'n_head=6'], 'n_embd=70 must be a multiple of n_head=6'),
    (['--set', 'vocab_size=256'], 'vocab_size=256', '257'),
    (['--device', 'tpu'], 'tpu', 'auto, cpu, cuda, mps'),
    (['--device', 'mps' if torch.cuda.is_available() else 'cuda'], 'is not there', 'cpu'),
    (['--amp', 'fp8'], 'fp8', 'bf16'),
    (['--max-steps', '0'], 'max_steps=0', 'at least 1'),
    (['--max-steps', '-5'], 'max_steps=-5', 'at least 1'),
    (['--max-steps', '1.5'], 'max_steps=1.5', 'whole number'),
    (['--max-steps'], '--max-steps'),
    (['--max-minutes', '0'], '--max-minutes', 'above 0'),
    (['--extend-steps', '500'], '--extend-steps', '--resume'),
    (['--tokenizer', 'none.json'], 'none.json'),
    (['--checkpoint-dir', 'corpus.txt'], 'corpus.txt'),  # a file
    (['--checkpoint-dir', 'corpus.txt/run'], 'corpus.txt'),
])
def test_words(args, words, text, tmp_path, call):
    shutil.copy(text, tmp_path)
    before, flags = tree(tmp_path), ['--data', 'corpus.txt', *([] if '--set' in args else ['--set', *TINY]), *args]
    refused(call(*flags, cwd=tmp_path), before, tmp_path, *words)
    if 'smal' in args: refused(guided(*flags, cwd=tmp_path), before, tmp_path, 'run_experiment.py', *words)
    if '--confg' in args: refused(train(*flags, cwd=tmp_path), before, tmp_path, 'lmnb-train', *words)


@pytest.mark.parametrize('source, content, words', [
    ('missing.txt', None, ['not found']), ('empty.txt', b'', ['empty']), ('blank.txt', b'\n', ['tokens']),
    ('short.txt', b'def f(x): return x\n', ['tokens', '33 of each']), ('binary.txt', bytes(range(256))*40, ['binary']),
    ('latin.txt', 'déjà vu\n'.encode('latin-1')*400, ['byte 1 ', 'UTF-8']), ('folder', 'empty', ['no text files']),
    ('none/*.txt', None, ['no text files'])], ids=lambda x: x if isinstance(x, str) else '')
def test_sources(source, content, words, tmp_path, call):
    if content == 'empty': (tmp_path/source).mkdir()
    elif content is not None: (tmp_path/source).write_bytes(content)
    before, start = tree(tmp_path), guided if source == 'missing.txt' else call
    refused(start('--data', source, '--set', *TINY, cwd=tmp_path), before, tmp_path, source, *words)


@pytest.mark.skipif(sys.platform != 'linux', reason='permissions as Linux has them')
@pytest.mark.parametrize('what', ['corpus.txt', 'checkpoints'])
def test_permissions(what, text, tmp_path):
    "An unreadable source; a folder that cannot be written."
    shutil.copy(text, tmp_path)
    (tmp_path/'checkpoints').mkdir()
    before, mode = tree(tmp_path), (tmp_path/what).stat().st_mode
    (tmp_path/what).chmod(0 if what == 'corpus.txt' else 0o555)
    done = train('--data', 'corpus.txt', '--set', *TINY, cwd=tmp_path, limit=powerless)
    (tmp_path/what).chmod(mode)
    refused(done, before, tmp_path, what)


def test_folder_that_holds_a_run(copy, text, call):
    before, new = tree(copy), ('--data', text, '--set', *SHORT)
    refused(train(*new, cwd=copy.parent), before, copy, '--resume latest', '--checkpoint-dir', '--new-run')
    for p in copy.iterdir():
        if p.suffix != '.pt': p.unlink()  # checkpoints alone are a run
    before = tree(copy)
    refused(call(*new, cwd=copy.parent), before, copy, '--resume latest', '--new-run')
    for p in copy.glob('checkpoint_step_*.pt'): p.unlink()
    for p in copy.glob('*.pt'): os.truncate(p, 1000)
    before, named = tree(copy), [f'{n}_model.pt is cut off' for n in ('best', 'trunk', 'final')]
    for how in ([], ['--resume', 'latest-or-new']):
        refused(call(*how, *new, cwd=copy.parent), before, copy, *named, '--new-run')


@rows([
    (['--set', 'n_layer=2'], 'n_layer=2', 'the checkpoint has 1'),
    (['--seed', '7', '--set', 'lr=1'], 'seed=7', 'lr=1.0'),
    (['--max-steps', '500'], 'max_steps=500', '--extend-steps'),
    (['--extend-steps', '200'], '200', '250'),
    (['--extend-steps', '0'], '=0', 'above 0'),
    (['--new-run'], '--new-run'),
    (['--data', 'none.txt'], 'none.txt', 'not found'),
    (['--checkpoint-dir', 'checkpoints/run.json'], 'run.json'),
])
def test_words_at_resume(args, words, copy, call):
    before = tree(copy.parent)
    refused(call('--resume', FILE, *args, cwd=copy.parent), before, copy.parent, *words)


class Run:
    "A pickle that runs a command where it is read."
    def __reduce__(self): return os.system, ('touch it-ran',)


def stranger():
    "An instance of a class of our config's name, in another module."
    module = sys.modules['stranger'] = types.ModuleType('stranger')
    module.ExperimentConfig = type('ExperimentConfig', (), dict(__module__='stranger'))
    return module.ExperimentConfig()


def changed(path, to=None, **keys):
    "Write the checkpoint anew with other keys, `None` taking one away; torch's own save, as a stranger's would be."
    state = {k: v for k, v in (load_checkpoint(path) | keys).items() if v is not None}
    with open(to or path, 'wb') as f: torch.save(state, f)


def with_config(path, to=None, **fields):
    changed(path, to, config=vars(load_checkpoint(path)['config']) | fields)


def flip(path):
    "Turn one bit amid the numbers of the largest tensor."
    with zipfile.ZipFile(path) as z: tensors = [i for i in z.infolist() if '/data/' in i.filename]
    info = max(tensors, key=lambda i: i.file_size)
    data = bytearray(path.read_bytes())
    data[info.header_offset+info.file_size//2] ^= 1
    path.write_bytes(data)


def without_first(path, key): return dict(list(load_checkpoint(path)[key].items())[1:])


def deep(path, n=100_000):
    "A list in a list, a hundred thousand times, where the optimizer's state should be; the pickle is made by hand."
    changed(path, optimizer_state_dict=dict(state='NEST'))
    with zipfile.ZipFile(path) as z: members = {i.filename: z.read(i) for i in z.infolist()}
    for name in (n for n in members if n.endswith('data.pkl')):
        assert members[name].count(b'X\x04\0\0\0NEST') == 1
        members[name] = members[name].replace(b'X\x04\0\0\0NEST', b']'*n+b'a'*(n-1))
    with zipfile.ZipFile(path, 'w') as z: [z.writestr(zipfile.ZipInfo(k), v) for k, v in members.items()]


def in_itself():
    "A list that holds itself."
    x = []
    x.append(x)
    return x


def doubled(n):
    "Lists of which each holds the one before it twice: 2**n to walk through."
    x = []
    for _ in range(n): x = [x, x]
    return x


FILES = {
    'text': (lambda p: p.write_text('To be, or not to be\n'*9), 'text'),
    'empty': (lambda p: p.write_bytes(b''), 'empty'),
    'half': (lambda p: os.truncate(p, p.stat().st_size//2), 'cut off'),
    'flipped': (flip, 'CRC'),
    'code': (lambda p: changed(p, train_history=Run()), 'system', 'refused'),
    'old pickle': (lambda p: p.write_bytes(pickle.dumps(Run())), 'no checkpoint'),
    'no config': (lambda p: changed(p, config=None), 'lacks config'),
    'foreign config': (lambda p: changed(p, config=stranger()), 'stranger.ExperimentConfig'),
    'newer': (lambda p: changed(p, format_version=99), '99', 'upgrade'),
    'no weight': (lambda p: changed(p, model_state_dict=without_first(p, 'model_state_dict')), 'embed.weight'),
    'no moments': (lambda p: changed(p, optimizer_state_dict=dict(state={}, param_groups=[])), 'optimizer'),
    'deep': (deep, 'nested too deeply'),
    'in itself': (lambda p: changed(p, train_history=in_itself()), 'nested too deeply'),
    'doubled': (lambda p: changed(p, software=dict(x=doubled(19))), 'without an end'),
    'huge loss': (lambda p: changed(p, best_val_loss=10**400), '63 bits'),
    'huge record': (lambda p: changed(p, val_history=[dict(step=1, loss=10**400)]), '63 bits'),
    'wrong step': (lambda p: changed(p, global_step='250'), 'global_step'),
}


@pytest.mark.parametrize('what', FILES)
def test_checkpoint_files(what, copy, call):
    make, *words = FILES[what]
    make(copy.parent/FILE)
    before, start = tree(copy.parent), guided if what == 'code' else call
    other = [] if what in ('no weight', 'no moments') else ['Use ', 'checkpoints/final_model.pt (step 300) instead']
    refused(start('--resume', FILE, cwd=copy.parent), before, copy.parent, 'checkpoint_step_250.pt', *words, *other)
    if what != 'no moments': refused(call(FILE, cwd=copy.parent, program='sample'), before, copy.parent, *words)


@pytest.mark.parametrize('field, value', [
    ('n_layer', '1'), ('n_layer', -5), ('batch_size', True), ('lr', float('nan')), ('betas', (.9,)), ('dropout', [.1]),
    ('data', 5), ('max_steps', 10**30), ('n_head', 0), ('n_kv_head', 3), ('seed', -1), ('schedule', 'x'*100_000)])
def test_hostile_config(field, value, copy, call):
    "Unpickling an `ExperimentConfig` runs none of its own checks."
    config = load_checkpoint(copy.parent/FILE)['config']
    object.__setattr__(config, field, value)
    changed(copy.parent/FILE, config=config)
    before = tree(copy.parent)
    refused(call('--resume', FILE, cwd=copy.parent), before, copy.parent, field)
    refused(call(FILE, cwd=copy.parent, program='sample'), before, copy.parent, field)


def test_config_that_asks_for_all_memory(copy):
    "Refused by the field's name before anything is built; in a process whose memory and time have an end."
    large = dict(n_layer=10**9, vocab_size=10**9, n_embd=2*10**6, block_size=10**9)
    for field, value in large.items(): with_config(copy.parent/FILE, copy.parent/f'{field}.pt', **{field: value})
    before = tree(copy.parent)
    code = ('import resource, sys\nfrom lmnb import cli\nresource.setrlimit(resource.RLIMIT_AS, (6*2**30, 6*2**30))\n'
            'for name in sys.argv[1:]:\n  for f, args in (cli.train, ["--resume", name]), (cli.sample, [name]):\n'
            '    try: f(args)\n    except SystemExit as e: print(e.code)')
    p = subprocess.run([sys.executable, '-c', code, *(f'{f}.pt' for f in large)], cwd=copy.parent, capture_output=True,
                       text=True, timeout=60)
    said = p.stderr.splitlines()
    assert p.stdout.split().count('2') == len(said) == 2*len(large) and tree(copy.parent) == before
    for field, line in zip([f for f in large for _ in range(2)], said): assert field in line.replace(f'{field}.pt', '')


def test_plain_dict_is_accepted(copy, call):
    "What it has too much is dropped and named, in one line that does nothing to a terminal."
    with_config(copy.parent/FILE, new_field=1, **{'x\n\x1b[2Jy': 1})
    done = call('--resume', FILE, '--extend-steps', '251', cwd=copy.parent)
    line, after = done.out.splitlines()[:2]
    assert done.code == 0 and 'new_field' in line and 'dropped' in line and after.startswith('Resuming')
    assert '\x1b' not in done.out and type(load_checkpoint(copy/'final_model.pt')['config']) is ExperimentConfig


@pytest.mark.parametrize('lineage', [[1, 2], [dict(id='a')], [dict(id=5, from_step='x')]])
def test_hostile_description_harms_no_other_file(lineage, copy, call):
    "The part of a file that is read without torch is a stranger's word, too."
    with zipfile.ZipFile(copy.parent/FILE) as z: about = json.loads(z.read(MEMBER))
    changed(copy.parent/FILE)
    with zipfile.ZipFile(copy.parent/FILE, 'a') as z: z.writestr(MEMBER, json.dumps(dict(about, lineage=lineage)))
    assert 'DAMAGED' in call('.', cwd=copy.parent, program='runs').out
    done = call('--resume', '200', '--extend-steps', '201', cwd=copy.parent)
    assert done.code == 0 and 'Finished at step 201' in done.out
