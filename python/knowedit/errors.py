"""Every error a user can cause, each with what was wrong, where, and what to do."""


class KnowEditError(ValueError):
    """Base of the package's own errors."""


class ModelError(KnowEditError):
    """A model that cannot be loaded or cannot be edited, with the reason."""


class StatisticsError(KnowEditError):
    """Key statistics that are missing, damaged or belong to another model."""


class RankError(StatisticsError):
    """Another process of the same run ended, or is not where this one is."""


class Terminated(StatisticsError):
    """A SIGTERM ended a collection of statistics; what there was is kept."""


class EditError(KnowEditError):
    """An edit that cannot be computed, loaded or applied."""


class RuinousEditError(EditError):
    """An edit that does not do what it should, or harms the model, by what was measured on it."""


class CorpusError(KnowEditError):
    """A corpus that is missing, empty or unreadable; the message says where, why and what to do."""


class ConfigError(EditError):
    """A setting that there is not, or a value that it cannot have; the message names it and what is
    known.
    """
