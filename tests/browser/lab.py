"A private Jupyter or Voila server, a Chromium, and the panel in its page, driven as a user would."
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
from playwright.sync_api import expect, sync_playwright

from lmnb.rundir import RunDir, started_at

expect.set_options(timeout=30_000)

SHOTS = os.environ.get('LMNB_SHOTS')
CONFIG = dict(  # nobody asks, nothing covers the page, and `jupyterapp` answers in it
    ServerApp=dict(ip='127.0.0.1', port_retries=0, open_browser=False, allow_root=True),
    IdentityProvider=dict(token=''), JupyterNotebookApp=dict(expose_app_in_browser=True),
    LabApp=dict(expose_app_in_browser=True, news_url=None))
SETTINGS = {'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False, doNotDisturbMode=True),
            'docmanager-extension/plugin': dict(autosave=False)}


def chromium_path():
    found = map(shutil.which, ('/usr/bin/chromium', 'chromium', 'chromium-browser', 'google-chrome'))
    return os.environ.get('CHROMIUM') or next(filter(None, found), None)


@contextmanager
def chromium():
    "A browser whose pages share what they have loaded."
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium_path(), args=['--no-sandbox', '--disable-dev-shm-usage'])
        try: yield browser.new_context(viewport=dict(width=1280, height=1500))
        finally: browser.close()


def until(f, s=30):
    "Wait for a true value of `f()`, and return it."
    end = time.monotonic()+s
    while not (value := f()):
        assert time.monotonic() < end, f'not within {s} s'
        time.sleep(.1)
    return value


@contextmanager
def serve(root, *command, **env):
    "A server of the folder `root`, with our settings and no others; its address. JupyterLab's serves Notebook 7 too."
    home = root/'.jupyter'
    for name, fields in SETTINGS.items():
        path = home/'lab/user-settings/@jupyterlab'/f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(fields))
    (home/'jupyter_server_config.json').write_text(json.dumps(CONFIG))
    ours = dict.fromkeys(('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR'), str(home))
    env = {k: v for k, v in os.environ.items() if not k.startswith('JUPYTER')} | ours | env
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    with open(home/'log', 'w') as log:
        command = [sys.executable, '-m', *command, f'--port={port}']
        p = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log)
    def listens():
        assert p.poll() is None, (home/'log').read_text()[-3000:]
        with socket.socket() as s: return s.connect_ex(('127.0.0.1', port)) == 0
    try:
        until(listens, 60)
        yield f'http://127.0.0.1:{port}'
    finally:
        p.terminate()  # it ends its kernels, and they leave the trainings alone
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill(); p.wait()


def trainings(run):
    "The processes that train in `run`, by their command lines (a zombie has none)."
    def trains(words, cwd):
        told = any(w == 'train' or w.endswith('lmnb-train') for w in words)
        return told and any(Path(cwd, w).resolve() == run for w in words[1:])
    found = [p.info for p in psutil.process_iter(['pid', 'cmdline', 'cwd'])]
    return [p['pid'] for p in found if p['cmdline'] and p['cwd'] and trains(p['cmdline'], p['cwd'])]


def kill_trainings(folder):
    "End every training in a run of `folder`: by its `run.json`, and before it has one."
    for run in folder.glob('*/'):
        told = RunDir(run).status()
        living = told.get('pid_start') and started_at(told['pid']) == told['pid_start']
        for pid in {*trainings(run), *([told['pid']] if living else [])}: os.kill(pid, signal.SIGKILL)


class Notebook:
    "A notebook open in JupyterLab or Notebook 7."
    def __init__(self, page, address, path, ui='lab'):
        self.page = page
        page.on('dialog', lambda d: d.accept())  # leaving a page with changes asks
        page.goto(f'{address}/lab/tree/{path}?reset' if ui == 'lab' else f'{address}/notebooks/{path}')
        self.ready()

    def js(self, code):
        return self.page.evaluate(f'async () => {{ const nb = jupyterapp.shell.currentWidget; {code} }}')

    def command(self, *words): return self.js(f'await jupyterapp.commands.execute(...{json.dumps(words)})')

    def ready(self):
        "Wait for the kernel itself: while only the toolbar says idle, cells are dropped without a word."
        self.page.locator('.jp-Notebook .jp-Cell').first.wait_for(timeout=60_000)
        self.page.wait_for_function('''async () => {
            const context = window.jupyterapp?.shell.currentWidget?.sessionContext;
            await context?.ready;
            const kernel = context?.session?.kernel;
            await kernel?.info;
            return kernel?.connectionStatus === 'connected' && kernel.status === 'idle' }''', timeout=60_000)

    def cells(self):
        "Number and outputs of each code cell; the number is None until it has run."
        return self.js("""return nb.content.widgets.filter(c => c.model.type === 'code')
            .map(c => [c.model.executionCount, c.model.outputs.toJSON()])""")

    def run_all(self): self.js("jupyterapp.commands.execute('notebook:run-all-cells')")  # not awaited

    def run(self, i):
        self.page.locator('.jp-CodeCell .jp-InputArea-editor .cm-content').nth(i).click()
        self.page.keyboard.press('Control+Enter')

    def restart(self):
        "Restart the kernel by its menu, and wait until it has."
        self.js('''window.restarted = new Promise(done => nb.sessionContext.session.kernel.statusChanged.connect(
            (_, status) => status === 'restarting' && done()))''')
        self.page.get_by_role('menuitem', name='Kernel', exact=True).click()
        self.page.locator('.lm-Menu-item', has_text='Restart Kernel…').first.click()
        self.page.locator('.jp-Dialog button.jp-mod-accept').click()
        self.js('await restarted')
        self.ready()

    def reload(self):
        "Save the notebook and load the page anew."
        self.command('docmanager:save')
        self.page.reload()
        self.ready()

    def close(self):
        self.page.evaluate('() => window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()')
        self.page.close()


class Panel:
    "The panel of a page; its parts by their classes."
    def __init__(self, page, notebook=None):
        self.page, self.notebook = page, notebook
        page.locator('.lmnb').wait_for()

    def __getitem__(self, css): return self.page.locator('.lmnb').locator(css)
    def says(self, css, text, s=30): expect(self[css]).to_contain_text(text, timeout=1000*s)
    def enabled(self, css, yes=True): expect(self[css]).to_be_enabled(enabled=yes)
    def tab(self, name): self['[role=tab]'].filter(has_text=name).click()

    def choose(self, step):
        "Pick a checkpoint in the list; its row, as words."
        rows = [r.split() for r in self['.lm-list option'].all_text_contents()]
        i = next(i for i, r in enumerate(rows) if r[0] == f'{step:,}')
        self['.lm-list select'].select_option(index=i)
        return rows[i]

    def goes_on(self):
        "See the bar move."
        def step(): return int(self['.lm-bar'].get_attribute('aria-valuenow'))
        before = step()
        until(lambda: step() > before)

    def pictures(self, n, s=40):
        "See `n` different pictures, the present one among them."
        assert self.page.evaluate('''async ([n, s]) => {
            const seen = new Set(), end = Date.now()+1000*s;
            for (let last; seen.size < n && Date.now() < end; await new Promise(r => setTimeout(r, 100))) {
                const img = document.querySelector('.lmnb .lm-plot');
                if (!img?.naturalWidth || img.src === last) continue;
                last = img.src;
                try { seen.add(await (await fetch(last)).text()) } catch {}  // replaced meanwhile
            }
            return seen.size }''', [n, s]) == n
