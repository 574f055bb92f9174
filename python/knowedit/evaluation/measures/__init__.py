"""One file a measure; a new file that registers a measure is found by itself."""

from knowedit.evaluation.measures.base import Answer as Answer
from knowedit.evaluation.measures.base import FactMeasure as FactMeasure
from knowedit.evaluation.measures.base import Measure as Measure
from knowedit.evaluation.measures.base import ModelMeasure as ModelMeasure
from knowedit.evaluation.measures.base import Question as Question
from knowedit.evaluation.measures.base import ask as ask
from knowedit.evaluation.measures.base import measures as measures
from knowedit.evaluation.measures.base import questions as questions
from knowedit.evaluation.measures.base import register as register
