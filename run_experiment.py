"The same as `lmnb-train`."
from lmnb.cli import train
if __name__ == '__main__': train(prog='run_experiment.py')
