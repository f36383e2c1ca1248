"""Sweeps: N adapters with different hyperparameters trained at once, one pass of the base model a step for all of them.

    trials = fa.sweep.grid(fa.LoraConfig(target_modules="all-linear"), lr=[1e-3, 3e-3], r=[4, 16], seed=[0, 1])
    result = fa.sweep.run(model, trials, ids, held_out=others, steps=200, batch=4, patience=3)

Each trial is, to rounding, the run that it would have been alone: its initial leaves, its examples and its dropout
depend on its own seeds, its gradient on its own rows, its optimiser and its clipping on its own leaves. A trial that
stops early leaves the stack, and the rest go on without its rows.
"""

from funcadapt.sweep.grids import grid as grid
from funcadapt.sweep.grids import read as read
from funcadapt.sweep.grids import trials_from as trials_from
from funcadapt.sweep.losses import token_loss as token_loss
from funcadapt.sweep.reporting import Event as Event
from funcadapt.sweep.results import Result as Result
from funcadapt.sweep.results import Run as Run
from funcadapt.sweep.training import run as run
from funcadapt.sweep.trials import Trial as Trial
