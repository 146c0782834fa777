"One server and one browser for all tests; for each its own folder with a finished run. What it starts ends with it."
import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import TINY, train
from playwright.sync_api import Error

from . import lab

MISSING = None if lab.chromium_path() else 'no chromium: none in PATH, and CHROMIUM names none'
PANEL = 'from lmnb import ResumePanel\nResumePanel()'


@pytest.fixture(scope='session', autouse=True)
def need_chromium():
    if MISSING and os.environ.get('LMNB_BROWSER') == 'required': pytest.fail(MISSING, pytrace=False)
    if MISSING: pytest.skip(MISSING)


def pytest_terminal_summary(terminalreporter):
    if MISSING: terminalreporter.write_line(f'tests/browser: {MISSING}')


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    "When a test fails, photograph its pages."
    report = yield
    if report.failed and report.when != 'teardown' and 'browser' in item.funcargs:
        tmp = item.funcargs['tmp_path']
        pages = {Path(lab.SHOTS or tmp)/f'{tmp.name}-{i}.png': p for i, p in enumerate(item.funcargs['browser'].pages)}
        for path, page in pages.items():
            with suppress(Error): page.screenshot(path=path)  # a page that crashed
        report.sections.append(('pages', '\n'.join(map(str, pages))))
    return report


@pytest.fixture(scope='session')
def browser():
    with lab.chromium() as b: yield b


@pytest.fixture(scope='session')
def server(tmp_path_factory, cache):
    "A JupyterLab whose root holds the folders of all tests."
    with lab.serve(tmp_path_factory.getbasetemp(), 'jupyter', 'lab', LMNB_TUTORIAL_STEPS='20') as address: yield address


@pytest.fixture(scope='session')
def finished(text, tmp_path_factory):
    "300 steps of some 5 ms; extended to 100,000 it outlives a test."
    run = tmp_path_factory.mktemp('finished')/'toy'
    done = train('--data', text, '--checkpoint-dir', run, '--max-steps', 300, '--set', *TINY, 'log_interval=10',
                 'save_interval=200', 'eval_interval=100', cwd=run.parent)
    assert done.code == 0, done.err
    return run


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    lab.kill_trainings(tmp_path)


@pytest.fixture
def run(folder, finished):
    subprocess.run(['cp', '-a', finished, folder], check=True)  # files with several names stay one
    return folder/'toy'


@pytest.fixture
def notebook(server, browser, tmp_path_factory):
    "Open a notebook."
    opened = []
    def new(path, ui='lab'):
        opened.append(lab.Notebook(browser.new_page(), server, path.relative_to(tmp_path_factory.getbasetemp()), ui))
        return opened[-1]
    yield new
    for nb in opened: nb.close()


@pytest.fixture
def show(notebook, folder):
    "Open a notebook whose first cell shows the panel of its folder."
    def new(*more, ui='lab'):
        code = dict(cell_type='code', metadata={}, outputs=[], execution_count=None)
        cells = [dict(code, source=s) for s in (PANEL, *more)]
        kernel = dict(name='python3', display_name='Python 3', language='python')
        path = folder/f'{ui}.ipynb'
        path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=4)))
        nb = notebook(path, ui)
        nb.run(0)
        return lab.Panel(nb.page, nb)
    return new
