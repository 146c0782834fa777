"The panel in a browser, by what a user does and sees; the run's own files say whether it is true."
import os
import re
import shutil
import signal

import pytest
from conftest import ROOT, TINY, events
from playwright.sync_api import expect

from lmnb import list_checkpoints
from lmnb.rundir import RunDir

from . import lab

BUSY = '''import numpy as np
from pathlib import Path
Path('busy').touch()
a = np.random.rand(300, 300)
while not Path('enough').exists(): a @ a
'''


def begin(panel, run):
    "Extend the finished run from its end; the number of its process."
    panel.says('.lm-head', 'Finished at 300 of 300: extend?')
    panel['.lm-to input'].fill('100000')
    panel.says('.lm-resume', 'Resume at 300, go to 100,000')
    panel['.lm-resume'].click()
    return running(panel, run)


def running(panel, run, to='100,000'):
    "See it run, in one process from the first moment; its number."
    seen = set()
    lab.until(lambda: seen.update(lab.trainings(run)) or RunDir(run).status().get('pid') in seen)
    panel.says('.lm-head', re.compile(rf'Running at [\d,]+ of {to}'))
    panel.goes_on()
    [pid] = seen.union(lab.trainings(run))
    return pid


def stop(panel, run):
    panel['.lm-stop'].click()
    return stopped(panel, run)


def stopped(panel, run):
    "See it stopped, saved and ready to go on; its step."
    panel.says('.lm-head', 'Stopped at')
    lab.until(lambda: not lab.trainings(run))
    step = list_checkpoints(run)[0].step
    assert [e['step'] for e in events(run, 'stop')] == [step]
    panel.says('.lm-head', f'Stopped at {step:,} of ')
    panel.says('.lm-meta', 'Saved.')
    panel.says('.lm-resume', f'Resume at {step:,}, go to ')
    expect(panel['.lm-stop']).to_be_hidden()
    return step


def choose_extend_resume_stop(panel, run):
    panel.says('.lm-run select', 'toy, finished at 300 of 300')
    assert 'trunk' in panel.choose(240) and 'final' in panel.choose(300)
    panel.says('.lm-ahead', 'Type a number above 300')
    panel.enabled('.lm-resume', False)
    panel.choose(200)
    expect(panel['.lm-to input']).to_be_focused()  # JupyterLab would take the keys that a list gets
    panel.page.keyboard.type('4')
    panel.says('.lm-ahead', '"4" is not a number above 200.')
    panel.enabled('.lm-resume', False)
    panel.page.keyboard.type('0000')
    panel.says('.lm-ahead', re.compile('39,800 more steps.*done at', re.S))
    panel.says('.lm-resume', 'Resume at 200, go to 40,000')
    panel['.lm-resume'].click()
    panel.says('.lm-ask', 'This sets 2 later checkpoints aside in superseded/. Nothing is deleted.')
    panel.enabled('.lm-resume', False)
    panel['.lm-cancel'].click()
    expect(panel['.lm-ask']).to_be_hidden()
    assert not lab.trainings(run) and not events(run, 'resume')
    panel['.lm-resume'].click()
    panel['.lm-aside'].click()
    running(panel, run, '40,000')
    panel.pictures(3)
    panel.goes_on()
    panel.enabled('.lm-to input', False)
    assert [e['step'] for e in events(run, 'resume')] == [200]
    assert (run/'superseded'/'1'/'checkpoint_step_300.pt').exists()
    stop(panel, run)


def test_choose_extend_resume_stop(show, run): choose_extend_resume_stop(show(), run)


def test_voila(run, browser, folder):
    shutil.copy(ROOT/'nbs'/'panel.ipynb', folder)
    with lab.serve(folder, 'voila', 'panel.ipynb', '--no-browser') as address, browser.new_page() as page:
        page.goto(address)
        choose_extend_resume_stop(lab.Panel(page), run)


def test_refresh_and_kernel_restart(show, run):
    panel = show()
    pid = begin(panel, run)
    panel.notebook.reload()
    panel.pictures(2)
    assert running(panel, run) == pid
    panel.notebook.restart()
    panel.notebook.run(0)
    lab.until(lambda: panel.notebook.cells()[0][0] == 1)  # the first cell of a new kernel
    panel.pictures(2)
    assert running(panel, run) == pid and len(events(run, 'resume')) == 1
    stop(panel, run)


def test_two_tabs(show, run):
    one, two = show(), show(ui='notebook')
    two.says('.lm-head', 'Finished at 300 of 300')
    pid = begin(one, run)
    assert running(two, run) == pid
    two.enabled('.lm-to input', False)
    two.pictures(2)
    stop(two, run)
    stopped(one, run)


def test_death(show, run):
    panel = show()
    pid = begin(panel, run)
    lab.until(lambda: list_checkpoints(run)[0].step > 300)  # an extension counts from its first save
    os.kill(pid, signal.SIGKILL)
    panel.says('.lm-head', 'Died at', s=5)
    saved = list_checkpoints(run)[0].step
    panel.says('.lm-meta', f'Last save: step {saved:,}.')
    panel.says('.lm-resume', f'Resume at {saved:,}, go to 100,000')
    panel['.lm-resume'].click()
    running(panel, run)
    assert [e['step'] for e in events(run, 'resume')] == [300, saved]


def test_damaged_checkpoint(show, run):
    newest, good = list_checkpoints(run)[:2]
    data = bytearray(newest.path.read_bytes())
    for i in range(len(data)//2, len(data)//2+16): data[i] ^= 255
    newest.path.write_bytes(data)
    panel = show()
    panel['.lm-to input'].fill('5000')
    panel.says('.lm-resume', f'Resume at {good.step}, go to 5,000')
    lab.until(lambda: 'damaged' in panel.choose(300))
    panel.says('.lm-detail', re.compile(r'Step 300 is damaged: the CRC of \S+ does not match'))
    panel.says('.lm-detail', f'Choose step {good.step} instead.')
    panel.enabled('.lm-resume', False)
    panel['.lm-from input'].fill('latest')
    panel.says('.lm-resume', f'Resume at {good.step}, go to 5,000')
    panel.enabled('.lm-resume')


def test_another_cell_computes(show, run, folder):
    panel = show(BUSY)
    begin(panel, run)
    panel.notebook.run(1)
    lab.until((folder/'busy').exists)
    panel.goes_on()
    panel.pictures(2)
    told = panel['.lm-meta'].inner_text()
    lab.until(lambda: panel['.lm-meta'].inner_text() != told)
    assert panel.notebook.cells()[1][0] is None  # it computes still
    (folder/'enough').touch()
    lab.until(lambda: panel.notebook.cells()[1][0])
    stop(panel, run)


@pytest.mark.parametrize('ui', ['lab', 'notebook'])
def test_looks(show, run, ui):
    panel = show(ui=ui)
    for width, theme in (1280, 'Light'), (1280, 'Dark'), (800, 'Dark'), (800, 'Light'):
        panel.page.set_viewport_size(dict(width=width, height=1500))
        panel.notebook.command('apputils:change-theme', dict(theme=f'JupyterLab {theme}'))
        expect(panel.page.locator('body')).to_have_attribute('data-jp-theme-light', str(theme == 'Light').lower())
        panel.pictures(1)
        assert ('invert' in panel['.lm-plot'].evaluate('e => getComputedStyle(e).filter')) == (theme == 'Dark')
        for tab in 'Sample', 'Compare', 'New run', 'Log':
            panel.tab(tab)
            for css in '.lmnb', '.jp-OutputArea-output:has(.lmnb)', '.lm-list select':
                wide, room = panel.page.locator(css).evaluate('e => [e.scrollWidth, e.clientWidth]')
                assert 0 < wide <= room, (theme, width, tab, css)
            if lab.SHOTS: panel.page.screenshot(path=f'{lab.SHOTS}/{ui}-{theme}-{width}-{tab}.png')


def test_nothing_happens_twice(show, run):
    panel = show()
    panel['.lm-to input'].fill('100000')
    panel.says('.lm-resume', 'go to 100,000')
    for _ in range(2): panel['.lm-to input'].press('Enter')
    panel['.lm-resume'].dblclick(force=True)  # whatever Enter did
    pid = running(panel, run)
    panel['.lm-stop'].dblclick()
    step = stopped(panel, run)
    for bad in '50', 'abc', '1e9999':
        panel['.lm-to input'].fill(bad)
        panel['.lm-to input'].press('Enter')
        expect(panel['.lm-ahead']).to_have_text(f'"{bad}" is not a number above {step:,}.')
        panel.enabled('.lm-resume', False)
    expect(panel['.lm-notice']).to_be_hidden()
    assert len(events(run, 'resume')) == 1 and not lab.trainings(run) and RunDir(run).status()['pid'] == pid


def test_sample_and_compare(show, run, folder):
    shutil.copytree(run, folder/'other')
    panel = show()
    panel.tab('Sample')
    panel['.lm-prompt textarea'].fill('def ')
    panel['.lm-write'].click()
    panel.says('.lm-sample', re.compile(r'^def .{40}', re.S))
    alone = panel['.lm-plot'].get_attribute('src')
    panel.tab('Compare')
    panel['.lm-other input'].check()
    panel.says('.lm-legend', re.compile('toy|other'))
    lab.until(lambda: panel['.lm-plot'].get_attribute('src') != alone)


def test_new_run(show, folder, text):
    panel = show()
    panel.says('.lm-head', 'No runs yet in')
    for part, value in dict(data=text, steps=100_000, folder='new', overrides=' '.join(TINY)).items():
        panel[f'.lm-{part} input'].fill(str(value))
    panel['.lm-start'].dblclick()
    running(panel, folder/'new')
    stop(panel, folder/'new')
    assert len(events(folder/'new', 'start')) == 1
