"What is published: a source distribution that makes the wheel, and a wheel that trains with no checkout near."
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from email import message_from_bytes
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
from conftest import EVERY, ROOT, TINY

import lmnb

MADE = {'build', 'dist', '__pycache__', 'checkpoints', '.ipynb_checkpoints', '_proc', '_docs'}  # by programs, not by us


def settings():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A source distribution, the wheel made from it alone, and a folder where that is installed; nothing is downloaded."
    d = tmp_path_factory.mktemp('dist')
    shutil.copytree(ROOT, d/'checkout', ignore=shutil.ignore_patterns('.*', '*.egg-info', *MADE))

    def python(*args, cwd=d):
        done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
    python('-c', f'from setuptools import build_meta; build_meta.build_sdist({str(d)!r})', cwd=d/'checkout')
    shutil.rmtree(d/'checkout')
    sdist, = d.glob('*.tar.gz')
    offline = '--quiet', '--disable-pip-version-check', '--no-deps', '--no-index'
    python('-m', 'pip', 'wheel', *offline, '--no-build-isolation', '-w', d, sdist)
    wheel, = d.glob('*.whl')
    python('-m', 'pip', 'install', *offline, '--target', d/'site', wheel)
    return SimpleNamespace(sdist=sdist, wheel=wheel, site=d/'site')


def test_what_is_in_the_wheel(built):
    names = set(ZipFile(built.wheel).namelist())
    package = {f'lmnb/{p.name}' for p in (ROOT/'lmnb').iterdir() if p.is_file()}
    about = {f'lmnb-{lmnb.__version__}.dist-info/{n}'
             for n in ('METADATA', 'RECORD', 'WHEEL', 'entry_points.txt', 'licenses/LICENSE', 'top_level.txt')}
    assert names == package | about and 'lmnb/panel.css' in names
    assert built.wheel.stat().st_size < 300_000


def test_what_is_in_the_source_distribution(built):
    shutil.unpack_archive(built.sdist, built.site.parent/'unpacked')
    root, = (built.site.parent/'unpacked').iterdir()
    def files(top):
        found = [p.relative_to(top) for p in top.rglob('*') if p.is_file()]
        return {str(p) for p in found if not {*p.parts} & MADE and not any(s.startswith('.') for s in p.parts)}
    for folder in ('nbs', 'tests', 'tools', 'bench'): assert files(root/folder) == files(ROOT/folder), folder
    assert built.sdist.stat().st_size < 3_000_000


def test_what_an_index_shows(built):
    "Each field as `settings.ini` has it, and the README with links that lead somewhere from elsewhere."
    cfg, name = settings(), f'lmnb-{lmnb.__version__}.dist-info/METADATA'
    meta = message_from_bytes(ZipFile(built.wheel).read(name))
    assert meta['Version'] == cfg['version'] == lmnb.__version__
    assert meta['Summary'] == cfg['description'] and meta['Requires-Python'] == f'>={cfg["min_python"]}'
    assert meta['License-Expression'] == 'Apache-2.0' and meta['License-File'] == 'LICENSE'
    assert meta['Author'] == cfg['author'] and meta['Keywords'].split(',') == cfg['keywords'].split()
    assert all(cfg['git_url'] in u for u in meta.get_all('Project-URL'))
    assert f'Programming Language :: Python :: {cfg["min_python"]}' in meta.get_all('Classifier')
    needs = [n for n in meta.get_all('Requires-Dist') if 'extra' not in n]
    assert sorted(needs) == sorted(cfg['requirements'].split())
    text, readme = meta.get_payload(decode=True).decode(), (ROOT/'README.md').read_text(encoding='utf-8')
    assert text.startswith('# lmnb') and text.count('](') == readme.count('](')
    links = [t.split(')')[0] for t in text.split('](')[1:]]
    assert all(link.startswith(('https://', '#')) for link in links)


def test_it_trains_with_no_checkout_near(built, text, tmp_path):
    env = os.environ | dict(PYTHONPATH=str(built.site))

    def run(*args):
        command = [sys.executable, *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert run('-c', 'import lmnb; print(lmnb.__file__)').startswith(str(built.site))
    assert 'Train a small language model' in run('-m', 'lmnb.cli', 'train', '--help')
    assert '.lmnb' in run('-c', 'from lmnb.panel import ResumePanel; print(ResumePanel().children[0].value)')
    for word, steps in (('latest-or-new', 4), ('trunk', 8)):
        out = run(built.site/'bin'/'lmnb-train', '--data', text, '--resume', word, '--extend-steps', steps,
                  '--set', *TINY, *EVERY)
        assert f'step {steps}' in out.lower()
    assert (tmp_path/'checkpoints/final_model.pt').exists()
