"The tutorial and the guides, read on a page without a kernel; and the tutorial with other parameters."
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from lmnb import list_checkpoints

READ = [ROOT/'nbs/train.ipynb', *sorted((ROOT/'nbs/guides').glob('*.ipynb'))]


def code(path): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


def test_papermill(tmp_path, text):
    "Twenty steps, another folder, another text: what papermill says wins over the notebook, and over a test's setting."
    given = dict(steps=20, run_dir='elsewhere/run', data=str(text))
    flags = [w for k, v in given.items() for w in ('-p', k, str(v))]
    command = [sys.executable, '-m', 'papermill', ROOT/'nbs/train.ipynb', 'out.ipynb', '-k', 'python3', *flags]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | dict(LMNB_TUTORIAL_STEPS='7'), text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [c.step for c in list_checkpoints(tmp_path/'elsewhere/run')]
    assert max(steps) == 40 and 16 in steps  # extended from the trunk of 20 steps
    assert (tmp_path/'elsewhere/run/superseded/1/checkpoint_step_20.pt').exists()
    said = json.dumps([c['outputs'] for c in code(tmp_path/'out.ipynb')])
    assert 'Stopped at step 10 of 20 (stop file)' in said and 'going to 40 (extended from 20' in said
    assert said.count(': exact.') == 2 and said.count('"image/png"') >= 4
    assert not (tmp_path/'checkpoints').exists()


@pytest.mark.parametrize('path', READ, ids=lambda p: p.stem)
def test_reads_well_on_a_page(path):
    "Outputs are committed, nothing failed in them, none needs a kernel, and none tells of the machine that made it."
    outputs = [o for c in code(path) for o in c['outputs']]
    assert outputs and not [o for o in outputs if o['output_type'] == 'error']
    assert 'widget-view' not in json.dumps(outputs)
    words = json.dumps([{k: v for k, v in o.get('data', o).items() if not k.startswith('image/')} for o in outputs])
    assert not re.search(r'/(tmp|home|root|Users|var)/', words)


def test_the_tutorial_has_its_pictures():
    cells = code(READ[0])
    pictures = [o for c in cells for o in c['outputs'] if 'image/png' in o.get('data', {})]
    assert len(pictures) == 4  # three live plots, the learning rates
    assert [c for c in cells if 'parameters' in c['metadata'].get('tags', ())] == [cells[1]]
