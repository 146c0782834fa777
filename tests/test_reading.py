"A run's curves elsewhere: as a table and as a figure, whatever the folder is called and whatever stands in its file."
import json
import sys

import numpy as np
import pytest

from lmnb import load_history, plot_runs
from lmnb.background import condition
from lmnb.history import to_line

A, B = dict(id='a', parent=None, from_step=0, run_id='r'), dict(id='b', parent='a', from_step=20, run_id='r')


def ev(kind, segment, **kw): return dict(kind=kind, segment=segment, time=1000.+kw.get('step', 0), **kw)


def trained(segment, *steps, loss): return [ev('train', segment, step=s, loss=loss, lr=.1, tokens=8*s) for s in steps]


def told(folder, lines=()):
    "A run to 50, taken back to 20 and on to 40."
    folder.mkdir(parents=True, exist_ok=True)
    events = [ev('start', 'a', step=0, max_steps=50, lineage=[A]), *trained('a', 10, 20, 30, 40, 50, loss=5.), ev('val', 'a', step=20, loss=4.),
              ev('val', 'a', step=45, loss=9.), ev('resume', 'b', step=20, max_steps=40, lineage=[A, B]), *trained('b', 21, 30, 40, loss=3.)]
    (folder/'metrics.jsonl').write_bytes(b''.join(map(to_line, events))+b''.join(lines))
    return folder


def test_table(tmp_path, monkeypatch):
    t = load_history(told(tmp_path)).frame()
    assert list(t.index) == [10, 20, 21, 30, 40] and t.index.name == 'step'
    assert list(t.columns) == ['train_loss', 'lr', 'grad_norm', 'tokens', 'tok_per_s', 'dt_ms', 'time', 'val_loss']
    assert t.train_loss.tolist() == [5, 5, 3, 3, 3] and t.val_loss.dropna().to_dict() == {20: 4}
    monkeypatch.setitem(sys.modules, 'pandas', None)
    with pytest.raises(ImportError, match='pip install pandas'): load_history(tmp_path).frame()


def test_an_empty_table(tmp_path):
    (tmp_path/'metrics.jsonl').write_bytes(to_line(ev('start', 'a', step=0, max_steps=5, lineage=[A])))
    assert load_history(tmp_path).frame().empty


@pytest.mark.parametrize('across', ['steps', 'tokens', 'time'])
def test_one_run_and_what_it_left_behind(across, tmp_path):
    loss, lr = plot_runs(told(tmp_path), across).axes
    faint, line, dots = loss.lines
    assert faint.get_alpha() < .5 and list(faint.get_ydata()) == [5, 5, 5]      # 30, 40, 50 of the first segment
    x = dict(steps=[10, 20, 21, 30, 40], tokens=[80, 160, 168, 240, 320], time=np.array([0, 10, 11, 20, 30])/60)[across]
    assert list(line.get_xdata()) == pytest.approx(x) and len(dots.get_xdata()) == 1
    assert list(lr.lines[0].get_xdata()) == pytest.approx(x)
    assert loss.get_xlim()[1] == pytest.approx(dict(steps=50, tokens=400, time=40/60)[across])


def test_names_that_matplotlib_would_read(tmp_path):
    for names in (['_a', 'x$_{'], ['x/run', 'y/run', 'a^$2$']):
        fig = plot_runs([told(tmp_path/n) for n in names])
        fig.canvas.draw()
        shown = [t.get_text().strip() for t in fig.axes[0].get_legend().texts]
        assert shown == (names if names[0] == '_a' else [str(tmp_path/n) for n in names])


@pytest.mark.parametrize('line', [b'"step":%s,"loss":1.0', b'"step":41,"loss":%s', b'"step":41,"loss":1.0,"lr":%s', b'"step":41,"loss":1.0,"x":[{"y":-%s}]'])
def test_endless_numbers_are_no_events(line, tmp_path):
    h = load_history(told(tmp_path, [b'{"kind":"train","segment":"b",%s}\n' % line % (b'9'*400)]))
    assert h.skipped == 1 and list(h.train['step']) == [10, 20, 21, 30, 40]
    plot_runs(tmp_path).canvas.draw()


@pytest.mark.parametrize('field', ['step', 'max_steps', 'pid', 'heartbeat', 'step_s', 'pid_start'])
def test_endless_numbers_in_run_json(field, tmp_path):
    told(tmp_path)
    about = dict(step=40, max_steps=40, pid=1, heartbeat=1e9, step_s=.1, pid_start=1., state='running', host='elsewhere')
    (tmp_path/'run.json').write_text(json.dumps(about | {field: 10**400}))
    c = condition(tmp_path)
    assert all(abs(x) < 2**63 for x in (c.step, c.max_steps, c.pid or 0, c.heard)), c


def test_runs_for_a_program(copy, call):
    (copy/'best_model.pt').unlink()
    (copy/'best_model.pt').write_bytes(b'PK no more')
    [run] = json.loads(call('--json', copy, cwd=copy.parent, program='runs').out, parse_constant=pytest.fail)
    assert (run['path'], run['state'], run['step'], run['max_steps']) == (str(copy), 'finished', 300, 300)
    last, *_, bad = run['checkpoints']
    assert last['names'] == ['final_model.pt'] and not last['best'] and last['error'] is None
    assert last['step'] == 300 and last['epoch'] >= 0 and last['val_loss'] > last['best_val_loss']-1e-9 and last['size'] > 1000
    assert last['path'] == str(copy/'final_model.pt') and last['lineage'][0]['from_step'] == 0
    assert bad['best'] and 'best_model.pt' in bad['error'] and bad['step'] is None
    (copy.parent/'empty').mkdir()
    assert json.loads(call(copy.parent/'empty', '--json', cwd=copy, program='runs').out) == []
    assert call('--json', '--tree', cwd=copy, program='runs').code == 2
