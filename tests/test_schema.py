"`metrics.jsonl` is as `lmnb.history` says it is: every event of real runs has the fields of its kind, in their types, and no others."
import json
import math
from typing import get_args

import pytest
from conftest import EVERY, TINY, events
from test_resume import stopped_at

from lmnb import Trainer, preset
from lmnb.config import parse_settings
from lmnb.history import EVERY as STAMP
from lmnb.history import KINDS, SCHEMA, Events, to_line


def fits(value, kind):
    "Whether a value read from JSON is of a field's type; a number that is not finite is a string there."
    kinds = get_args(kind) or (kind,)
    return type(value) in kinds or float in kinds and value in ('inf', '-inf', 'nan')


def misfits(event):
    "What in an event is not as the schema says."
    if event.get('kind') not in KINDS: return [f'kind {event.get("kind")}']
    fields = STAMP | KINDS[event['kind']]
    lacking = [f'no {k}' for k, t in fields.items() if k not in event and type(None) not in get_args(t)]
    return lacking+[f'{k}={v!r}' for k, v in event.items() if k not in fields or not fits(v, fields[k])]


def all_events(run):
    "The events of a run, each checked."
    lines = (run/'metrics.jsonl').read_bytes().splitlines()
    told = [json.loads(l, parse_constant=lambda c: pytest.fail(f'{c} is not strict JSON')) for l in lines]
    assert not [(e['kind'], wrong) for e in told if (wrong := misfits(e))] and {e['schema'] for e in told} == {SCHEMA}
    return told


def test_every_kind_in_runs_that_start_stop_warn_resume_and_branch(text, tmp_path, monkeypatch):
    config = preset('small', **parse_settings([*TINY, *EVERY, 'max_steps=20', 'save_interval=5', 'eval_interval=5']), data=str(text))
    t = Trainer(config, tmp_path/'a', listeners=[lambda e: 1/0], quiet=True)
    losses = iter([2., math.inf])
    monkeypatch.setattr(t, 'evaluate', lambda: next(losses), raising=False)  # and at step 15 an error
    assert stopped_at(t, 17, monkeypatch).interrupted == 'SIGTERM'
    Trainer.resume('10', tmp_path/'a', quiet=True).fit()
    Trainer.resume(tmp_path/'a'/'checkpoint_step_15.pt', tmp_path/'b', extend_steps=30, quiet=True).fit()
    a, b = all_events(tmp_path/'a'), all_events(tmp_path/'b')
    assert {e['kind'] for e in a} == set(KINDS) and {e['code'] for e in a if e['kind'] == 'warn'} == {'listener', 'eval'}
    assert 'inf' in [e['loss'] for e in a if e['kind'] == 'val']
    assert [e['step'] for e in b if e['kind'] == 'train' and 'tok_per_s' not in e] == list(range(1, 16))  # written by the branch
    assert [e['parent'] for e in events(tmp_path/'b', 'resume')][0].endswith('checkpoint_step_15.pt')


@pytest.mark.parametrize('run', ['short', 'guide'])
def test_runs_of_the_command_line(run, request):
    assert {'start', 'train', 'val', 'save', 'end'} <= {e['kind'] for e in all_events(request.getfixturevalue(run).run)}


def test_the_check_is_strict(tmp_path):
    e = Events(tmp_path, 'r', 'a')
    good = json.loads(to_line(e.emit('val', step=1, loss=math.nan)))
    assert e.close() and not misfits(good)
    for change in (dict(kind='sample'), dict(step=True), dict(step='1'), dict(loss='2.5'), dict(loss=2), dict(more=1), dict(time=None)):
        assert misfits(good | change), change
    for k in good: assert misfits({n: v for n, v in good.items() if n != k}), k
