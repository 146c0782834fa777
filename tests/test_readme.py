"The README is the index, and its commands are the ones that CI runs."
import subprocess
import sys
from pathlib import Path

root = Path(__file__).parent.parent


def test_readme_is_not_stale():
    assert subprocess.run([sys.executable, 'tools/readme.py', '--check'], cwd=root).returncode == 0


def test_links_lead_somewhere():
    import re
    text = (root/'README.md').read_text(encoding='utf-8')
    for link in re.findall(r'\]\(([^)#]+)\)', text):
        assert '://' in link or (root/link).exists(), link


def test_the_two_commands():
    def command(n): return subprocess.run([sys.executable, 'tools/readme.py', '--command', str(n)], cwd=root, capture_output=True, text=True).stdout
    assert 'lmnb-train --config small --max-steps 300 --save-interval 100' in command(1)
    assert 'nbdev_test' in command(2) and 'pytest' in command(2)
    assert all(len(command(n).strip().splitlines()) == 1 for n in (1, 2))
