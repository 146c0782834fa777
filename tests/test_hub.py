"A checkpoint as a folder for transformers: whole or not there; where transformers is installed, its logits and its text are ours."
import json
import shutil
import subprocess

import pytest
import torch
from conftest import TORCHRUN, events, powerless, train, tree

from lmnb import Trainer, load_checkpoint, preset, sample
from lmnb.hub import export
from lmnb.model import GPT
from lmnb.pretrained import hf_names, preset_from, pretrained_weights


def test_opened_by_transformers(short, tmp_path):
    hf = pytest.importorskip('transformers')
    folder = export(short.run/'best_model.pt', tmp_path/'model')
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)
    saved = load_checkpoint(short.run/'best_model.pt')
    ours = GPT(saved['config']).eval()
    ours.load_state_dict(saved['model_state_dict'])
    ids = tokenizer('def main', return_tensors='pt').input_ids
    with torch.no_grad(): torch.testing.assert_close(model(ids).logits, ours(ids), rtol=1e-4, atol=1e-4)
    theirs = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert tokenizer.decode(theirs[0]) == sample(short.run/'best_model.pt', 'def main', max_tokens=20, temperature=0)
    model.save_pretrained(tmp_path/'back')
    from safetensors.torch import load_file
    a, b = (load_file(d/'model.safetensors') for d in (folder, tmp_path/'back'))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_command(short, call, tmp_path):
    done = call('best', 'model', cwd=short.cwd, program='export')
    made = short.cwd/'model'
    assert done.code == 0 and 'MB, step' in done.out
    shutil.move(made, tmp_path/'model')
    config = json.loads((tmp_path/'model'/'config.json').read_text())
    assert config['architectures'] == ['Qwen3ForCausalLM'] and config['tie_word_embeddings'] and config['head_dim'] == 8
    card = (tmp_path/'model'/'README.md').read_text()
    assert 'corpus.txt' in card and load_checkpoint(short.run/'best_model.pt')['lineage'][0]['id'] in card
    assert (tmp_path/'model'/'curves.png').read_bytes().startswith(b'\x89PNG')


def test_nothing_is_replaced_unasked(short, tmp_path):
    folder = export(short.run, tmp_path/'model')
    before = tree(folder)
    with pytest.raises(FileExistsError, match='is there already'): export(short.run, folder)
    assert tree(folder) == before
    export(short.run/'best_model.pt', folder, overwrite=True)
    assert tree(folder) != before and sorted(p.name for p in tmp_path.iterdir()) == ['model']
    (folder/'thesis.txt').write_text('not ours')
    before = tree(folder)
    with pytest.raises(FileExistsError, match="holds 'thesis.txt'"): export(short.run, folder, overwrite=True)
    assert tree(folder) == before


@pytest.mark.parametrize('spoil, said', [('damaged', 'is damaged'), ('missing', 'Checkpoint not found'), ('disk', 'No space left')])
def test_no_half_folder(copy, tmp_path, monkeypatch, spoil, said):
    file = copy/'final_model.pt'
    if spoil == 'damaged':
        data = bytearray(file.read_bytes())
        data[len(data)//2] ^= 1
        file.unlink()
        file.write_bytes(data)
    if spoil == 'missing': file.unlink()
    if spoil == 'disk':
        def full(*args): raise OSError(28, 'No space left on device')
        monkeypatch.setattr('lmnb.hub.curves', full)
    with pytest.raises((ValueError, OSError), match=said): export(file, tmp_path/'out'/'model')
    assert not (tmp_path/'out').exists() or not list((tmp_path/'out').iterdir())


def test_a_target_that_cannot_be_written(short, tmp_path):
    (tmp_path/'locked').mkdir(mode=0o555)
    done = train('checkpoints', tmp_path/'locked'/'model', cwd=short.cwd, program='lmnb-export', limit=powerless)
    assert done.code == 2 and done.err.startswith(f'lmnb-export: Permission denied: {tmp_path}/locked/') and done.err.count('\n') == 1
    assert list((tmp_path/'locked').iterdir()) == []


def test_every_parameter_has_a_name(short):
    saved = load_checkpoint(short.run/'final_model.pt')
    names = hf_names(saved['config'])
    assert names.keys() == saved['model_state_dict'].keys() and len(set(names.values())) == len(names)


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    "A model and a tokenizer that transformers made: heads wider than C/H, a feed-forward and rotary base of its own."
    hf = pytest.importorskip('transformers')
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    folder = tmp_path_factory.mktemp('theirs')/'model'
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(['def a few words:\n']*50, trainers.BpeTrainer(vocab_size=290, special_tokens=['</s>'], initial_alphabet=alphabet))
    hf.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='</s>').save_pretrained(folder)
    torch.manual_seed(0)
    config = hf.Qwen3Config(vocab_size=304, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rope_theta=1e6, tie_word_embeddings=True)
    model = hf.Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return folder, model.eval()


def logits(model, ids):
    with torch.no_grad(): out = model.eval()(ids)
    return getattr(out, 'logits', out)


def test_begun_with_theirs(theirs, text, tmp_path, call):
    folder, model = theirs
    words = ('--init-from', folder, '--config', 'small', '--data', text, '--max-steps', 6, '--set', 'save_interval=3', 'eval_interval=3',
             'eval_batches=2', 'lr=1e-4')
    config = preset_from(folder, 'small', data=str(text))
    t = Trainer(config, tmp_path/'run', init=folder, quiet=True)
    ids = torch.randint(290, (2, 60), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(t.model, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert (config.block_size, config.lr, config.optimizer) == (64, preset('small').lr, 'muon')
    for k in range(2):  # the only command of a job: begun, and then complete, even if the folder has gone
        if k: words = words[0], tmp_path/'gone', *words[2:]
        done = call(*words, '--resume', 'latest-or-new', cwd=tmp_path)
        assert done.code == 0 and ('already complete' in done.out) == bool(k), done.err
    saved = load_checkpoint(tmp_path/'checkpoints'/'final_model.pt')
    assert saved['lineage'][0]['init'] == str(folder) and saved['config'].head_dim == 16
    assert call('checkpoints', 'back', cwd=tmp_path, program='export').code == 0
    back = type(model).from_pretrained(tmp_path/'back')
    ours = GPT(saved['config'])
    ours.load_state_dict(saved['model_state_dict'])
    torch.testing.assert_close(logits(back, ids), logits(ours, ids), rtol=1e-4, atol=1e-4)
    again = pretrained_weights(tmp_path/'back', saved['config'])
    assert all(again[k].equal(w) for k, w in saved['model_state_dict'].items())


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_begun_by_two_processes(theirs, text, tmp_path, parallel):
    words = ('--init-from', theirs[0], '--config', 'small', '--data', text, '--max-steps', 3, '--set', 'log_interval=1', 'eval_batches=2')
    one = train(*words, cwd=tmp_path)
    two = subprocess.run([*TORCHRUN, '--standalone', '--nproc-per-node=2', '-m', 'lmnb.cli', 'train', *map(str, words), '--parallel', parallel,
                          '--checkpoint-dir', 'two'], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert one.code == 0 and two.returncode == 0, one.err+two.stderr
    a, b = ([e['loss'] for e in events(tmp_path/run, 'train')] for run in ('checkpoints', 'two'))
    assert len(a) == 3 and max(abs(x-y) for x, y in zip(a, b, strict=True)) < 1e-4


def test_the_matrix_under_its_other_name(theirs, tmp_path):
    folder = shutil.copytree(theirs[0], tmp_path/'model')
    weights(lambda w: w.update({'lm_head.weight': w.pop('model.embed_tokens.weight')}))(folder)
    there, here = (pretrained_weights(f, preset_from(theirs[0])) for f in (theirs[0], folder))
    assert all(there[k].equal(here[k]) for k in there)


def test_in_pieces_and_in_bfloat16(theirs, tmp_path):
    folder, model = theirs
    shutil.copytree(folder, tmp_path/'pieces')
    (tmp_path/'pieces'/'model.safetensors').unlink()
    model.save_pretrained(tmp_path/'pieces', max_shard_size='20KB')
    assert len(list((tmp_path/'pieces').glob('model-*.safetensors'))) > 1
    shutil.copytree(folder, tmp_path/'half')
    type(model)(model.config).to(torch.bfloat16).save_pretrained(tmp_path/'half')
    config = preset_from(folder)
    whole, pieces, half = (pretrained_weights(f, config) for f in (folder, tmp_path/'pieces', tmp_path/'half'))
    assert all(pieces[k].equal(w) for k, w in whole.items()) and {w.dtype for w in half.values()} == {torch.float32}


def edited(**changes):
    def edit(folder): (folder/'config.json').write_text(json.dumps(json.loads((folder/'config.json').read_text()) | changes))
    return edit


def weights(change):
    def edit(folder):
        from safetensors.torch import load_file, save_file
        there = load_file(folder/'model.safetensors')
        change(there)
        save_file(there, folder/'model.safetensors')
    return edit


def index(text): return lambda folder: ((folder/'model.safetensors').unlink(), (folder/'model.safetensors.index.json').write_text(text))
def rope(value): return edited(rope_parameters=value, rope_theta=1e6)


def without(name): return lambda folder: (folder/name).unlink()
def cut(folder): (folder/'model.safetensors').write_bytes((folder/'model.safetensors').read_bytes()[:999])


UNFIT = {
    'another architecture': (edited(model_type='llama'), (), "model_type='llama' (here it is 'qwen3')"),
    'two matrices': (edited(tie_word_embeddings=False), (), 'tie_word_embeddings=False'),
    'long positions': (edited(rope_parameters=dict(rope_type='yarn', factor=4.)), (), "rope_type='yarn'"),
    'several at once': (edited(hidden_act='gelu', attention_bias=True), (), "hidden_act='gelu' (here it is 'silu'), attention_bias=True"),
    'impossible sizes': (edited(num_key_value_heads=3), (), 'n_kv_head=3 must divide n_head=4'),
    'too few sizes': (lambda f: (f/'config.json').write_text('{"model_type": "qwen3", "tie_word_embeddings": true}'), (), 'vocab_size=None'),
    'no JSON': (lambda f: (f/'config.json').write_text('{'), (), 'config.json cannot be read'),
    'no config': (without('config.json'), (), 'has no config.json'),
    'no tokenizer': (without('tokenizer.json'), (), 'has no tokenizer.json'),
    'too many ids': (edited(vocab_size=100), (), 'ids, its model 100'),
    'nulls': (edited(hidden_size=None, max_position_embeddings='long'), (), "hidden_size=None, max_position_embeddings='long'"),
    'positions by kinds of layer': (rope(dict(full_attention=dict(rope_type='default', rope_theta=1e6))), (), "rope_type={'full_attention'"),
    'positions in a word': (rope('x'), (), "rope_type='x'"),
    'a list': (lambda f: (f/'config.json').write_text('[]'), (), 'config.json cannot be read'),
    'half an index': (index('{"weight_'), (), 'model.safetensors.index.json cannot be read'),
    'an index of nothing': (index('{"weight_map": 3}'), (), 'model.safetensors.index.json cannot be read'),
    'a piece missing': (index('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'), (), 'has no model-00002-of-00002.safetensors'),
    'no weights': (without('model.safetensors'), (), 'has no model.safetensors'),
    'half a file': (cut, (), 'cannot be read'),
    'a weight less': (weights(lambda w: w.pop('model.norm.weight')), (), 'lacks 1 weights: model.norm.weight'),
    'a weight more': (weights(lambda w: w.update(more=torch.zeros(2))), (), 'weights too many: more'),
    'not finite': (weights(lambda w: w['model.norm.weight'].fill_(float('nan'))), (), 'model.norm.weight is not finite'),
    'another shape': (weights(lambda w: w.update({'model.norm.weight': torch.ones(7)})), (), 'is (7,) in the file and (32,) here'),
    'another layer count': (None, ('--set', 'n_layer=3', 'n_embd=64'), 'n_embd=64 (there it is 32), n_layer=3 (there it is 2)'),
    'longer sequences': (None, ('--set', 'block_size=128'), 'block_size=128 (there at most 64)'),
    'its own tokenizer': (None, ('--tokenizer', 'mine.json'), "tokenizer='mine.json' (the folder has its own)"),
    'a resume': (None, ('--resume', 'latest'), '--init-from begins a run'),
}


@pytest.mark.parametrize('case', UNFIT)
def test_what_cannot_be_begun_with(theirs, text, tmp_path, call, case):
    spoil, more, said = UNFIT[case]
    folder = shutil.copytree(theirs[0], tmp_path/'model')
    if spoil: spoil(folder)
    done = call('--init-from', folder, '--data', text, '--max-steps', 3, *more, cwd=tmp_path)
    assert done.code == 2 and said in done.err and done.err.count('\n') == 1, done.err
    assert [p.name for p in tmp_path.iterdir()] == ['model']
