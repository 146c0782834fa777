"Train small language models in a notebook: stop anywhere, resume exactly, extend for free."
__version__ = "0.2.0"

import importlib

_NAMES = {
    'config': ('ExperimentConfig', 'preset'),
    'history': ('load_history',),
    'listeners': ('TensorBoard', 'CSV', 'replay'),
    'plots': ('plot_runs',),
    'checkpoint': ('load_checkpoint',),
    'rundir': ('list_checkpoints',),
    'sampling': ('sample',),
    'trainer': ('Trainer',),
    'background': ('launch', 'find_runs', 'attach', 'stop'),
    'panel': ('ResumePanel',),
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_WHERE)


def __getattr__(name):
    "A public name, from the module that has it: `import lmnb` alone imports neither torch nor matplotlib."
    if name in ('load_checkpoint', 'Trainer', 'sample'): importlib.import_module('lmnb.model')  # torch.load knows our config
    if name in _WHERE: return getattr(importlib.import_module(f'lmnb.{_WHERE[name]}'), name)
    raise AttributeError(f'module lmnb has no attribute {name!r}')


def __dir__(): return sorted([*globals(), *__all__])
