"The panel without a browser: what a user may meet, one line each, and the panel goes on."
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from conftest import powerless

from lmnb.background import condition
from lmnb.checkpoint import describe
from lmnb.panel import ResumePanel, exactness
from lmnb.rundir import RunDir, started_at


def text(w): return ' '.join(re.sub('<[^>]+>', ' ', w.value).replace('\u00a0', ' ').split())


@pytest.fixture
def panel(copy):
    p = ResumePanel(copy.parent, every_s=1000)  # looks when told to
    yield p
    p.close()


def usable(p):
    "Choosing and typing still work."
    p.origin.value, p.extend.value = '250', '400'
    assert p.resume_button.description == 'Resume at 250, go to 400' and not p.resume_button.disabled


def test_a_resume_in_fewer_processes_is_no_exact_one(panel):
    v = panel.shown
    c = v.find('latest')
    assert 'exact' in exactness(v, c) and 'processes' not in exactness(v, c)
    assert 'Not exact here (processes 2 (ddp) → 1)' in exactness(v, replace(c, software=c.software | dict(processes='2 (ddp)')))


def test_a_folder_without_runs(tmp_path):
    p = ResumePanel(tmp_path/'none', every_s=1000)
    assert 'No runs yet in' in text(p.head) and p.children[-1] is p.new
    p.steps.value = 0
    assert text(p.notice) == '▲ max_steps=0 must be at least 1'
    p.sets.value = 'lr=fast'
    p.start_button.click()
    assert text(p.notice).startswith('▲ lr=fast must be a')
    assert not (tmp_path/'none').exists()
    p.close()


def test_what_a_new_run_would_be_is_said_where_there_are_runs(panel):
    assert 'M parameters' in text(panel.size) and panel.folder.placeholder.startswith('stdlib-')


def test_a_run_deleted_while_shown(panel, copy):
    shutil.copytree(copy, copy.parent/'other')
    panel.refresh()
    panel.show(copy)
    shutil.rmtree(copy)
    panel._look()
    assert text(panel.notice) == '▲ checkpoints is gone: its folder was moved or deleted.'
    assert panel.shown.run.path == copy.parent/'other' and [p for _, p in panel.run.options] == [str(copy.parent/'other')]
    usable(panel)


@pytest.mark.parametrize('typed', ['50', 'abc', '1e9999', '-3', '300', '3.5'])
def test_an_impossible_total(panel, typed):
    panel.extend.value = typed
    assert text(panel.ahead) == f'"{typed}" is not a number above 300.' and panel.resume_button.disabled
    panel.resume_button.click()
    assert not condition(panel.shown.run).alive
    usable(panel)


def test_words_and_steps(panel):
    for what, step in dict(best=300, trunk=240, final=300, latest=300).items():
        panel.origin.value = what
        assert panel.resume_button.disabled is (step == 300)
        panel.extend.value = '1_000'
        assert panel.resume_button.description == f'Resume at {step}, go to 1,000'
        panel.extend.value = ''
    panel.origin.value = 'trnk'
    assert text(panel.detail) == '▲ No checkpoint "trnk" here. Type a step of the list, latest, best, trunk or final.'
    usable(panel)


def test_half_written_files(panel, copy):
    (copy/'checkpoint_step_300.pt').unlink()
    for name in ('final_model.pt', 'best_model.pt'): (copy/name).unlink(missing_ok=True)
    whole = (copy/'checkpoint_step_250.pt').read_bytes()
    (copy/'checkpoint_step_300.pt').write_bytes(whole[:-5000])
    with open(copy/'metrics.jsonl', 'ab') as f: f.write(b'{"kind":"tra')
    for _ in range(8): panel._look()
    assert panel.origin.value == '250'
    panel.origin.value = '300'
    assert 'Step 300 is damaged' in text(panel.detail) and 'Choose step 250 instead.' in text(panel.detail)
    assert 'damaged' in panel.ckpt.options[0][0]
    usable(panel)


def test_a_checkpoint_of_another_tool(panel, copy):
    import torch

    from lmnb import load_checkpoint
    nine = {k: v for k, v in load_checkpoint(copy/'checkpoint_step_250.pt', note=lambda _: None).items() if 'dict' in k or k in (
        'global_step', 'epoch', 'best_val_loss', 'config', 'train_history', 'val_history')}
    torch.save(nine, copy/'checkpoint_step_50.pt')
    panel._look()
    panel.origin.value, panel.extend.value = '50', '500'
    assert panel.resume_button.description == 'Resume at 250, go to 500'  # its own word, not its name's


def test_held_by_another_process(panel, copy):
    run = RunDir(copy)
    panel.extend.value = '400'
    run.write_status(state='running', step=300, max_steps=400, pid=os.getpid(), host=socket.gethostname(),
                     pid_start=started_at(os.getpid()), heartbeat=time.time())
    panel.resume_button.click()  # before the panel has looked
    assert text(panel.notice).startswith('▲ a run is at work in ')
    panel._look()
    assert panel.resume_button.disabled and text(panel.ahead) == 'Stop first to resume from here or to extend.'


def test_elsewhere(panel, copy):
    RunDir(copy).write_status(state='running', step=300, max_steps=400, pid=1, host='gpu-2', heartbeat=time.time())
    panel._look()
    assert 'Running on gpu-2 at 300 of 400' in text(panel.head) and 'Stop it there: lmnb-runs --stop' in text(panel.bar)
    assert panel.stop_button.layout.display == 'none'


CODE = '''
import re, sys
from lmnb import ResumePanel
p = ResumePanel(sys.argv[1])
p.extend.value = '400'
p.resume_button.click()
print(re.sub('<[^>]+>', '', p.notice.value)); print(p.resume_button.description)
'''


def test_no_permission(copy):
    copy.chmod(0o555)
    (copy/'train.log').unlink(missing_ok=True)
    done = subprocess.run([sys.executable, '-c', CODE, copy], capture_output=True, text=True, preexec_fn=powerless)
    copy.chmod(0o755)
    line, button = done.stdout.strip().splitlines()
    assert re.fullmatch(r'▲ Permission denied: \S+/train.log. Make the folder writable, then try again.', line), done
    assert button == 'Resume at 300, go to 400'


def test_a_name_is_text(copy):
    odd = copy.rename(copy.parent/'<b>bold<b> & "co"')
    p = ResumePanel(odd, every_s=1000)
    p.sample_button.click()
    assert '<b>bold' not in p.sampled.value and 'From step 300 of' in text(p.sampled)
    p.writing[0].kill()
    p.close()


def test_a_damaged_latest_is_passed_over_once_it_was_read(panel, copy):
    data = bytearray((copy/'checkpoint_step_300.pt').read_bytes())
    data[len(data)//3] ^= 1
    for name in ('final_model.pt', 'best_model.pt'): (copy/name).unlink(missing_ok=True)
    (copy/'checkpoint_step_300.pt').unlink()
    (copy/'checkpoint_step_300.pt').write_bytes(data)
    for _ in range(8): panel._look()
    assert describe(copy/'checkpoint_step_300.pt').error and panel.origin.value == '250'


def test_the_sample_box_holds_back_half_a_character(panel, tmp_path):
    class Ended:
        def poll(self): return 0
    with open(tmp_path/'out', 'w+b') as out:
        out.write('Zoë 😀'.encode()[:-2])
        panel.writing = Ended(), out, 'From step 1'
        panel._show_sample()
        assert text(panel.sampled) == 'From step 1 Zoë'
        out.write('😀'.encode()[-2:])
        panel._show_sample()
        assert text(panel.sampled) == 'From step 1 Zoë 😀'
    panel.writing = None


def test_one_answer_once(panel):
    panel.origin.value, panel.extend.value = '200', '400'
    panel.resume_button.click()
    assert 'This sets 3 later checkpoints aside' in text(panel.ask), text(panel.ask)
    panel.buttons[2].click()
    for b in panel.buttons: b.click()  # the question is gone
    assert not condition(panel.shown.run).alive and not (panel.shown.run/'superseded').exists()
    usable(panel)


def test_nothing_is_sent_that_did_not_change(panel):
    for _ in range(8): panel._look()  # all checkpoints are read
    sent = []
    for w in (panel, panel.head, panel.ckpt, panel.run, panel.plot, panel.legend, panel.detail, panel.ahead, panel.tail, panel.resume_button):
        w.observe(lambda c: sent.append((c['owner'], c['name'])))
    for _ in range(3): panel._look()
    assert not sent


def test_a_question_ends_with_its_run(panel, copy, monkeypatch):
    shutil.copytree(copy, copy.parent/'other')
    panel.refresh()
    panel.show(copy)
    panel.origin.value, panel.extend.value = '200', '400'
    panel.resume_button.click()
    assert panel.answers and panel.question.layout.display is None
    panel.show(copy.parent/'other')
    assert not panel.answers and panel.question.layout.display == 'none' and panel.resume_button.disabled
    for b in panel.buttons: b.click()
    assert not condition(copy).alive and not condition(copy.parent/'other').alive


@pytest.mark.parametrize('harm', [lambda b: b[:len(b)//2], lambda b: b'junk'])
def test_a_damaged_trunk_spoils_nothing_else(panel, copy, harm):
    data = (copy/'trunk_model.pt').read_bytes()
    (copy/'trunk_model.pt').unlink()
    (copy/'trunk_model.pt').write_bytes(harm(data))
    for _ in range(8): panel._look()
    panel.origin.value, panel.extend.value = 'final', '400'
    assert panel.resume_button.description == 'Resume at 300, go to 400' and 'Trunk' not in text(panel.ahead)


def test_start_twice_is_once(tmp_path, monkeypatch):
    from lmnb import background
    p, begun = ResumePanel(tmp_path, every_s=1000), []

    def popen(command, **kw):
        begun.append(command)
        return subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(9)'], **kw)
    monkeypatch.setattr(background, 'subprocess', type('S', (), dict(Popen=staticmethod(popen), DEVNULL=subprocess.DEVNULL)))
    for bad in '../out', '/elsewhere', '.hidden', 'superseded/x':
        p.folder.value = bad
        p.start_button.click()
        assert 'must lie below' in text(p.notice) and not begun
    p.folder.value = ''
    for _ in range(2): p.start_button.click()
    assert len(begun) == 1 and 'is starting' in text(p.notice)
    p.stop(kill=True)
    p.close()


def test_a_choice_made_during_a_look_counts(panel, monkeypatch):
    begun, chosen = threading.Event(), threading.Event()
    def check(v): begun.set(); chosen.wait(10)
    monkeypatch.setattr(panel, '_check_one', check)
    look = threading.Thread(target=panel._look)
    pick = threading.Thread(target=lambda: panel.ckpt.set_trait('value', 'checkpoint_step_250.pt'))
    look.start()
    assert begun.wait(10)
    pick.start()  # it waits for the look to end, which still shows the former choice
    while panel.ckpt.value != 'checkpoint_step_250.pt': time.sleep(.01)
    chosen.set()
    for t in look, pick: t.join(20)
    assert panel.ckpt.value == 'checkpoint_step_250.pt' and panel.origin.value == '250'


def test_a_failed_run_is_not_explained_by_an_older_log(panel, copy):
    (copy/'train.log').write_text('what went wrong\n\n')
    RunDir(copy).write_status(state='failed', step=300, max_steps=400, pid=os.getpid(), host='here', heartbeat=time.time())
    panel._look()
    assert text(panel.notice) == '▲ what went wrong'
    os.utime(copy/'train.log', (time.time()-60,)*2)  # of a session in the background; this one was a terminal's
    panel._look()
    assert 'Failed at 300 of 400' in text(panel.head) and text(panel.notice) == ''


def test_stopping_that_another_asked_for_can_be_killed(panel, copy):
    RunDir(copy).write_status(state='stopping', step=300, max_steps=400, pid=os.getpid(), pid_start=started_at(os.getpid()),
                              host=socket.gethostname(), heartbeat=time.time())
    panel._look()
    assert panel.stop_button.description == 'Stop' and panel.stop_button.disabled
    panel.asked = {k: t-31 for k, t in panel.asked.items()}
    panel._look()
    assert panel.stop_button.description == 'Kill' and not panel.stop_button.disabled


@pytest.mark.parametrize('line', [b'{"kind":"save","segment":"a","step":1}', b'{"kind":"val","segment":"a","step":10,"loss":"nan","time":1}',
                                  b'{"kind":"start","segment":"a","step":0,"lineage":"x","config":[],"time":1}'])
def test_odd_events_stop_nothing(panel, copy, line):
    with open(copy/'metrics.jsonl', 'ab') as f: f.write(line+b'\n')
    panel._tick()
    assert text(panel.notice) == '' and 'nan' not in text(panel.legend)
    usable(panel)


def test_compared_runs_come_and_go(panel, copy):
    def boxes(): return {t.description: t.value for t in panel.others.children}
    for name in 'b', 'c': shutil.copytree(copy, copy.parent/name)
    panel.refresh()
    panel.show(copy)
    assert boxes() == dict(b=False, c=False)
    next(t for t in panel.others.children if t.description == 'b').value = True
    shutil.rmtree(copy.parent/'c')
    shutil.copytree(copy, copy.parent/'d')
    panel.refresh()
    assert boxes() == dict(b=True, d=False) and 'b' in text(panel.legend).split()
    shutil.rmtree(copy.parent/'b')
    panel._tick()
    panel.refresh()
    assert boxes() == dict(d=False) and text(panel.notice) == ''
