"""The one kind of error of this package."""


class EstimateError(ValueError):
    """Something that cannot be estimated; says what is wrong with the value and what to do."""
