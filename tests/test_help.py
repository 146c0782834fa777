"What `help()` shows of each public name: a line, each parameter in words, and what is raised."
import inspect
import pydoc
import re
import subprocess
import sys

import pytest

import lmnb

NOTHING_TO_RAISE = {'find_runs', 'Trainer.state_dict', 'ResumePanel.close', 'ResumePanel.refresh', 'ResumePanel.name', 'CSV', 'ResumePanel'}


def methods(cls):
    found = {n: getattr(m, '__func__', m) for n, m in vars(cls).items() if n[0] != '_'}
    return {f'{cls.__name__}.{n}': f for n, f in found.items() if inspect.isfunction(f)}


def public():
    for name in lmnb.__all__:
        obj = getattr(lmnb, name)
        yield name, obj
        if inspect.isclass(obj): yield from methods(obj).items()


PUBLIC = dict(public())


@pytest.mark.parametrize('name', PUBLIC)
def test_help(name):
    f = PUBLIC[name]
    shown = pydoc.plain(pydoc.render_doc(f))
    first = f.__doc__.splitlines()[0]
    assert first.endswith('.') and first in shown
    mute = [p for p, x in inspect.signature(f).parameters.items()
            if p != 'self' and x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL) and not re.search(rf'^[ |]*{p}: \S.+', shown, re.M)]
    assert mute == []
    assert re.search(r'Error|RunBusy|NotFound|errors', first) or name in NOTHING_TO_RAISE


def test_sizes_and_units_are_told():
    assert 'number of token ids, V' in lmnb.ExperimentConfig.__doc__ and 'seconds between looks' in lmnb.ResumePanel.__doc__


def test_without_docstrings():
    subprocess.run([sys.executable, '-OO', '-c', 'from lmnb import preset, CSV, Trainer, ResumePanel'], check=True)
