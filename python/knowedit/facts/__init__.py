"""What to write into a model: facts, the sets they come in, and other ways to word them."""

from knowedit.facts.fact import Fact as Fact
from knowedit.facts.fact import FactError as FactError
from knowedit.facts.fact import Probe as Probe
from knowedit.facts.records import read_facts as read_facts
from knowedit.facts.records import write_facts as write_facts
from knowedit.facts.sets import conflict_free as conflict_free
from knowedit.facts.sets import known_sets as known_sets
from knowedit.facts.sets import load as load
