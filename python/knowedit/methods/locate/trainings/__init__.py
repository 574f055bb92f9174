"""Trainings: how write-outs go on after a write, through the edited model."""

from knowedit.methods.locate.trainings.base import Training as Training
from knowedit.methods.locate.trainings.forms import ThroughForms as ThroughForms
from knowedit.methods.locate.trainings.solver import ThroughSolver as ThroughSolver
from knowedit.methods.locate.trainings.texts import ThroughTexts as ThroughTexts
