"""Errors that end a run, besides ValueError for what the user can mend."""


class StepFailed(RuntimeError):
    """A step stopped before it changed the weights. Raised on every rank."""


class SaveFailed(RuntimeError):
    """The end of a run could not be saved; it can be reached again. Raised on every rank."""


class NotFinite(StepFailed):
    """A loss, a gradient or what a step made of the weights is not finite. Raised on every rank."""
