"What the model must be able to do, beyond its notebook's examples."
import pytest
import torch

from lmnb.config import preset
from lmnb.model import GPT, generate
from lmnb.optim import make_optimizers, set_lr

TINY = dict(vocab_size=64, block_size=16, n_layer=2, n_embd=32, n_head=4)


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_overfits_one_batch(optimizer):
    config = preset('small', **TINY, optimizer=optimizer)
    model = GPT(config)
    opts = make_optimizers(model, config)
    set_lr(opts, 3e-3)
    data = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        loss = model(data[:, :-1], data[:, 1:])
        loss.backward()
        for o in opts: o.step(); o.zero_grad()
    assert loss < .05


@pytest.mark.parametrize('n_kv_head', [0, 1, 2])
def test_causal_and_cached(n_kv_head):
    model = GPT(preset('small', **TINY, n_kv_head=n_kv_head))
    for p in model.parameters(): torch.nn.init.normal_(p, 0, .3, generator=torch.Generator().manual_seed(p.numel()))
    idx = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (changed[:, t]+1) % 64
        a, b = model(idx), model(changed)
        assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t:], b[:, t:])
    one, two = (torch.cat(list(generate(model, idx[:, :3], 40, use_cache=c)), 1) for c in (True, False))
    assert torch.equal(one, two)


def test_micro_batches_change_rounding_only(tmp_path, monkeypatch):
    from lmnb.trainer import Trainer
    monkeypatch.setenv('LMNB_CACHE', str(tmp_path/'cache'))
    (tmp_path/'t.txt').write_text('\n'.join(str(i*i) for i in range(9000)))
    config = preset('small', **(TINY | dict(vocab_size=300)), data=str(tmp_path/'t.txt'), batch_size=4, max_steps=20, eval_batches=2)
    losses = []
    for m in (0, 1, 3):
        t = Trainer(preset('small', **{k: getattr(config, k) for k in config.__dataclass_fields__} | dict(micro_batch_size=m)), tmp_path/str(m), quiet=True).fit()
        losses.append(t.val_history[-1]['loss'])
    assert max(losses)-min(losses) < 1e-3, losses
