"Reads `settings.ini`, so that name, version and requirements stand in one place."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(
    version=cfg['version'],
    description=cfg['description'],
    packages=find_packages(include=['lmnb', 'lmnb.*']),
    package_data={'lmnb': ['*.css']},
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'notebook', 'hf', 'tensorboard')},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
)
