"""THE way to run a part of a model: from the bottom up to a module (`read`), or from a layer on
(`PartialModel`), under virtual edits and hooks.

A causal model's hidden states up to an edited layer, and every later layer's keys and values at
earlier tokens, do not depend on what is written at a later token. They are computed once, and each
step of an optimisation runs the few remaining tokens through the few remaining layers. Where layers
cannot be run like that (a recurrence keeps a state instead of keys and values, or a layer takes
more than it is known for), the whole model is run, with the same results: `replays` compares.

    hooks         hooks on modules, and virtual edits made of them
    reading       from the bottom up to a module
    model         from a layer on: `PartialModel`, in one of two ways:
    replay        its layers one by one, with the arguments that they were called with
    flat          the same on all tokens in one row, where nothing looks into the layers
    whole         the whole model, with states put into it
    calls         what the layers from one on were called with
    arguments     the same, cut to rows and tokens
    comparing     what two ways are compared on
"""

from knowedit.models.partial.calls import Capture as Capture
from knowedit.models.partial.calls import capture as capture
from knowedit.models.partial.flat import read_last as read_last
from knowedit.models.partial.flat import texts_in_a_row as texts_in_a_row
from knowedit.models.partial.hooks import Hook as Hook
from knowedit.models.partial.hooks import hooked as hooked
from knowedit.models.partial.hooks import probed as probed
from knowedit.models.partial.hooks import recorded as recorded
from knowedit.models.partial.hooks import virtual as virtual
from knowedit.models.partial.hooks import with_weights as with_weights
from knowedit.models.partial.model import PartialModel as PartialModel
from knowedit.models.partial.model import replays as replays
from knowedit.models.partial.model import runs_flat as runs_flat
from knowedit.models.partial.reading import layer_outputs as layer_outputs
from knowedit.models.partial.reading import read as read
from knowedit.models.partial.reading import read_keys as read_keys
from knowedit.models.partial.whole import finished as finished
