"A checkpoint as a folder for transformers: whole or not there; where transformers is installed, its logits and its text are ours."
import json
import shutil

import pytest
import torch
from conftest import tree

from lmnb import load_checkpoint, sample
from lmnb.hub import export, hf_names
from lmnb.model import GPT


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


def test_every_parameter_has_a_name(short):
    saved = load_checkpoint(short.run/'final_model.pt')
    names = hf_names(saved['config'])
    assert names.keys() == saved['model_state_dict'].keys() and len(set(names.values())) == len(names)
